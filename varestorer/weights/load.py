"""Weights into networks: of one part of a system, from a published file, a bundle or a run.

Files are mapped into memory and their tensors taken as they are, so a part costs memory once, when it is first used.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varestorer.transformer import VARTransformer
from varestorer.transformer.adapters import assign_plain, folded, plain_name, plain_state_dict
from varestorer.utils.errors import UserError, reason
from varestorer.weights.bundle import ADAPTERS, is_bundle, read_config, shipped, tensors_file
from varestorer.weights.files import check_names_and_shapes, read_tensors
from varestorer.weights.published.infinity import tokenizer_tensors, transformer_tensors
from varestorer.weights.runs import is_run, load_run_weights

LOG = logging.getLogger(__name__)


def check_part(part: str, path: str | Path, published: Mapping[str, str]) -> None:
    """Refuse at once a file of weights that no system could load.

    Args:
        part: "tokenizer" or "transformer".
        path: a published file, a bundle, or the folder of a run.
        published: part -> the published file to get, and where: `System.published`.
    Raises:
        UserError: an unknown part, or no such file (says which to get, and the key to set).
    """
    if part not in published:
        raise UserError(f"model.weights has the parts {' and '.join(published)}, got {part}")
    if not (is_run(path) or is_bundle(path) or Path(path).is_file()):
        raise UserError(
            f"weights not found: {path}; get {published[part]} and set model.weights.{part} to it, or to a run or a "
            "bundle (or to hub/NAME, which fetches it)"
        )


def load_part(system: Any, part: str, path: str | Path, new_adapters: bool = False) -> None:
    """Fill a part of a system.

    Args:
        system: has the part as an attribute.
        part: "tokenizer" or "transformer".
        path: a published file, a bundle, or the folder of a run that trained or held that part.
        new_adapters: leave the transformer's adapters as they are, whatever the path holds.
    Raises:
        UserError: no such file (says which to get, and the key to set), or one that does not fit.
    """
    check_part(part, path, system.published)
    fill(getattr(system, part), part, Path(path), system.student_config.merged, new_adapters)


def load_teacher(system: Any, path: str | Path) -> VARTransformer:
    """A network of the system's sizes without adapters, filled from a published teacher, a bundle or a run."""
    path = shipped(path)
    check_part("transformer", path, system.published)
    with torch.device("meta"):
        teacher = VARTransformer(system.transformer.config)
    fill(teacher, "transformer", path)
    return teacher.to(system.device)


def fill(module: Any, part: str, path: Path, fold: bool = False, new_adapters: bool = False) -> None:
    """Fill a part; `fold`: a bundle's adapters go into the base weights."""
    if is_run(path):
        _load_from_run(module, part, path, new_adapters)
    elif is_bundle(path):
        _load_from_bundle(module, part, path, fold, new_adapters)
    elif part == "tokenizer":
        load_tokenizer(module, read_tensors(path, nested=("vae",)), str(path))
    else:
        tensors = read_tensors(path)
        load_transformer(module, _without_adapters(tensors) if new_adapters else tensors, str(path))


def load_tokenizer(tokenizer: Any, tensors: Mapping[str, Tensor], source: str) -> None:
    """Fill a tokenizer from a published file's tensors."""
    config = tokenizer.config
    wanted = tokenizer.state_dict()
    ours = tokenizer_tensors(wanted, len(config.multipliers), config.latent_width, tensors, source)
    assign_plain(tokenizer, in_float32(ours))


def load_transformer(transformer: Any, tensors: Mapping[str, Tensor], source: str) -> None:
    """Fill a transformer from the tensors of a published teacher (its adapters stay as they are) or student."""
    wanted = plain_state_dict(transformer)
    if not any(".lora_" in name for name in tensors):
        wanted = _without_adapters(wanted)
    ours = transformer_tensors(wanted, transformer.config.width, tensors, source)
    assign_plain(transformer, in_float32(ours))


