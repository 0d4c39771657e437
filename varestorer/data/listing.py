"""Which images a folder holds, remembered between runs.

Listing 85,000 files takes seconds on a disk and can take minutes on a network. The list is kept in
`cache_folder()/folders` with the times of change of every folder in the tree, and is good as long as these are the
same: adding, removing or renaming a file or a folder changes the time of the folder that holds it. Only folders are
asked, not files.

Not noticed: a file whose content is overwritten in place. The list does not depend on it: sizes and contents are read
when a file's turn comes, and a file that turns out to be broken is skipped then. Small folders are listed every time.
"""

import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from varestorer.utils.errors import UserError, reason
from varestorer.utils.files import cache_folder, expand_user, name_bytes, read_text, write_json
from varestorer.utils.images import report_no_images, split_images
from varestorer.utils.scanning import Stamp, scan_folder, stamp

log = logging.getLogger(__name__)

MIN_FILES = 1000
# a folder that changed this recently (seconds) may change again without its time of change showing it
SETTLED = 2.0
FORMAT = 2


def indexed_images(folder: str | os.PathLike) -> list[Path]:
    """`list_images(folder)`, from the cache if nothing changed since.

    Raises:
        UserError: the folder does not exist, or a folder in it cannot be read.
    """
    root = Path(folder)
    path = cache_path("folders", root)
    kept = read_cache(path)
    if kept is not None and _is_unchanged(root, kept["folders"]):
        report_no_images(root, kept["unused"])
        return [root / name for name in kept["files"]]
    scan = scan_folder(root)
    scan.check_readable()
    images, others = split_images(scan)
    unused = [path.relative_to(root).as_posix() for path in others]
    report_no_images(root, unused)
    stamps = {os.path.relpath(folder, root): times for folder, times in scan.folders.items()}
    if len(images) >= MIN_FILES and _is_settled(stamps):
        names = [path.relative_to(root).as_posix() for path in images]
        write_cache(path, {"root": str(root.absolute()), "folders": stamps, "files": names, "unused": unused})
    return images


def cache_path(kind: str, root: Path) -> Path | None:
    """The file of what is remembered about a folder; None where there is no cache."""
    cache = cache_folder()
    name = hashlib.sha256(name_bytes(str(expand_user(root).absolute()))).hexdigest()[:32]
    return None if cache is None else cache / kind / f"{name}.json"


def read_cache(path: Path | None) -> dict[str, Any] | None:
    """What `write_cache` kept; None if there is nothing, or nothing of use."""
    if path is None:
        return None
    try:
        content = json.loads(read_text(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("the cached list %s cannot be read and is made again (%s)", path, reason(error))
        return None
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None


def write_cache(path: Path | None, content: dict[str, Any]) -> None:
    """Keep a JSON object; trouble with the disk is a warning, since it can be made again."""
    if path is None:
        return
    try:
        write_json(path, {"format": FORMAT, **content})
    except UserError as error:
        log.warning("the list is not remembered: %s (VARESTORER_CACHE names another folder)", reason(error))


def _is_unchanged(root: Path, stamps: dict[str, Stamp]) -> bool:
    try:
        return all(stamp(root / name) == times for name, times in stamps.items())
    except OSError:  # one is gone
        return False


def _is_settled(stamps: dict[str, Stamp]) -> bool:
    latest = max((max(times) for times in stamps.values()), default=0)
    return time.time() - latest / 1e9 > SETTLED
