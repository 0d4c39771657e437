"""Adapters alone in a file: taken off a system, and put onto another with the same teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varestorer.systems.bundle import adapters_metadata, save_tensors
from varestorer.systems.varestorer import VARestorer
from varestorer.transformer.adapters import assign_plain, plain_state_dict
from varestorer.utils.errors import UserError
from varestorer.weights.files import check_names_and_shapes, read_metadata, read_tensors


def adapter_tensors(system: VARestorer) -> dict[str, Tensor]:
    """A system's adapters by their plain names; empty where it has none, or they are merged."""
    return {name: tensor for name, tensor in plain_state_dict(system.transformer).items() if ".lora_" in name}


def save_adapters(system: VARestorer, path: Path) -> None:
    """Write the adapters, with what is needed to put them onto a teacher again.

    Raises:
        UserError: the system has none.
    """
    adapters = adapter_tensors(system)
    if not adapters:
        raise UserError("the model has no adapters of its own: it has none at all, or they are merged")
    save_tensors(path, adapters, adapters_metadata(system))


def student_of(path: Path) -> dict[str, Any] | None:
    """Arguments of the `StudentConfig` that a file of adapters makes; None if the path is no such file."""
    student = read_metadata(path).get("student") if path.is_file() else None
    return None if student is None else dict(json.loads(student))


def put_adapters(base: VARestorer, path: Path, student: dict[str, Any]) -> VARestorer:
    """The base's networks with the adapters of a file in place of its own, if it has any.

    Args:
        base: with the teacher's weights.
        path: a file of adapters.
        student: from `student_of`.
    Raises:
        UserError: the base's adapters are merged, or the file does not fit it.
    """
    if base.student_config.merged:
        raise UserError(
            "the adapters of the base are merged and its teacher is gone; give one with separate ones, or none"
        )
    with torch.device("meta"):
        system = VARestorer(**(base.config | {"student": student}))
    wanted, adapters = adapter_tensors(system), read_tensors(path)
    check_names_and_shapes(wanted, adapters, str(path))
    kept = {name: t for name, t in plain_state_dict(base.transformer).items() if ".lora_" not in name}
    dtype = next(base.transformer.blocks.parameters()).dtype
    assign_plain(system.transformer, kept | {name: tensor.to(dtype) for name, tensor in adapters.items()})
    assign_plain(system.tokenizer, base.tokenizer.state_dict())
    system.restorer = base.restorer
    system.files = base.files | {"adapters": Path(path)}
    return system.eval().requires_grad_(False)
