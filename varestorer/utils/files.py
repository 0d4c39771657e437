"""Files: what tells one from another, and writing them so that a reader never meets half of one."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from varestorer.utils.errors import UserError, reason


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes: what identifies it wherever something is reused because it was done before.

    Times do not: unzip, `cp -p` and `rsync -a` put an older file in the place of another, and a backup by hard links
    changes the time of an entry whose content stays.

    Raises:
        UserError: it cannot be read, or is no regular file; names it.
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

    The temporary name keeps the suffix, for writers that choose the format by it. Parent folders are made.
    When the block fails the temporary file is removed and an older file at `path` stays as it was.

    Raises:
        UserError: the file cannot be written (no permission, disk full, ...); names the path.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, target)
    except BaseException as error:
        _remove(temporary)
        # torch and safetensors report a full disk as errors of their own, with the system's words in them
        if isinstance(error, OSError) or "No space left on device" in str(error):
            raise UserError(f"cannot write {target}: {reason(error)}; check the folder and its free space") from error
        raise


def _remove(path: Path) -> None:
    """Remove a file if it can be removed: the error that led here matters more than the leftover."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return
