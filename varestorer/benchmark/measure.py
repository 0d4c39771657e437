"""How long work takes on a device, part by part, several variants in turns, and how much memory it needs.

A GPU works behind the host's back, so it is asked by events in its own queue; elsewhere the host's clock is read when
the device has finished.
"""

from __future__ import annotations

import gc
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from varestorer.utils.device import peak_memory
from varestorer.utils.errors import reason
from varestorer.utils.watch import observed

LOG = logging.getLogger(__name__)
REST = "the rest"

Mark = Any
"""A moment: a CUDA event, or seconds of the host's clock. Of use to the clock that made it only."""
Work = Callable[[], object]


@dataclass
class Timing:
    """How long a piece of work took each time, in seconds."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance from the lower to the upper quartile, seconds; 0 of a single measurement."""
        if len(self.seconds) < 2:
            return 0.0
        lower, _, upper = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return upper - lower


@dataclass
class Measured:
    """What a piece of work took."""

    whole: Timing = field(default_factory=Timing)
    parts: dict[str, Timing] = field(default_factory=dict)  # in the order of the work; what no part holds is `REST`
    peak_bytes: int | None = None  # beyond what is there between runs; None where it cannot be told


class Clock:
    """Tells the time of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronize(self) -> None:
        """Wait until the device has finished what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def mark(self) -> Mark:
        """This moment in the device's queue; on CUDA the host does not wait for it."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        self.synchronize()
        return time.perf_counter()

    def between(self, start: Mark, end: Mark) -> float:
        """Seconds from one mark to a later one; waits for it."""
        if self.device.type == "cuda":
            end.synchronize()
            return float(start.elapsed_time(end)) / 1000
        return float(end - start)

    def time(self, work: Work) -> float:
        """Seconds that a piece of work takes, on a device that has nothing else to do."""
        self.synchronize()
        start = self.mark()
        work()
        return self.between(start, self.mark())


class Meter:
    """Reads an instrument (a clock, a counter) when a part begins and when it ends."""

    def __init__(self, read: Callable[[], Mark]) -> None:
        self._read = read
        self._readings: list[tuple[str, Mark, Mark]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = self._read()
        yield
        self._readings.append((part, start, self._read()))

    def sums(self, whole: float, between: Callable[[Mark, Mark], Any] = lambda start, end: end - start) -> dict:
        """What each part took, in the order in which they ended first, and what is left of the whole."""
        found: dict[str, Any] = {}
        for part, start, end in self._readings:
            found[part] = found.get(part, 0) + between(start, end)
        return found | {REST: whole - sum(found.values())}


def measure(
    works: Mapping[str, Work],
    repeats: int,
    warmup: int,
    device: torch.device,
    most_seconds: float = math.inf,
    told: Callable[[str, float], object] = lambda name, seconds: None,
) -> dict[str, Measured]:
    """Time works in turns (A B A B), so that a machine's moods meet all of them.

    Each is run `warmup` times untimed (once at least), in which compilers and caches do their part, then `repeats`
    times; no turn begins later than `most_seconds`, but for one of each work. `told` is called with the name of a work
    and the seconds of its first run, as soon as they are known. A work that fails, for want of memory or of a
    compiler's support, is left out with a warning.
    """
    clock, found, start = Clock(device), {}, time.monotonic()

    def warm_up(name: str, work: Work) -> int | None:
        """Make the untimed runs, which nobody watches (a CUDA graph is recorded in one); returns the peak memory."""
        seconds: list[float] = []
        peak, before, left = None, held_memory(device), 0
        while len(seconds) < max(1, warmup) and (not seconds or time.monotonic() - start < most_seconds):
            peak = peak_memory(lambda: seconds.append(clock.time(work)), device)
            if len(seconds) == 1:
                told(name, seconds[0])
                left = held_memory(device) - before  # such as the memory of CUDA graphs
        return peak if peak is None or len(seconds) == 1 else left + peak  # that of a first run holds what it leaves

    for name, work in works.items():
        try:
            found[name] = Measured(peak_bytes=warm_up(name, work))
        except RuntimeError as error:  # out of memory, a kernel that cannot be compiled, a graph not recorded
            LOG.warning("%s is not measured: %s", name, reason(error))
    for turn in range(max(1, repeats)):
        if turn and time.monotonic() - start > most_seconds:
            break
        for name, measured in found.items():
            meter = Meter(clock.mark)
            with observed(meter):
                seconds = clock.time(works[name])
            measured.whole.seconds.append(seconds)
            for part, value in meter.sums(seconds, clock.between).items():
                measured.parts.setdefault(part, Timing()).seconds.append(value)
    return found


def held_memory(device: torch.device) -> int:
    """What torch holds on a CUDA device when nothing is left over, CUDA graphs' own memory included; else 0. Bytes."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)
