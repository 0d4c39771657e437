"""Writing files so that a reader never meets half of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from varestorer.utils.errors import UserError, reason


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
