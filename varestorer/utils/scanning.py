"""What a user's folder holds: the one walk through it, and the one rule of what is skipped there."""

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from varestorer.utils.errors import UserError

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

Stamp = list[int]


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
        """Refuse a folder of which a part is not seen: what is made of the rest would look whole.

        Raises:
            UserError: names folders that cannot be read.
        """
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
    """Look through a folder and its subfolders, linked ones included; links are followed last, each folder read once.

    Raises:
        UserError: it is no folder.
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
        for entry in entries:
            if not is_skipped(entry.name):
                _kind_of(entry, scan, folders, links).append(path / entry.name)
    scan.files.sort()
    return scan


def stamp(path: str | os.PathLike) -> Stamp:
    """Times of change of a file or folder: of its content and, which copying tools cannot set, of its entry."""
    status = os.stat(path)
    return [status.st_mtime_ns, status.st_ctime_ns]


def report_unused(where: object, what: str, names: Sequence[str]) -> None:
    """Say once in a process what of somebody's files is not used, so that nothing is dropped without a word.

    Args:
        where: the folder.
        what: is said of how many of them, such as "files are not used".
        names: of all; a few are shown.
    """
    message = f"{where}: {len(names)} {what}: {first_names(names)}"
    if names and message not in _REPORTED:
        _REPORTED.add(message)
        log.warning("%s", message)


def first_names(names: Iterable[str]) -> str:
    """A few names, for messages."""
    names = list(names)
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")


_REPORTED: set[str] = set()  # every stage of a run lists its photographs again


def _kind_of(entry: os.DirEntry[str], scan: Scan, folders: list[Path], links: list[Path]) -> list[Path]:
    """The list that an entry belongs to."""
    try:
        if entry.is_dir():
            return links if entry.is_symlink() else folders
        return scan.files if entry.is_file() or entry.is_symlink() else scan.unused
    except OSError:  # a file, as far as anybody can tell: opening it says what is wrong with it
        return scan.files
