"""Published files under our names: a table per paper, and what they share.

Each table turns one of our names into the published one; the way back is the inverted dictionary. Tensors that the
published files carry but that follow from the configuration ("derived") are checked on load and written on export.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from varestorer.utils.errors import UserError
from varestorer.weights.files import check_names_and_shapes

TRANSFORMER_FILE = "infinity_2b_reg.pth"
TOKENIZER_FILE = "infinity_vae_d32reg.pth"
STUDENT_FILE = "varestorer.pth"
RESTORER_FILE = "general_swinir_v1.ckpt"
"""The files of Infinity, VARestorer and, for its restorer, DiffBIR."""
Table = Iterable[tuple[str, str | Callable[[re.Match[str]], str]]]


def translate(name: str, table: Table) -> str:
    """The name after all replacements of the table, one after the other."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def count_of(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers the names have where the pattern's group is."""
    return len({match[1] for match in (re.match(pattern, name) for name in tensors) if match})


def from_published(
    wanted: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str],
    derived: Mapping[str, Tensor],
    source: str,
) -> dict[str, Tensor]:
    """Tensors of a published file (`source`, for messages) under our names.

    `wanted` has tensors of the shapes that ours must have, by our names; `names` are ours -> published. The file must
    hold the derived tensors, published name -> value, too; they do not become ours. UserError: lists what is missing,
    unexpected or misshapen, or names a derived tensor of another value.
    """
    shapes = {names[name]: tensor for name, tensor in wanted.items()}
    check_names_and_shapes(shapes | dict(derived), tensors, source)
    check_derived(tensors, derived, source)
    return {name: tensors[published] for name, published in names.items()}


def check_derived(tensors: Mapping[str, Tensor], derived: Mapping[str, Tensor], source: str) -> None:
    """Refuse a file (UserError) whose derived tensors have other values than the configuration gives."""
    for name, value in derived.items():
        if not torch.equal(tensors[name].to(value.dtype), value):
            raise UserError(f"{source}: {name} has other values than the configuration gives")


def to_published(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], derived: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The inverse of `from_published`."""
    return {names[name]: tensor for name, tensor in tensors.items()} | dict(derived)
