"""What a device can do at best, measured: products of matrices and copies; and what it is called.

A share of a rate measured in the same run says more than one of a data sheet: it holds the clocks, the power limit and
the neighbors of that run.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version

import torch

from varestorer.benchmark.counting import Count
from varestorer.benchmark.measure import Clock, Work
from varestorer.utils.device import cpuinfo
from varestorer.utils.seeds import torch_generator

MATRIX_SIDES = {"cuda": (4096, 8192), "mps": (2048, 4096), "cpu": (512, 1024)}
COPY_BYTES = {"cuda": 2**30, "mps": 2**28, "cpu": 2**26}
REPEATS, WARMUP = 10, 3
LIBRARIES = ("torch", "torchvision", "transformers", "accelerate", "spandrel", "pillow", "numpy")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Rates:
    """What a device does at best."""

    matrix: dict[str, float]  # precision -> floating-point operations a second of products of matrices
    copy: float  # bytes a second, read and written ones together

    @classmethod
    def of(cls, device: torch.device, precisions: Iterable[str]) -> Rates:
        """Measure the rates of a device."""
        named = dict.fromkeys(["fp32", *precisions])
        return cls({name: matrix_rate(device, DTYPES[name]) for name in named}, copy_bandwidth(device))

    def floor(self, cost: Count, precision: str) -> float:
        """The least seconds of a part: its operations at the rate of products, or its bytes at that of copies.

        Only products of matrices and convolutions count as operations, so a part of norms and activations, or of many
        small launches, stands well above its floor.
        """
        return max(cost.flops / self.matrix[precision], cost.bytes / self.copy)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the fastest product of square matrices, of two sizes.

    The device is taken as it is: float32 on CUDA follows torch's setting for TF32. That of convolutions is another, so
    they may exceed this rate.
    """
    rates = []
    for side in MATRIX_SIDES.get(device.type, MATRIX_SIDES["cpu"]):
        generator = torch_generator(0, "matrix rate", device=device)
        left, right = torch.randn(2, side, side, generator=generator, device=device).to(dtype)
        out = torch.empty_like(left)
        rates.append(2 * side**3 / _least(lambda a=left, b=right, out=out: torch.mm(a, b, out=out), device))  # type: ignore[misc]
    return max(rates)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of the fastest copy from memory to memory of a device, read and written ones together."""
    size = COPY_BYTES.get(device.type, COPY_BYTES["cpu"])
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * size / _least(lambda: target.copy_(source), device)


def _least(work: Work, device: torch.device) -> float:
    """Seconds of the fastest of several runs."""
    clock = Clock(device)
    return min([clock.time(work) for _ in range(WARMUP + REPEATS)][WARMUP:])


def device_description(device: torch.device) -> str:
    """The device in a few words, such as `NVIDIA H200 (139.8 GiB, 132 multiprocessors)`."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return f"{found.name} ({found.total_memory / 2**30:.1f} GiB, {found.multi_processor_count} multiprocessors)"
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    processor = cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{processor} ({threads})" if device.type == "cpu" else f"Apple GPU ({platform.machine()})"


def library_versions() -> dict[str, str]:
    """Versions of Python, of CUDA where it can be used, and of the libraries that do the work."""
    found = {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found
