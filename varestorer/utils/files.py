"""Files: what tells one from another, and writing them so that a reader never meets half of one, under any name.

File names are bytes. Python holds those that are not UTF-8 as lone surrogates, which no encoder takes: texts are
written with `\\udcf1` for them. In JSON that is the escape that gives the same name back.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from varestorer.utils.errors import UsageError, UserError, reason

NAME_BYTES = 255  # of a file's name on all common file systems
ROOM = "check the folder and its free space"
MAX_SUFFIX = 16  # letters; a longer one chooses no format
SHOWN = 40  # letters of a name in that of its temporary file, at most four bytes each


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes: what identifies it wherever something is reused because it was done before.

    Times do not: unzip, `cp -p` and `rsync -a` put an older file in the place of another, and a backup by hard links
    changes the time of an entry whose content stays. UserError: it cannot be read, or is no regular file; names it.
    """
    path = Path(path)
    try:
        if not path.is_file():  # reading from a pipe would wait for ever
            problem = "it is no regular file" if path.exists() else "no such file"
            raise UserError(f"cannot read {path}: {problem}; give a file")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; make it readable or remove it") from error


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it onto `path` when the block ends well.

    The temporary name keeps the suffix, for writers that choose the format by it. Parent folders are made. When the
    block fails the temporary file is removed and an older file at `path` stays as it was. UserError: the file cannot be
    written (no permission, disk full, ...); names the path.
    """
    target = Path(path)
    temporary = temporary_path(target)
    try:
        with writing_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):  # the error that led here matters more than the leftover
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path, overwrite: bool = False, remedy: str = ROOM) -> Iterator[Path]:
    """As `atomic_write` for a folder; one with something in it is replaced only if `overwrite` says so."""
    temporary = temporary_path(path)
    try:
        with writing_errors(path, remedy):
            temporary.mkdir(parents=True)
            yield temporary
            if overwrite:
                shutil.rmtree(path, ignore_errors=True)
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writing_errors(target: Path, remedy: str = ROOM) -> Iterator[None]:
    """Turn an error of writing, such as a full disk, into a UserError that names the path and the remedy."""
    try:
        yield
    except Exception as error:
        # torch and safetensors report a full disk as errors of their own, with the system's words in them
        if isinstance(error, OSError) or "No space left on device" in str(error):
            raise UserError(f"cannot write {target}: {reason(error)}; {remedy}") from error
        raise


def temporary_path(target: Path) -> Path:
    """A name beside `target` that no other process has, on this machine or another one that shares the disk.

    It begins like the target's name and keeps its suffix, but is never too long.
    """
    suffix = target.suffix if len(target.suffix) <= MAX_SUFFIX else ""
    return target.with_name(f".{target.stem[:SHOWN]}.{secrets.token_hex(8)}.tmp{suffix}")


def sync(path: Path) -> None:
    """Ask the system to put a file or a folder's entries on the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text as UTF-8, whole or not at all; UserError, with the path, if it cannot be written."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(printable(text).encode())


def write_json(path: str | os.PathLike, content: Any, indent: int | None = None) -> None:
    """Write a JSON file, letters as they are; reading it gives the same texts, those that are not UTF-8 too.

    UserError, with the path, if it cannot be written.
    """
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def read_text(path: str | os.PathLike) -> str:
    """A text in UTF-8, without the mark (BOM) that some editors put in front of it."""
    return Path(path).read_text(encoding="utf-8-sig")


@contextmanager
def utf8_path(path: Path) -> Iterator[Path]:
    """A path for libraries that take no other names (safetensors, torch's mapped files): itself, or a link to it."""
    if printable(str(path)) == str(path):
        yield path
        return
    with TemporaryDirectory(prefix="varestorer-") as folder:
        link = Path(folder, f"file{path.suffix}")
        link.symlink_to(path.absolute())
        yield link


def printable(text: str) -> str:
    r"""A text that every UTF-8 encoder takes: bytes of file names that are not UTF-8 as `\udcf1`."""
    return text.encode("utf-8", errors="backslashreplace").decode()


def original_name(text: str) -> str:
    """The file name of which `printable` made the text."""
    return re.sub(r"\\u(dc[89a-f][0-9a-f])", lambda found: chr(int(found[1], 16)), text)


def name_bytes(name: str) -> bytes:
    """The bytes of a file name, the same in every locale: for hashes and lengths."""
    return name.encode("utf-8", errors="surrogateescape")


def fitting_name(name: str, ending: str) -> str:
    """`name` + `ending`, where the last part of the path is shortened if no file system would take its length.

    What is cut off is replaced by a hash of it, so that different names stay different.
    """
    folder, slash, base = name.rpartition("/")
    if len(name_bytes(base + ending)) > NAME_BYTES:
        mark = f"~{hashlib.sha256(name_bytes(base)).hexdigest()[:8]}"
        room = NAME_BYTES - len(mark + ending)
        while len(name_bytes(base)) > room:
            base = base[:-1]
        base += mark
    return f"{folder}{slash}{base}{ending}"


def expand_user(path: str | os.PathLike) -> Path:
    """A path with the user's folder for `~`; a name that only begins with `~` stays.

    UsageError: nothing says what the user's folder is (a container without HOME).
    """
    given = Path(path)
    try:
        return given.expanduser()
    except RuntimeError as error:
        if given.parts[0] == "~":
            raise UsageError(f"{path}: no home folder is known here (HOME is not set); write the whole path") from error
        return given  # no user is called so


def check_writable(folder: Path, key: str) -> None:
    """Refuse a folder that cannot be written before anything is computed for it; leaves nothing behind.

    UserError, naming the option `key`: neither it nor the nearest folder around it can be written.
    """
    place = folder.absolute()
    try:
        while not place.exists():
            place = place.parent
        probe = temporary_path(place / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = f"{error.strerror or error} ({place})"
        raise UserError(f"cannot write {key}={folder}: {reason}; give another folder") from error


def check_room(folder: Path, size: int) -> None:
    """Refuse to write more than fits: a UserError that says what is free and what is wanted."""
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if size > free:
        raise UserError(
            f"{folder} has {in_bytes(free)} free, and {in_bytes(size)} are wanted; make room, or name another place "
            "(HF_HOME, VARESTORER_CACHE)"
        )


def in_bytes(size: int) -> str:
    """A size for people: 8.9 GB, 436 MB, 12 kB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} bytes"


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
