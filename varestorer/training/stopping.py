"""Signals that ask a run to stop: a time limit or preemption of Slurm, `kill`."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(signal.Signals[name] for name in NAMES if name in signal.Signals.__members__)  # Windows has fewer
ECHO_SECONDS = 1.0  # launchers pass signals on, so that one signal can come twice


class StopRequest:
    """Remembers which of `SIGNALS` came, so that training can save a checkpoint before it ends.

    The same signal again, later than its echoes come, ends the process at once.

    Attributes:
        received: the signals so far, in order.
    """

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self._first = 0.0
        self._handlers_before: dict[int, Any] = {}

    @property
    def exit_status(self) -> int:
        """128 + the first signal, as a shell reports a process that ended by it: 143, 138 or 140.

        SIGTERM's where another process of the run was told to stop.
        """
        return 128 + int(self.received[0] if self.received else signal.SIGTERM)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of the signals for the length of a `with` block; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._handlers_before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in self._handlers_before.items():
                signal.signal(number, handler)

    def pass_on(self) -> None:
        """Call the handlers that were there before: a launcher such as submitit puts the job in the queue again."""
        for number in self.received:
            handler = self._handlers_before.get(number)
            if callable(handler):
                handler(number, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number in self.received and now - self._first > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.received:
            self._first = now
            # a logger must not be called here: the signal may have come in the middle of its work
            os.write(2, f"\n{signal.Signals(number).name}: saving a checkpoint after this step, then ending\n".encode())
        self.received.append(signal.Signals(number))


class StoppedError(Exception):
    """A checkpoint was saved because a signal asked the run to stop; says where."""


@contextmanager
def held_back() -> Iterator[None]:
    """Let `SIGNALS` wait for the length of a `with` block; processes started in it never get them in any thread.

    Data workers have native threads before `leave_signals_to_parent` is called in them: these must not get one either.
    """
    if sys.platform != "linux":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(worker: int) -> None:
    """For data workers: of `SIGNALS` only those count that the training process sends.

    A signal to a whole job would end its workers in the middle of a step, and the training process with them.
    """
    if sys.platform == "linux":  # elsewhere nobody says who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=_end_for_parent, daemon=True).start()


def _end_for_parent() -> None:
    parent = multiprocessing.parent_process()
    while sys.platform == "linux":
        if parent is None or signal.sigwaitinfo(SIGNALS).si_pid == parent.pid:
            os._exit(0)
