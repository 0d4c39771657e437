"""How much memory a piece of work needs at its peak, beyond what was in use before it."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(work: Callable[[], object], device: torch.device) -> int | None:
    """Do the work and tell its peak, in bytes.

    Args:
        work: called once.
        device: CUDA: what torch allocates there; CPU: what the process holds, where Linux and glibc tell it.
    Returns:
        None on other devices and systems, where the work is not done.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not _start_counting():
        return None
    before = _resident("VmRSS")
    work()
    return max(_resident("VmHWM") - before, 0)


def held_memory(device: torch.device) -> int:
    """What torch holds on a CUDA device when nothing is left over, CUDA graphs' own memory included; else 0. Bytes."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


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
