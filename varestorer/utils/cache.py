"""The folder of what can be made again but takes time."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$VARESTORER_CACHE`, else `$XDG_CACHE_HOME/varestorer`, else `~/.cache/varestorer`."""
    if own := os.environ.get("VARESTORER_CACHE"):
        return Path(own).expanduser()
    common = os.environ.get("XDG_CACHE_HOME")
    return (Path(common) if common else Path.home() / ".cache") / "varestorer"