def _load_from_bundle(module: nn.Module, part: str, bundle: Path, fold: bool, new_adapters: bool) -> None:
    """Take a part of a bundle in the precision in which it is stored; half precision, which is for storing, widened."""
    file = tensors_file(bundle, part)
    given, wanted = _widened(read_tensors(file)), plain_state_dict(module)
    check_names_and_shapes(_without_adapters(wanted), given, str(file))
    adapters = {name: tensor for name, tensor in wanted.items() if ".lora_" in name}
    student = read_config(bundle).get("student") or {"lora_rank": 0, "merged": False}
    if fold and part == "transformer" and student["lora_rank"] and not student["merged"]:
        held = _widened(read_tensors(tensors_file(bundle, ADAPTERS)))
        given = folded(given, held, student["cross_value_bias"])
    if adapters and student["lora_rank"] and not student["merged"] and not new_adapters:
        held = _widened(read_tensors(tensors_file(bundle, ADAPTERS)))
        rank = next(len(tensor) for name, tensor in adapters.items() if name.endswith(".lora_down.weight"))
        if rank == student["lora_rank"]:  # of another rank, another student is to be trained from this teacher
            check_names_and_shapes(adapters, held, str(tensors_file(bundle, ADAPTERS)))
        given |= held
    assign_plain(module, fitting(given, wanted, f"the bundle {bundle}"))


def _load_from_run(module: nn.Module, part: str, run: Path, new_adapters: bool) -> None:
    """Take a part of a run's weights; adapters that the module has not, or has at another rank, are left out."""
    prefix = f"{part}."
    held = load_run_weights(run).items()
    weights = {plain_name(name.removeprefix(prefix)): t for name, t in held if name.startswith(prefix)}
    weights = _without_adapters(weights) if new_adapters else weights
    wanted = plain_state_dict(module)
    given = fitting({name: t for name, t in weights.items() if name in wanted}, wanted, f"the run {run}")
    missing = [name for name in _without_adapters(wanted) if name not in given]
    if missing:
        raise UserError(f"the run {run} does not hold a whole {part}: {missing[0]} and {len(missing) - 1} more missing")
    misshapen = [name for name, tensor in given.items() if tensor.shape != wanted[name].shape]
    if misshapen:
        raise UserError(f"the {part} of the run {run} has other sizes than the model: {misshapen[0]}")
    assign_plain(module, given)


def fitting(given: dict[str, Tensor], wanted: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """What was given, without its adapters where they have another rank than is wanted."""
    adapters = given.keys() - _without_adapters(given).keys()
    if all(name in wanted and given[name].shape == wanted[name].shape for name in adapters):
        return given
    LOG.warning(
        "the adapters of %s are not of this student's rank and layers and are left out; its teacher is taken", source
    )
    return _without_adapters(given)


def _without_adapters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}


def _widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in tensors.items()}


def in_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, widened or rounded."""
    return {name: tensor.float() for name, tensor in tensors.items()}


def allocate(module: nn.Module) -> set[str]:
    """Give memory to the tensors that are on the meta device still; returns their names. Their values are arbitrary."""
    names = {name for name, tensor in module.state_dict().items() if tensor.is_meta}
    empty = {name: torch.empty_like(t, device="cpu") for name, t in module.state_dict().items() if name in names}
    module.load_state_dict(empty, strict=False, assign=True)
    return names


def load_into(system: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy a run's weights into a system that may have more (those that come from files).

    Raises:
        UserError: the system has no place for some of them, or another shape.
    """
    try:
        unexpected = system.load_state_dict(weights, strict=False).unexpected_keys
    except RuntimeError as error:  # torch's word for tensors of another shape
        raise UserError(f"{source} was made with another model: {reason(error)}") from error
    if unexpected:
        raise UserError(f"{source} was made with another model: this one has no {unexpected[0]}")
