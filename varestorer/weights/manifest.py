"""What a file holds, without loading it: names, shapes and types of its tensors, compared with a manifest.

A manifest is a JSON object `{name: {"shape": [...], "dtype": "float32"}}`, or the tensors of a network on the meta
device (`systems.published.manifest`). Both are handled as tensors on the meta device, which have no data.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from varestorer.utils.errors import UsageError, UserError, reason
from varestorer.weights.files import Differences, differences, load_torch_file, open_safetensors, unwrap
from varestorer.weights.published import add_infixes

NESTED = ("vae", "state_dict")
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
class Comparison:
    """How a file compares with a manifest.

    Attributes:
        found: names that are missing, unexpected or misshapen (a shape, or an integer for a floating type).
        mapped: tensors of the manifest that the file holds in the right shape.
        total: tensors of the manifest.
        types: how many tensors of the file are of which type.
        retyped: how many of the mapped are of another floating type than in the manifest.
    """

    found: Differences
    mapped: int
    total: int
    types: dict[str, int]
    retyped: int


def read_entries(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a file on the meta device; the data are not read, whatever their size.

    Args:
        path: a `.safetensors` file, or a torch file whose tensors may lie under `vae` or `state_dict` and may be
            named with the prefix `module.`.

    Raises:
        UsageError: no such file.
        UserError: the file is damaged, holds more than tensors or tensors of an unknown type, or has no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"weights not found: {path} is no file")
    if path.suffix.lower() == ".safetensors":
        return open_safetensors(path, _header)
    return unwrap(load_torch_file(path, "meta"), NESTED, path)


def read_manifest(path: str | Path) -> dict[str, Tensor]:
    """A manifest's tensors on the meta device.

    Raises:
        UsageError: no such file.
        UserError: the file cannot be read, or is no manifest.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        return {name: _on_meta(entry["shape"], getattr(torch, entry["dtype"])) for name, entry in entries.items()}
    except FileNotFoundError as error:
        raise UsageError(f"manifest={path} is neither a file nor the name of a published one") from error
    except OSError as error:
        raise UserError(f"cannot read manifest={path}: {error.strerror or reason(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        wanted = 'wanted JSON such as {"head.bias": {"shape": [64], "dtype": "float32"}}'
        raise UserError(f"manifest={path} is no manifest ({reason(error)}); {wanted}") from error


def compare(entries: Mapping[str, Tensor], manifest: Mapping[str, Tensor]) -> Comparison:
    """Compare a file's tensors with a manifest; a tokenizer's names may lack the `.conv` and `.norm` infixes."""
    entries = add_infixes(entries, manifest)
    found = differences(manifest, entries)
    wrong = {text.split(" ", 1)[0] for text in found.misshapen}
    mapped = [name for name in manifest if name in entries and name not in wrong]
    retyped = sum(entries[name].dtype != manifest[name].dtype for name in mapped)
    types = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in entries.values())
    return Comparison(found, len(mapped), len(manifest), dict(sorted(types.items())), retyped)


def _header(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # not a dictionary
        strange = sorted({s.get_dtype() for s in slices.values()} - SAFETENSORS_TYPES.keys())
        if strange:
            known = ", ".join(SAFETENSORS_TYPES)
            raise UserError(f"{path} holds tensors of type {', '.join(strange)}, and only {known} can be checked")
        return {name: _on_meta(s.get_shape(), SAFETENSORS_TYPES[s.get_dtype()]) for name, s in slices.items()}


def _on_meta(shape: list[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
