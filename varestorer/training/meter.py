"""How fast a run goes and how much memory it takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

# dense bfloat16 operations per second, from the makers' data sheets; the first name that fits counts
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


class Meter:
    """Measures the steps of one stage in this process.

    Model FLOPs utilization (MFU) is given on devices of `PEAK_FLOPS`: the operations of the first micro-batch's forward
    and backward pass as torch counts them (matrix products, convolutions, attention; activations computed again count
    again), over the time they take and the device's bfloat16 peak, whatever the precision. Images per second stand for
    tokens per second too: every image of a stage has the same number of tokens.
    """

    def __init__(self, device: torch.device, samples: int, micro_batches: int) -> None:
        """Start at no steps.

        Args:
            device: of the training.
            samples: per optimizer step, over all processes.
            micro_batches: per optimizer step and process.
        """
        self._device = device
        self._samples = samples
        self._micro_batches = micro_batches
        self._peak = _peak_flops(device)
        self._flops: int | None = None  # of a micro-batch
        self._began = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._began = time.perf_counter()

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Count the operations of a forward and backward pass, once, where they are of use; that step is slower."""
        if self._peak is None or self._flops is not None:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self._flops = counter.get_total_flops()

    def end(self) -> dict[str, float]:
        """A step ends, once its numbers are known: `images_per_second`, `memory_gb` and, where known, `mfu`.

        `memory_gb` is the most that the device's tensors, or on the CPU this process, took so far (10^9 bytes).
        """
        seconds = time.perf_counter() - self._began
        values = {"images_per_second": self._samples / seconds, "memory_gb": peak_memory(self._device) / 1e9}
        if self._peak is not None and self._flops is not None:
            values["mfu"] = self._flops * self._micro_batches / seconds / self._peak
        return values


def _peak_flops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Bytes that tensors on a GPU took at most, or this process on a CPU (0 where the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest
