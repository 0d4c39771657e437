"""Weights of one part of a system, from a published file or from a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varestorer.transformer import VARTransformer
from varestorer.transformer.adapters import plain_name, plain_state_dict
from varestorer.utils.errors import UserError
from varestorer.weights.files import read_tensors
from varestorer.weights.load import load_published_tokenizer, load_published_transformer
from varestorer.weights.published import STUDENT_FILE, TOKENIZER_FILE, TRANSFORMER_FILE
from varestorer.weights.runs import is_run, load_run_weights

LOG = logging.getLogger(__name__)
WHERE = {
    "tokenizer": f"{TOKENIZER_FILE} (hub FoundationVision/Infinity)",
    "transformer": f"{TRANSFORMER_FILE} (hub FoundationVision/Infinity) or {STUDENT_FILE} (VARestorer's release)",
}


def check_part(part: str, path: str | Path) -> None:
    """Refuse at once what `load_part` could not load.

    Raises:
        UserError: an unknown part, or no such file (says which to get, and the key to set).
    """
    if part not in WHERE:
        raise UserError(f"model.weights has the parts {' and '.join(WHERE)}, got {part}")
    if not (is_run(path) or Path(path).is_file()):
        raise UserError(f"weights not found: {path}; get {WHERE[part]} and set model.weights.{part} to it, or to a run")


@torch.no_grad()
def load_part(system: Any, part: str, path: str | Path) -> None:
    """Fill a part of a system.

    Args:
        system: has the part as an attribute.
        part: "tokenizer" or "transformer".
        path: a published file, or the folder of a run that trained or held that part.

    Raises:
        UserError: no such file (says which to get, and the key to set), or one that does not fit.
    """
    path = Path(path)
    if is_run(path):
        _load_from_run(getattr(system, part), part, path)
        return
    check_part(part, path)
    if part == "tokenizer":
        load_published_tokenizer(system.tokenizer, read_tensors(path, nested=("vae",)), str(path))
    else:
        load_transformer(system.transformer, read_tensors(path), str(path))


def load_teacher(system: Any, path: str | Path) -> VARTransformer:
    """A network of the system's sizes without adapters, filled from a published teacher or a run."""
    check_part("transformer", path)
    teacher = VARTransformer(system.transformer.config).to(system.device)
    if is_run(path):
        _load_from_run(teacher, "transformer", Path(path))
    else:
        load_transformer(teacher, read_tensors(path), str(path))
    return teacher


def load_transformer(transformer: Any, tensors: dict[str, Tensor], source: str) -> None:
    """Fill a transformer from a published teacher (its adapters stay as they are) or student."""
    plain = plain_state_dict(transformer)
    if not any(".lora_" in name for name in tensors):
        plain = {name: tensor for name, tensor in plain.items() if ".lora_" not in name}
    load_published_transformer(transformer, plain, tensors, source)


@torch.no_grad()
def _load_from_run(module: nn.Module, part: str, run: Path) -> None:
    """Copy a part of a run's weights; adapters that the module has not, or has at another rank, are left out."""
    prefix = f"{part}."
    held = load_run_weights(run).items()
    weights = {plain_name(name.removeprefix(prefix)): t for name, t in held if name.startswith(prefix)}
    wanted = plain_state_dict(module)
    given = {name: tensor for name, tensor in weights.items() if name in wanted}
    if any(".lora_" in name and tensor.shape != wanted[name].shape for name, tensor in given.items()):
        LOG.warning("the adapters of the run %s have another rank: the student starts afresh from its teacher", run)
        given = {name: tensor for name, tensor in given.items() if ".lora_" not in name}
    missing = [name for name in wanted if name not in given and ".lora_" not in name]
    if missing:
        raise UserError(f"the run {run} does not hold a whole {part}: {missing[0]} and {len(missing) - 1} more missing")
    misshapen = [name for name, tensor in given.items() if tensor.shape != wanted[name].shape]
    if misshapen:
        raise UserError(f"the {part} of the run {run} has other sizes than the model: {misshapen[0]}")
    for name, tensor in given.items():
        wanted[name].copy_(tensor)
