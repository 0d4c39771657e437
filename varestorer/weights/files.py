"""Reading tensors from files, and comparing them with what a module wants."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from varestorer.utils.errors import UserError

MAX_NAMES = 12


def read_tensors(path: str | Path, nested: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file or of a torch file (opened with `weights_only=True`).

    Args:
        path: the file.
        nested: keys under which a torch file may hold its state dict; the first that is there is followed.

    Raises:
        UserError: the file is missing, damaged, holds more than tensors, or has no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights not found: {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mmap = zipfile.is_zipfile(path)  # files older than torch 1.6 cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, SafetensorError, EOFError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read weights {path}: damaged, or it holds more than tensors ({reason})") from error
    for key in nested:
        content = content[key] if isinstance(content, Mapping) and key in content else content
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise UserError(f"no tensors in {path}: wanted a state dict")
    return tensors


def check_names_and_shapes(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Compare two sets of tensors by name and shape.

    Raises:
        UserError: naming what is missing, unexpected or misshapen.
    """
    missing = sorted(wanted.keys() - given.keys())
    unexpected = sorted(given.keys() - wanted.keys())
    misshapen = [
        f"{name} (wanted {tuple(wanted[name].shape)}, got {tuple(given[name].shape)})"
        for name in sorted(wanted.keys() & given.keys())
        if wanted[name].shape != given[name].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(problems.values()):
        parts = [f"{kind}: {_shorten(names)}" for kind, names in problems.items() if names]
        raise UserError(f"{source} does not fit the model; " + "; ".join(parts))


def _shorten(names: list[str]) -> str:
    shown = ", ".join(names[:MAX_NAMES])
    return shown if len(names) <= MAX_NAMES else f"{shown} and {len(names) - MAX_NAMES} more"
