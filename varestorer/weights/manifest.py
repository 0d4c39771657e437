"""What a file holds, without loading it: names, shapes and types of its tensors, compared with a manifest.

A manifest is a JSON object `{name: {"shape": [...], "dtype": "float32"}}`, or the tensors of a network on the meta
device (`published.infinity.manifest`). Both are handled as tensors on the meta device, which have no data.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from varestorer.utils.errors import UsageError, UserError, reason
from varestorer.weights.files import Differences, differences, on_meta
from varestorer.weights.published.infinity import add_infixes


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


def read_manifest(path: str | Path) -> dict[str, Tensor]:
    """A manifest's tensors on the meta device.

    Raises:
        UsageError: no such file.
        UserError: the file cannot be read, or is no manifest.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        return {name: on_meta(entry["shape"], getattr(torch, entry["dtype"])) for name, entry in entries.items()}
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
