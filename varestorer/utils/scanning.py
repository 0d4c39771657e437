"""What a user's folder holds: the one walk through it, the one rule of what is skipped there, which are pictures.

Listing 85,000 files takes seconds on a disk and can take minutes on a network. A large list of pictures is kept in
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
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from varestorer.utils.errors import UserError, reason
from varestorer.utils.files import cache_folder, expand_user, name_bytes, read_text, write_json
from varestorer.utils.images import IMAGE_EXTENSIONS

log = logging.getLogger(__name__)

REPORT_NAME = "restore.json"
# what systems, disks and archives keep beside somebody's files, in lower case
SKIPPED = frozenset(
    [
        *("@eadir", "@recycle", "#recycle", "#snapshot"),  # of NAS: thumbnails, bins, earlier states
        *("$recycle.bin", "system volume information", "lost+found"),
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
        "__macosx",
        REPORT_NAME,  # ours, beside results
    ]
)
NAMES_SHOWN = 5
NO_IMAGES = "files are not used as images, by their extension"
MIN_FILES = 1000
# a folder that changed this recently (seconds) may change again without its time of change showing it
SETTLED = 2.0
FORMAT = 2

Stamp = list[int]
_REPORTED: set[str] = set()  # every stage of a run lists its photographs again


@dataclass(frozen=True)
class Scan:
    """A folder and its subfolders, but for what `is_skipped`.

    Attributes:
        root: the folder.
        files: in order of their paths; links to files too, whether or not there is one.
        folders: those that were read, `root` among them, with their `stamp` before that.
        unused: links to folders that were read under another name, and what is neither file nor folder.
        unreadable: folders that could not be read, with the reason.
    """

    root: Path
    files: list[Path] = field(default_factory=list)
    folders: dict[Path, Stamp] = field(default_factory=dict)
    unused: list[Path] = field(default_factory=list)
    unreadable: dict[Path, str] = field(default_factory=dict)

    def check_readable(self) -> None:
        """Refuse a folder (UserError) of which a part is not seen: what is made of the rest would look whole."""
        if self.unreadable:
            names = first_names(map(str, self.unreadable))
            reason = next(iter(self.unreadable.values()))
            raise UserError(
                f"{len(self.unreadable)} folders in {self.root} cannot be read ({reason}): {names}; make them readable "
                "or move them out of it"
            )


def is_skipped(name: str) -> bool:
    """Whether a file or folder of this name is no input of the user: hidden, or a system's own (see `SKIPPED`)."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in SKIPPED


def scan_folder(folder: str | os.PathLike) -> Scan:
    """Look through a folder and its subfolders, linked ones included; UserError: it is no folder.

    Links are followed last, each folder read once.
    """
    scan = Scan(Path(folder))
    if not scan.root.is_dir():
        problem = "is a file" if scan.root.exists() else "does not exist"
        raise UserError(f"wanted a folder, but {scan.root} {problem}")
    seen: set[str] = set()
    folders, links = [scan.root], list[Path]()
    while folders or links:
        path = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(path)
        if real in seen:  # a link that leads back up would otherwise be followed for ever
            scan.unused.append(path)
            continue
        seen.add(real)
        try:
            scan.folders[path] = stamp(path)
            with os.scandir(path) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            scan.folders.pop(path, None)
            scan.unreadable[path] = error.strerror or str(error)
            continue
        for entry in (entry for entry in entries if not is_skipped(entry.name)):
            try:
                if entry.is_dir():
                    kind = links if entry.is_symlink() else folders
                else:
                    kind = scan.files if entry.is_file() or entry.is_symlink() else scan.unused
            except OSError:  # a file, as far as anybody can tell: opening it says what is wrong with it
                kind = scan.files
            kind.append(path / entry.name)
    scan.files.sort()
    return scan


def stamp(path: str | os.PathLike) -> Stamp:
    """Times of change of a file or folder: of its content and, which copying tools cannot set, of its entry."""
    status = os.stat(path)
    return [status.st_mtime_ns, status.st_ctime_ns]


def report_unused(where: object, what: str, names: Sequence[str]) -> None:
    """Say once in a process what of somebody's files is not used, so that nothing is dropped without a word.

    `what` follows their number, such as "files are not used"; a few names are shown.
    """
    message = f"{where}: {len(names)} {what}: {first_names(names)}"
    if names and message not in _REPORTED:
        _REPORTED.add(message)
        log.warning("%s", message)


def first_names(names: Iterable[str]) -> str:
    """A few names, for messages."""
    names = list(names)
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")


def natural_key(text: str) -> list[tuple[int, int | str]]:
    """Sort key that puts `2.png` before `10.png`."""
    parts = re.split(r"(\d+)", text.lower())
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part]


def split_images(scan: Scan) -> tuple[list[Path], list[Path]]:
    """What is a picture by its extension, in natural order, and what else there is."""
    images = [path for path in scan.files if path.suffix.lower() in IMAGE_EXTENSIONS]
    others = [path for path in scan.files if path.suffix.lower() not in IMAGE_EXTENSIONS]
    images.sort(key=lambda path: natural_key(path.relative_to(scan.root).as_posix()))
    return images, others + scan.unused


def list_images(folder: str | os.PathLike) -> list[Path]:
    """Find pictures in a folder and its subfolders, linked ones included; files that are none are named in the log.

    Those with an extension in `IMAGE_EXTENSIONS`, in natural order of their path inside the folder, but for what
    `is_skipped`; from the cache if nothing changed since. UserError: it is no folder, or a folder in it cannot be read.
    """
    root = Path(folder)
    path = cache_path("folders", root)
    kept = read_cache(path)
    with suppress(OSError):  # a folder is gone
        if kept is not None and all(stamp(root / name) == times for name, times in kept["folders"].items()):
            report_unused(root, NO_IMAGES, kept["unused"])
            return [root / name for name in kept["files"]]
    scan = scan_folder(root)
    scan.check_readable()
    images, others = split_images(scan)
    unused = [path.relative_to(root).as_posix() for path in others]
    report_unused(root, NO_IMAGES, unused)
    stamps = {os.path.relpath(folder, root): times for folder, times in scan.folders.items()}
    latest = max((max(times) for times in stamps.values()), default=0)
    if len(images) >= MIN_FILES and time.time() - latest / 1e9 > SETTLED:
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
