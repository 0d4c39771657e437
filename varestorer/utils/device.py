"""Choosing the device, what suits it, and the memory that work takes."""

import ctypes
import gc
import os
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from varestorer.utils.errors import UsageError, UserError

CPUINFO = Path("/proc/cpuinfo")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def pick_device(name: str = "auto") -> torch.device:
    """Turn `auto` (CUDA, else Apple's MPS, else CPU), `cpu`, `cuda`, `cuda:1` or `mps` into a device that is there.

    UsageError: unknown name. UserError: a device that this machine or this build of torch does not have.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]+)?", name):
        raise UsageError(f"device must be auto, cpu, cuda, cuda:N or mps, got device={name}")
    kind, _, number = name.partition(":")
    if kind == "mps" and not has_mps:
        raise UserError("device=mps, but torch sees no Apple GPU; use device=cpu or device=auto")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"device={name}, but torch sees {count} CUDA devices; use device=cpu or device=auto")
    return torch.device(name)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, through pinned memory between host and GPU; on the host its values are there at once."""
    kinds = x.device.type, device.type
    if kinds == ("cpu", "cuda"):
        return x.pin_memory().to(device, non_blocking=True)
    if kinds == ("cuda", "cpu"):
        return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x)
    return x.to(device)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was too little, of the host or a device; on the CPU torch says so in a plain RuntimeError."""
    words = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


def free_memory(device: torch.device) -> None:
    """Give back what torch keeps of a device for later."""
    gc.collect()
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


def gains_from_bf16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 on a device.

    They are on NVIDIA GPUs from Ampere on, and on x86 processors with instructions for it: the small model restores a
    picture 1.96 times as fast with matrix units (AMX), 1.8 times with AVX512_BF16 alone (measured). Without either they
    are emulated.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and has_bf16_products()


def has_bf16_products() -> bool:
    """Whether torch makes products in bfloat16 by the processor's own instructions."""
    return torch.backends.mkldnn.is_available() and "avx512_bf16" in processor_flags()


def has_amx() -> bool:
    """Whether the processor has matrix units for bfloat16 (AMX)."""
    return "amx_bf16" in processor_flags()


def limit_threads() -> None:
    """Let torch use no more threads than this process has cores; more of them wait for each other."""
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))


def usable_cores() -> int:
    """Cores that this process may use: those that it is bound to, and no more than its container's quota of time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text(encoding="utf-8").split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no container, no limit ("max"), or an older form of both
        return cores


def cpuinfo(field: str) -> str:
    """What Linux tells of the processor; empty where it does not."""
    try:
        found = re.search(rf"^{field}\s*:(.*)$", CPUINFO.read_text(encoding="utf-8"), flags=re.MULTILINE)
    except OSError:
        return ""
    return found[1].strip() if found else ""


@lru_cache(maxsize=1)
def processor_flags() -> set[str]:
    """Instruction sets of the processor by Linux's names; empty where Linux does not tell."""
    return set(cpuinfo("flags").split())


def parse_memory(text: str) -> int:
    """Bytes of "6G", "1.5G" or "800M" (of 1024; GB and GiB are taken for G); ValueError for other texts."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), flags=re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ValueError(f"wanted a size such as 6G or 800M, got {text!r}")
    return int(float(found[1]) * UNITS[found[2].upper()])


def memory_in_use(device: torch.device) -> int | None:
    """What the process holds on the host, or torch on a CUDA device, after giving back what is free; None: unknown."""
    if device.type == "cuda":
        gc.collect()
        return torch.cuda.memory_allocated(device)
    return _resident("VmRSS") if device.type == "cpu" and _start_counting() else None


def peak_memory(work: Callable[[], object], device: torch.device) -> int | None:
    """Do the work once and tell the most that it held beyond what was in use before it, in bytes.

    CUDA: what torch allocates there; CPU: what the process holds, where Linux and glibc tell it. None elsewhere.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    is_told = device.type == "cpu" and _start_counting()
    before = _resident("VmRSS") if is_told else 0
    work()
    return max(_resident("VmHWM") - before, 0) if is_told else None


def _start_counting() -> bool:
    """Give freed memory back to the system and set the process's peak to what it holds now."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        RESET.write_text("5")
    except (OSError, AttributeError):
        return False
    return STATUS.is_file()


def _resident(name: str) -> int:
    """A size from the process's status, bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
