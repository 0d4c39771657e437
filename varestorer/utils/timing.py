"""The one clock: how long work takes on a device, alone or several variants of it in turns.

A GPU works behind the host's back, so it is asked by events in its own queue; elsewhere the host's clock is read when
the device has finished.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Mark = Any
"""A moment: a CUDA event, or seconds of the host's clock. Of use to the clock that made it only."""


@dataclass
class Timing:
    """How long a piece of work took each time.

    Attributes:
        seconds: in the order of measurement.
    """

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


class Clock:
    """Tells the time of a device.

    Args:
        device: whose work is timed.
    """

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

    def time(self, work: Callable[[], object]) -> float:
        """Seconds that a piece of work takes, on a device that has nothing else to do."""
        self.synchronize()
        start = self.mark()
        work()
        return self.between(start, self.mark())


def in_turns(
    variants: Mapping[str, Callable[[], object]], repeats: int, warmup: int, device: torch.device
) -> dict[str, Timing]:
    """Time variants in turns (A B A B), so that a machine's moods meet all of them.

    Args:
        variants: name -> work.
        repeats: how often each is timed, at least once.
        warmup: how often each runs before, without being timed.
        device: where they work.
    """
    clock = Clock(device)
    for work in variants.values():
        for _ in range(warmup):
            work()
    timings = {name: Timing() for name in variants}
    for _ in range(max(1, repeats)):
        for name, work in variants.items():
            timings[name].seconds.append(clock.time(work))
    return timings
