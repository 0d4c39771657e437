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

    `published` says of each part, "tokenizer" and "transformer", which published file to get, and where. UserError: an
    unknown part, or no such file, bundle or run (says which to get, and the key to set).
    """
    if part not in published:
        raise UserError(f"model.weights has the parts {' and '.join(published)}, got {part}")
    if not (is_run(path) or is_bundle(path) or Path(path).is_file()):
        raise UserError(
            f"weights not found: {path}; get {published[part]} and set model.weights.{part} to it, or to a run or a "
            "bundle (or to hub/NAME, which fetches it)"
        )


def load_part(system: Any, part: str, path: str | Path, new_adapters: bool = False) -> None:
    """Fill a part of a system, which has it as an attribute, from a published file, a bundle or a run.

    `new_adapters`: leave the transformer's adapters as they are, whatever the path holds. UserError: no such file (says
    which to get, and the key to set), or one that does not fit.
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
    if is_run(path) or is_bundle(path):
        _fill_from_ours(module, part, path, fold, new_adapters)
    elif part == "tokenizer":
        load_tokenizer(module, read_tensors(path, nested=("vae",)), str(path))
    else:
        tensors = read_tensors(path)
        load_transformer(module, split_adapters(tensors)[0] if new_adapters else tensors, str(path))


def load_tokenizer(tokenizer: Any, tensors: Mapping[str, Tensor], source: str) -> None:
    """Fill a tokenizer from a published file's tensors."""
    config = tokenizer.config
    wanted = tokenizer.state_dict()
    ours = tokenizer_tensors(wanted, len(config.multipliers), config.latent_width, tensors, source)
    assign_plain(tokenizer, in_float32(ours))


def load_transformer(transformer: Any, tensors: Mapping[str, Tensor], source: str) -> None:
    """Fill a transformer from the tensors of a published teacher (its adapters stay as they are) or student."""
    wanted = plain_state_dict(transformer)
    if not split_adapters(tensors)[1]:
        wanted, _ = split_adapters(wanted)
    ours = transformer_tensors(wanted, transformer.config.width, tensors, source)
    assign_plain(transformer, in_float32(ours))


def held_in(path: Path, part: str) -> dict[str, Tensor]:
    """A part of a bundle or a run by plain names; adapters are among those of the transformer.

    Half precision, which is for storing, is widened. Of a run all but the tokenizer counts as the transformer's: it is
    with VARSR's prefix encoder and refiner.
    """
    if is_bundle(path):
        student = read_config(path).get("student") or {"lora_rank": 0}
        has_adapters = part == "transformer" and student["lora_rank"] and not student["merged"]
        held = read_tensors(tensors_file(path, part))
        held |= read_tensors(tensors_file(path, ADAPTERS)) if has_adapters else {}
        return {name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in held.items()}
    weights = load_run_weights(path).items()
    own = {name: tensor for name, tensor in weights if name.startswith("tokenizer.") == (part == "tokenizer")}
    return {plain_name(name.removeprefix(f"{part}.")): tensor for name, tensor in own.items()}


def _fill_from_ours(module: nn.Module, part: str, path: Path, fold: bool, new_adapters: bool) -> None:
    """Take a part of a bundle, in the precision in which it is stored, or of a run, which may hold more."""
    held, wanted = held_in(path, part), plain_state_dict(module)
    source = str(tensors_file(path, part)) if is_bundle(path) else f"the {part} of the run {path}"
    given, adapters = split_adapters({n: t for n, t in held.items() if n in wanted or is_bundle(path) or ".lora_" in n})
    base, places = split_adapters(wanted)
    check_names_and_shapes(base, given, source)
    if adapters and fold and is_bundle(path):
        given = folded(given, adapters, read_config(path)["student"]["cross_value_bias"])
    elif adapters and places and not new_adapters:
        given |= fitting(adapters, places, path)
    assign_plain(module, given)


def fitting(adapters: dict[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The adapters of a bundle or a run, or none where they have another rank or other layers than is wanted.

    UserError: a bundle lacks some of them.
    """
    if not all(name in wanted and tensor.shape == wanted[name].shape for name, tensor in adapters.items()):
        text = "the adapters of %s are not of this student's rank and layers and are left out; its teacher is taken"
        LOG.warning(text, path)
        return {}
    if is_bundle(path):
        check_names_and_shapes(wanted, adapters, str(tensors_file(path, ADAPTERS)))
    return adapters


def split_adapters(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors by plain names that are no adapters, and those that are."""
    base = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
    return base, {name: tensor for name, tensor in tensors.items() if ".lora_" in name}


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

    UserError: the system has no place for some of them, or another shape.
    """
    try:
        unexpected = system.load_state_dict(weights, strict=False).unexpected_keys
    except RuntimeError as error:  # torch's word for tensors of another shape
        raise UserError(f"{source} was made with another model: {reason(error)}") from error
    if unexpected:
        raise UserError(f"{source} was made with another model: this one has no {unexpected[0]}")
