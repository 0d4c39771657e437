"""Data workers that die, or that cannot hand over what they made, end a command with the remedy: nobody waits for ever.

torch notices a worker that died. It does not notice one that lives and gives nothing: where shared memory is full, for
one, the error is printed by a thread of the worker and the batch is lost (`_end_worker`), and a worker may be stopped,
or wait for a lock (`_Patience`).
"""

from __future__ import annotations

import logging
import multiprocessing.queues
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from varestorer.utils.errors import UserError, reason
from varestorer.utils.seeds import torch_generator

log = logging.getLogger(__name__)

POLL = 5.0  # seconds between two looks at workers that give nothing
STALLED = 45.0  # seconds without a batch in which no worker did anything
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
TICKS = 20  # of 10 ms that a worker may use up in these seconds for looking whether there is work
EX_IOERR = 74


class StopWaitingError(Exception):
    """The caller wants to stop, and the workers give nothing at present."""


def worker_options(num_workers: int, prepare: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Arguments of a DataLoader whose batches are to be `watched`; `prepare` gets each worker's number in it."""
    if num_workers == 0:
        return {"num_workers": 0}
    return {"num_workers": num_workers, "timeout": POLL, "worker_init_fn": partial(_start_worker, prepare)}


class ErrorsAsValues(Dataset[Any]):
    """Hands a UserError over as a value: torch would bury its message in the worker's traceback."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, n: int) -> Any:
        try:
            return self.dataset[n]
        except UserError as error:
            return error


def in_turn(dataset: Any, num_workers: int, key: str) -> Iterator[Any]:
    """The items of a data set as workers make them, `watched`; a UserError comes as a value."""
    # without a generator torch draws the workers' seed from the global one
    options = {"generator": torch_generator(0, "workers"), **worker_options(num_workers, None)}
    return watched(DataLoader(ErrorsAsValues(dataset), batch_size=None, **options).__iter__, key)


def watched(
    start: Callable[[], Iterator[Any]], key: str, wants_stop: Callable[[], bool] = lambda: False
) -> Iterator[Any]:
    """Start the workers of a DataLoader now, and iterate over what they make.

    `start` is the loader's own `__iter__`, which was made with `worker_options`; the key of the config says how many
    workers there are; `wants_stop` is asked while they give nothing. UserError: they cannot be started, died, or have
    given nothing for `STALLED` seconds without working. StopWaitingError: `wants_stop`.
    """
    try:
        batches = start()
    except OSError as error:
        raise _unusable(f"they cannot be started: {reason(error)}", key) from error
    return _watched(batches, key, wants_stop)


@contextmanager
def deaths_explained(key: str) -> Iterator[None]:
    """Around all that uses a loader: torch may report that a worker died (UserError) in the middle of other work."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise _unusable(str(error), key) from error


def _watched(batches: Iterator[Any], key: str, wants_stop: Callable[[], bool]) -> Iterator[Any]:
    workers: Sequence[BaseProcess] = getattr(batches, "_workers", ())
    patience = _Patience(workers)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            text = str(error)
            if text.startswith("Caught "):  # by the worker, in what it was to make
                raise
            if not text.startswith("DataLoader timed out"):
                raise _unusable(text or type(error).__name__, key) from error
            if wants_stop():
                _end(workers)
                raise StopWaitingError from None
            if patience.is_over():
                _end(workers)
                raise _unusable(f"they gave and did nothing for {STALLED:.0f} s", key) from error
            continue
        patience.renew()
        yield batch


class _Patience:
    """How long to wait: as long as a worker uses a processor or waits for a disk, and `STALLED` seconds beyond.

    Seconds are counted by looks at the workers, as a job that is put to sleep must not wake up without patience.
    """

    def __init__(self, workers: Sequence[BaseProcess]) -> None:
        self.workers = workers
        self.ticks = [0] * len(workers)
        self.renew()

    def renew(self) -> None:
        """A batch came."""
        self.looks = 0

    def is_over(self) -> bool:
        """Whether to give up, asked every `POLL` seconds; never where the system does not say what workers do."""
        found = [_state(worker.pid) for worker in self.workers]
        states = [state for state in found if state is not None]
        if len(states) < len(found):
            return False
        ticks = [used for _, used in states]
        is_busy = any(now - then > TICKS for now, then in zip(ticks, self.ticks, strict=True))
        if self.looks == 0 or is_busy or any(kind == "D" for kind, _ in states):
            self.ticks, self.looks = ticks, 0
        self.looks += 1
        return self.looks * POLL > STALLED


def _state(pid: int | None) -> tuple[str, int] | None:
    """What Linux says of a process: its state (D: waits for a disk), and the processor time it used, in ticks."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return fields[0], int(fields[11]) + int(fields[12])
    except (OSError, ValueError, IndexError):
        return None


def _end(workers: Sequence[BaseProcess]) -> None:
    """End workers whatever they do: a stopped one heeds nothing else, and Python waits for it at its own end."""
    for worker in workers:
        with suppress(RuntimeError):  # torch's word on their death
            worker.kill()
            worker.join(POLL)


def _unusable(reason: str, key: str) -> UserError:
    memory = ""
    if SHARED_MEMORY.is_dir():
        usage = shutil.disk_usage(SHARED_MEMORY)
        memory = f" ({SHARED_MEMORY} has {usage.free / 1e6:.0f} of {usage.total / 1e6:.0f} MB free)"
    return UserError(
        f"the data workers failed: {' '.join(reason.split())}. They hand over batches through shared memory{memory}: "
        f"make it larger (docker run --shm-size=8g), look whether memory ran out, or set {key}=0"
    )


def _start_worker(prepare: Callable[[int], None] | None, number: int) -> None:
    """What a worker does first."""
    # Python prints such an error, goes on, and the batch never comes
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]
    if prepare is not None:
        prepare(number)


def _end_worker(error: BaseException, batch: object) -> None:
    """End a worker that cannot hand over a batch: torch notices that at once."""
    os.write(2, f"a data worker cannot hand over what it made: {' '.join(str(error).split())}\n".encode())
    os._exit(EX_IOERR)
