"""Models that come with the package: bundles in `varestorer/assets`, by name."""

from __future__ import annotations

from pathlib import Path

from varestorer.weights.bundles import is_bundle

ASSETS = Path(__file__).parents[1] / "assets"
DEFAULT = "nano"
"""The model that restores where no other is named."""


def shipped(name: str | Path) -> Path:
    """The bundle of a shipped model where `name` is one's, as in `ckpt=nano`; any other path or name as it is.

    A run, a bundle or a file of that name in the working directory comes first.
    """
    from varestorer.weights.runs import is_run  # imports torch, for which no help text should wait

    path = Path(name)
    is_there = path.is_file() or is_run(path) or is_bundle(path)
    is_one = str(name) == path.name and not is_there and is_bundle(ASSETS / path)
    return ASSETS / path if is_one else path


def named_or_default(name: str | Path | None) -> Path:
    """What `ckpt=` names; the model that comes with the package, whatever the working directory holds, for None."""
    return ASSETS / DEFAULT if name is None else shipped(name)
