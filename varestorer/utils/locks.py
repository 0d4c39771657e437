"""One writer at a time in a folder, also among machines that share its disk."""

import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from varestorer.utils.errors import UserError, reason

log = logging.getLogger(__name__)

LOCK = ".varestorer.lock"
WAIT = 0.05  # seconds between two tries
BUSY = (errno.EAGAIN, errno.EACCES)


@contextmanager
def locked(folder: Path, wait: float = 0) -> Iterator[None]:
    """Keep the folder for this process; the system lets go of it however the process ends.

    The folder is made, and removed again if nothing is written into it. A file in it carries the lock, and is removed
    at the end. Where the file system knows no locks a warning says so and the work goes on.

    `wait` is how many seconds another process that has it is waited for. UserError: another process has it, or it
    cannot be written.
    """
    path, is_new = folder / LOCK, not folder.exists()
    handle = _taken(path, time.monotonic() + wait)
    try:
        yield
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)  # while it is ours
            fcntl.flock(handle, fcntl.LOCK_UN)  # workers that were forked meanwhile hold the file too
            os.close(handle)
        if is_new:
            with suppress(OSError):  # something was written into it
                folder.rmdir()


def _taken(path: Path, until: float) -> int | None:
    """The open lock file; None where there are no locks."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"cannot write to {path.parent}: {reason(error)}; give another folder") from error
        try:
            if fcntl is None:
                raise OSError(errno.ENOLCK, "the system has none")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in BUSY:
                os.close(handle)
                path.unlink(missing_ok=True)
                why = reason(error)
                log.warning("no locks in %s (%s): start no second command that writes there", path.parent, why)
                return None
            if time.monotonic() > until:
                holder = os.read(handle, 200).decode(errors="replace")
                os.close(handle)
                raise UserError(
                    f"{path.parent} is being written by another command ({holder or 'just started'}); wait for it, or "
                    "give another folder"
                ) from error
            os.close(handle)
            time.sleep(WAIT)
            continue
        with suppress(FileNotFoundError):  # or another's: the one before removed it between our opening and locking
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                os.truncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return handle
        os.close(handle)
