"""Choosing the device."""

import re

import torch

from varestorer.utils.errors import UsageError, UserError


def pick_device(name: str = "auto") -> torch.device:
    """Turn the `device` option into a device that is there.

    Args:
        name: `auto` (CUDA, else Apple's MPS, else CPU), `cpu`, `cuda`, `cuda:1` or `mps`.
    Raises:
        UsageError: unknown name.
        UserError: a device that this machine or this build of torch does not have.
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
