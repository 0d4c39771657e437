"""How much memory a piece of work holds at its peak."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_memory(text: str) -> int:
    """Bytes of "6G", "1.5G" or "800M" (of 1024; GB and GiB are taken for G).

    Raises:
        ValueError: no such text.
    """
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
    """Do the work and tell the most that it held beyond what was in use before it, in bytes.

    Args:
        work: called once.
        device: CUDA: what torch allocates there; CPU: what the process holds, where Linux and glibc tell it.
    Returns:
        None on other devices and systems.
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
