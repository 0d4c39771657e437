"""How fast training pairs are made, and how many cores keep a training step fed."""

from __future__ import annotations

import math
import time

import torch

from varestorer.data.datasets import PhotoCrops
from varestorer.data.degradation import Degradation

WARM_UP = 4  # pairs that are not counted: files are read and memory is taken


def pairs_per_second(root: str | None = None, crop: int = 512, count: int = 64) -> float:
    """Training pairs that one core makes in a second, with the published degradation.

    Photographs are decoded once and then cached, as in a small data set; with a folder that does not fit the cache
    decoding is part of what is measured. It is a second of processor time: what else the machine does is not counted,
    nor is waiting for files.

    Args:
        root: folder of photographs; None: the embedded ones.
        crop: side of the pairs, pixels.
        count: pairs to measure.
    Raises:
        UserError: no photographs.
    """
    data = PhotoCrops(root, crop, Degradation(), seed=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for n in range(WARM_UP):
            data[n]
        start = time.process_time()
        for n in range(WARM_UP, WARM_UP + count):
            data[n]
        return count / (time.process_time() - start)
    finally:
        torch.set_num_threads(threads)


def loader_report(rate: float, crop: int, pairs: int, seconds: float) -> list[str]:
    """What `benchmark what=loader` prints.

    Args:
        rate: pairs of side `crop` that one core makes in a second.
        crop: pixels.
        pairs: of one optimiser step.
        seconds: that such a step takes.
    """
    wanted = pairs / seconds
    return [
        f"pairs of {crop} x {crop}, a second and core: {rate:.1f}",
        f"to feed steps of {pairs} pairs in {seconds:g} s ({wanted:.1f} pairs a second): "
        f"{math.ceil(wanted / rate)} cores",
    ]
