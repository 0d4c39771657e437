"""One-step visual autoregressive image super-resolution: tokenizer, transformer, distillation, evaluation."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["VARestorer", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `VARestorer` on first use, so that `import varestorer` stays light."""
    if name == "VARestorer":
        return import_module("varestorer.systems.varestorer").VARestorer
    raise AttributeError(f"module 'varestorer' has no attribute {name!r}")
