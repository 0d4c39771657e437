"""Models that come with the package: bundles in `varestorer/assets`, by name."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
DEFAULT = "nano"
"""The model that restores where no other is named."""


def shipped(name: str | Path) -> Path:
    """The bundle of a shipped model where `name` is one's, as in `ckpt=nano`; any other path or name as it is.

    A file or folder of that name in the working directory comes first.
    """
    path = Path(name)
    asset = ASSETS / path
    is_one = len(path.parts) == 1 and not path.exists() and (asset / "config.json").is_file()
    return asset if is_one else path
