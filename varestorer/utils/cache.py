"""The folder of what can be made again but takes time."""

import os
from pathlib import Path

from varestorer.utils.files import expand_user


def cache_folder() -> Path | None:
    """`$VARESTORER_CACHE`, else `$XDG_CACHE_HOME/varestorer`, else `~/.cache/varestorer`.

    None, for nothing is remembered then, where nothing says what the user's folder is (a container without HOME).
    """
    if own := os.environ.get("VARESTORER_CACHE"):
        return expand_user(own)
    if common := os.environ.get("XDG_CACHE_HOME"):
        return Path(common) / "varestorer"
    home = os.path.expanduser("~")
    return None if home == "~" else Path(home) / ".cache" / "varestorer"
