"""Choosing the device."""

import torch

from varestorer.utils.errors import UserError


def pick_device(name: str = "auto") -> torch.device:
    """Turn the `device` option into a device that is there.

    Args:
        name: `auto` (CUDA, else Apple's MPS, else CPU), `cpu`, `cuda`, `cuda:1` or `mps`.
    Raises:
        UserError: unknown name, or a device that this machine or this build of torch does not have.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not number.isdigit()):
        raise UserError(f"device must be auto, cpu, cuda, cuda:N or mps, got {name!r}")
    if kind == "mps" and not has_mps:
        raise UserError("device=mps, but torch sees no Apple GPU; use device=cpu or device=auto")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"device={name}, but torch sees {count} CUDA devices; use device=cpu or device=auto")
    return torch.device(name)
