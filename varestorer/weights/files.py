"""Tensors from files and into files, and comparing them with what is wanted."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from varestorer.utils.errors import UsageError, UserError, reason
from varestorer.utils.files import atomic_write, utf8_path
from varestorer.utils.finite import check_weights

Content = TypeVar("Content")

MAX_NAMES = 12
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WRAPPER = "module."  # before every name where a network was saved inside DataParallel

NESTED = ("vae", "state_dict", "trainer", "var_wo_ddp", "vae_local")
SAFETENSORS_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Differences:
    """What sets two collections of tensors apart, each list in the order of the names."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        """The first names of each list and how many there are; empty where there are none."""
        lists = {"missing": self.missing, "unexpected": self.unexpected, "misshapen": self.misshapen}
        more = {kind: f" and {len(names) - MAX_NAMES} more" * (len(names) > MAX_NAMES) for kind, names in lists.items()}
        told = {kind: ", ".join(names[:MAX_NAMES]) + more[kind] for kind, names in lists.items() if names}
        return "; ".join(f"{len(lists[kind])} {kind}: {names}" for kind, names in told.items())


def read_tensors(path: str | Path, nested: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file or of a torch file (opened with `weights_only=True`), mapped into memory.

    `nested` are keys under which a torch file may hold its state dict; each that is there is followed, in turn. The
    prefix `module.` is taken off where every name has it. UserError: the file is missing, damaged, holds more than
    tensors, has no tensors, some that are not finite, or some of a kind that nothing here computes with.
    """
    path = Path(path)
    if path.suffix.lower() == ".safetensors":
        tensors = _read_safetensors(path, load_file)
    else:
        tensors = unwrap(load_torch_file(path, "cpu"), nested)
    _check_some(tensors, path)
    wrong = {name: t.dtype for name, t in tensors.items() if t.is_floating_point() and t.dtype not in FLOATS}
    if wrong:
        name, dtype = next(iter(wrong.items()))
        raise UserError(
            f"{path} holds {len(wrong)} tensors of a kind that cannot be computed with, such as {name} "
            f"({str(dtype).removeprefix('torch.')}); give the weights in float32, bfloat16 or float16"
        )
    check_weights(tensors, str(path))
    return tensors


def load_torch_file(path: Path, device: str) -> Any:
    """Content of a torch file; on the device "meta" its tensors are names, shapes and types, and no data are read.

    UserError: the file is missing, damaged, or holds more than tensors; none of its code is run.
    """
    try:
        mmap = zipfile.is_zipfile(path)  # files older than torch 1.6 cannot be mapped
        with utf8_path(path) as plain:
            return torch.load(plain, map_location=device, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        why = "damaged, or it holds more than tensors, whose code is not run"
        raise UserError(f"cannot read weights {path}: {why}") from error
    except FileNotFoundError as error:
        raise UserError(f"weights not found: {path}") from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        raise UserError(f"cannot read weights {path}: damaged ({reason(error)})") from error


def unwrap(content: Any, nested: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors in a torch file's content, see `read_tensors`."""
    for key in nested:
        content = content[key] if isinstance(content, Mapping) and key in content else content
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if all(name.startswith(WRAPPER) for name in tensors):
        tensors = {name.removeprefix(WRAPPER): tensor for name, tensor in tensors.items()}
    return tensors


def differences(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Differences:
    """Compare names, shapes and kinds of tensors; any floating type stands for any other, values are not looked at."""
    misshapen = [
        f"{name} (wanted {_describe(wanted[name], given[name])}, got {_describe(given[name], wanted[name])})"
        for name in sorted(wanted.keys() & given.keys())
        if wanted[name].shape != given[name].shape or _of_another_kind(wanted[name], given[name])
    ]
    return Differences(sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys()), misshapen)


def check_names_and_shapes(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors of other names, shapes or kinds: a UserError with what is missing, unexpected or misshapen."""
    found = differences(wanted, given)
    if found:
        raise UserError(f"{source} does not fit the model; {found}")


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata in the header of a safetensors file; empty where there are none, or for another kind of file."""
    if path.suffix.lower() != ".safetensors":
        return {}

    def header(path: Path) -> dict[str, str]:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})

    return _read_safetensors(path, header)


def _check_some(tensors: Mapping[str, Tensor], path: Path) -> None:
    if not tensors:
        raise UserError(f"no tensors in {path}: wanted a state dict")


def _read_safetensors(path: Path, read: Callable[[Path], Content]) -> Content:
    try:
        with utf8_path(path) as plain:
            return read(plain)
    except FileNotFoundError as error:
        raise UserError(f"weights not found: {path}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"cannot read weights {path}: damaged ({reason(error)})") from error


def _of_another_kind(one: Tensor, other: Tensor) -> bool:
    return one.dtype != other.dtype and not (one.is_floating_point() and other.is_floating_point())


def _describe(tensor: Tensor, other: Tensor) -> str:
    """The shape, and the type where that is of another kind."""
    kind = f" {tensor.dtype}".replace("torch.", "") if _of_another_kind(tensor, other) else ""
    return f"{tuple(tensor.shape)}{kind}"


def read_entries(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a file on the meta device; the data are not read, whatever their size.

    Of a torch file they may lie under one of `NESTED` or below each other, and be named with the prefix `module.`.
    UsageError: no such file. UserError: it is damaged, holds more than tensors or some of an unknown type, or has none.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"weights not found: {path} is no file")
    if path.suffix.lower() == ".safetensors":
        entries = _read_safetensors(path, _header)
    else:
        entries = unwrap(load_torch_file(path, "meta"), NESTED)
    _check_some(entries, path)
    return entries


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; UserError if it cannot be written.

    The header's metadata has one entry at most, as safetensors writes several in a random order.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(plain, temporary, metadata or {"format": "pt"})
        temporary.chmod(0o644)  # safetensors lets nobody else read


def _header(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # not a dictionary
        strange = sorted({s.get_dtype() for s in slices.values()} - SAFETENSORS_TYPES.keys())
        if strange:
            known = ", ".join(SAFETENSORS_TYPES)
            raise UserError(f"{path} holds tensors of type {', '.join(strange)}, and only {known} can be checked")
        return {
            name: torch.empty(s.get_shape(), dtype=SAFETENSORS_TYPES[s.get_dtype()], device="meta")
            for name, s in slices.items()
        }
