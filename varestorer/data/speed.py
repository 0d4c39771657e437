"""How fast training pairs are made, and how many cores keep a training step fed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from varestorer.data.datasets import PhotoCrops
from varestorer.data.degradation import Degradation
from varestorer.data.loader import Batch, carry_out_plans, collate
from varestorer.utils.errors import UserError

WARM_UP = 4  # pairs that are not counted: files are read and memory is taken


@dataclass(frozen=True)
class LoaderSpeed:
    """Pairs per second of both ways of degrading.

    Attributes:
        crop: side of the pairs, pixels.
        workers: pairs a second one core makes when workers degrade.
        workers_device: pairs a second one core prepares when the device degrades.
        device: pairs a second the device then degrades.
        device_name: such as `cuda`.
    """

    crop: int
    workers: float
    workers_device: float
    device: float
    device_name: str

    def cores(self, pairs: int, seconds: float) -> tuple[int, int]:
        """Cores needed to feed steps of `pairs` pairs that take `seconds`: workers degrade, device degrades.

        The time that the device spends on degrading comes on top of a step's, and is not counted here.
        """
        wanted = pairs / seconds
        return math.ceil(wanted / self.workers), math.ceil(wanted / self.workers_device)

    def lines(self, pairs: int, seconds: float) -> list[str]:
        """A report for steps of `pairs` pairs that take `seconds`."""
        by_workers, by_device = self.cores(pairs, seconds)
        share = pairs / self.device / seconds
        return [
            f"pairs of {self.crop} x {self.crop}, a second and core:",
            f"  data.degrade_on=workers  {self.workers:8.1f}",
            f"  data.degrade_on=device   {self.workers_device:8.1f}, then {self.device:.1f} on {self.device_name}",
            f"to feed steps of {pairs} pairs in {seconds:g} s ({pairs / seconds:.1f} pairs a second):",
            f"  data.degrade_on=workers  {by_workers:5d} cores",
            f"  data.degrade_on=device   {by_device:5d} cores, and {share:.1%} more time a step",
        ]


def measure_loader(
    root: str | None = None,
    crop: int = 512,
    count: int = 64,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    degradation: Degradation | None = None,
) -> LoaderSpeed:
    """Make pairs in this process, on one thread, both ways.

    Photographs are decoded once and then cached, as in a small data set; with a folder that does not fit the cache
    decoding is part of what is measured.

    Args:
        root: folder of photographs; None: the embedded ones.
        crop: side of the pairs, pixels.
        count: pairs to measure.
        batch_size: of the device.
        device: that degrades in the second way.
        degradation: by default the published preset.
    Raises:
        UserError: no photographs, or fewer pairs than a batch.
    """
    if count < batch_size:
        raise UserError(f"count must be at least the batch size {batch_size}, got {count}")
    data = PhotoCrops(root, crop, degradation or Degradation(), seed=0, degrade_on="device")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        workers = _rate(lambda n: data[n], count)
        workers_device = _rate(lambda n: data.planned(n), count)
    finally:
        torch.set_num_threads(threads)
    return LoaderSpeed(crop, workers, workers_device, _device_rate(data, count, batch_size, device), str(device))


def _rate(make: Callable[[int], object], count: int) -> float:
    """Calls a second of processor time: what else the machine does is not counted, nor is waiting for files."""
    for n in range(WARM_UP):
        make(n)
    start = time.process_time()
    for n in range(WARM_UP, WARM_UP + count):
        make(n)
    return count / (time.process_time() - start)


def _device_rate(data: PhotoCrops, count: int, batch_size: int, device: torch.device | str) -> float:
    """Pairs a second that the device degrades, with the time to get them there."""
    batches = [collate([data.planned(n) for n in range(s, s + batch_size)]) for s in range(0, count, batch_size)]
    good = [batch for batch in batches if not isinstance(batch, UserError)]
    _degrade(good[0], device)
    start = time.perf_counter()
    for batch in good:
        _degrade(batch, device)
    return len(good) * batch_size / (time.perf_counter() - start)


def _degrade(batch: Batch, device: torch.device | str) -> None:
    """Degrade a batch and wait for it."""
    float(carry_out_plans(batch, device)["lq"].sum())


def loader_report(
    root: str | None = None,
    crop: int = 512,
    pairs: int = 32,
    seconds: float = 1.0,
    device: torch.device | str = "cpu",
) -> list[str]:
    """What `benchmark what=loader` prints.

    Args:
        root: folder of photographs; None: the embedded ones.
        crop: side of the pairs, pixels.
        pairs: of one optimiser step.
        seconds: that such a step takes.
        device: that trains.
    """
    return measure_loader(root, crop, device=device).lines(pairs, seconds)
