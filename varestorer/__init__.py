"""One-step visual autoregressive image super-resolution: tokenizer, transformer, distillation, evaluation."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["HVAR", "VARSR", "VARestorer", "__version__", "load"]
_HOMES = {"load": "", "VARestorer": ".varestorer", "VARSR": ".varsr", "HVAR": ".hvar"}  # below varestorer.systems
_ROOMS = {"spandrel": "varestorer.exchange.spandrel"}  # for `varestorer.spandrel.install()`


def __getattr__(name: str) -> Any:
    """Import what restores on first use, so that `import varestorer` stays light."""
    if name in _HOMES:
        return getattr(import_module(f"varestorer.systems{_HOMES[name]}"), name)
    if name in _ROOMS:
        return import_module(_ROOMS[name])
    raise AttributeError(f"module 'varestorer' has no attribute {name!r}")


def __dir__() -> list[str]:
    """For completion by tab: also what is not imported yet."""
    return sorted(globals().keys() | _HOMES.keys() | _ROOMS.keys())
