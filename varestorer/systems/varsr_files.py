"""Files that VARSR's networks come from: published ones, and runs.

Sizes are read from the files, so that networks of any size and schedule in the published form open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varestorer.tokenizer import MultiScaleTokenizer
from varestorer.transformer.adapters import plain_name
from varestorer.utils.errors import UserError
from varestorer.weights.bundle import ADAPTERS, is_bundle, tensors_file
from varestorer.weights.files import check_names_and_shapes, read_tensors
from varestorer.weights.load import check_part, in_float32
from varestorer.weights.published.varsr import (
    LEVELS,
    MASK,
    TRANSFORMER_NESTED,
    VQVAE_FILE,
    VQVAE_NESTED,
    network_kind,
    published_varsr_name,
    varsr_sizes,
    varsr_tensors,
    vqvae_sizes,
    vqvae_tensors,
)
from varestorer.weights.runs import is_run, load_run_weights

PUBLISHED = {
    "tokenizer": f"{VQVAE_FILE} (hub qyp2000/VARSR) or vae_ch160v4096z32.pth (hub FoundationVision/var)",
    "transformer": "VARSR.pth or VARSR_C2I.pth (hub qyp2000/VARSR), or var_d24.pth (hub FoundationVision/var)",
}
SIDES = {10: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32), 12: (1, 2, 3, 4, 6, 9, 12, 16, 20, 24, 28, 32)}
"""Published schedules by their number of scales, for files that do not say theirs."""
NOT_OF_CLASSES = ("prefix_encoder.", "positions.", "refiner.", "refiner_norm.")
REPLACED = ("start", "level_embed.weight", "positions.table")
"""What a restorer takes of a model of classes only if the shape is the same."""
EMBEDDING = "condition.embedding.weight"
VQVAE = {"use_attention": True, "use_quant_conv": True, "num_phi": 4, "enlarge": "bicubic", "shrink": "area"}
"""What makes a tokenizer VAR's."""


def tokenizer_of(tokenizer: MultiScaleTokenizer, path: Path) -> dict[str, Tensor]:
    """Tensors of a tokenizer from a published file, a bundle or a run.

    Raises:
        UserError: no such file (says which to get), or one that does not fit.
    """
    wanted = tokenizer.state_dict()
    if is_run(path) or is_bundle(path):
        given = held_in(path, "tokenizer")
        check_names_and_shapes(wanted, given, str(path))
        return given
    check_part("tokenizer", path, PUBLISHED)
    tensors = read_tensors(path, VQVAE_NESTED)
    return in_float32(vqvae_tensors(wanted, len(tokenizer.config.multipliers), tensors, str(path)))


def network_of(wanted: Mapping[str, Tensor], sides: Sequence[int], path: Path) -> dict[str, Tensor]:
    """Tensors of all but the tokenizer from a published file, a bundle or a run.

    A restorer takes from a model of classes what fits: no prefix, no level embedding of another schedule, and of the
    classes the first ones.

    Args:
        wanted: of the network to be filled, by the names of `weights.published.varsr`.
        sides: of its schedule.
        path: the file.
    Returns:
        all of the wanted tensors, or some of them where a restorer starts from a model of classes.
    Raises:
        UserError: no such file (says which to get), or one that does not fit.
    """
    is_ours = is_run(path) or is_bundle(path)
    if is_ours:
        given = held_in(path, "transformer")
    else:
        check_part("transformer", path, PUBLISHED)
        given = _published(path, wanted)
    source = str(path)
    if _is_class_model(given) and not _is_class_model(wanted):
        return in_float32(class_to_restoration(wanted, given, source))
    levels = len(given["level_embed.weight"]) if "level_embed.weight" in given else len(sides)
    if levels != len(wanted["level_embed.weight"]):
        hint = f"model.schedule.sides={list(SIDES[levels])}" if levels in SIDES else "model.schedule to its own"
        raise UserError(f"{source} has {levels} scales, and model.schedule has {len(sides)}: set {hint}")
    classes = [len(tensors[EMBEDDING]) for tensors in (given, wanted) if EMBEDDING in tensors]
    if len(set(classes)) > 1:
        raise UserError(
            f"{source} has {classes[0]} classes, and the model {classes[1]}: set model.transformer.num_classes="
            f"{classes[0]}"
        )
    if is_ours:
        check_names_and_shapes(wanted, given, source)
        return given
    return in_float32(varsr_tensors(wanted, sides, _raw(path), source))


def class_to_restoration(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """What a restorer takes of a model of classes (C2I, VAR), by our names.

    Raises:
        UserError: anything else than the prefix, the classes and the schedule differs.
    """
    taken = {name: t for name, t in given.items() if name in wanted}
    for name in REPLACED:
        if name in taken and taken[name].shape != wanted[name].shape:
            del taken[name]
    taken[EMBEDDING] = taken[EMBEDDING][: len(wanted[EMBEDDING])]
    has_refiner = any(name.startswith("refiner.") for name in given)
    optional = REPLACED + (NOT_OF_CLASSES[:2] if has_refiner else NOT_OF_CLASSES)
    due = {name: t for name, t in wanted.items() if name in taken or not name.startswith(optional)}
    check_names_and_shapes(due, taken, source)
    return taken


def published_sizes(path: Path, tokenizer_file: str | None) -> dict[str, Any]:
    """Arguments of the system of a published transformer, with the files as its weights.

    Raises:
        UserError: a file is missing, or one of them is another network.
    """
    tensors = _raw(path)
    kind = network_kind(tensors)
    if kind not in ("varsr", "c2i", "var"):
        held = "a tokenizer" if kind == "vqvae" else "none"
        raise UserError(f"{path} holds {held}; give {PUBLISHED['transformer']}")
    tokenizer = Path(tokenizer_file).expanduser() if tokenizer_file else path.parent / VQVAE_FILE
    check_part("tokenizer", tokenizer, PUBLISHED)
    sizes = varsr_sizes(tensors)
    own = ("width", "depth", "num_heads", "num_classes", "num_levels")
    transformer = {name: sizes[name] for name in own}
    if kind == "var":
        transformer |= {"positions": "rows", "position_size": tensors["pos_1LC"].shape[1]}
    refiner = {"width": sizes["refiner_width"], "depth": sizes["refiner_depth"]}
    guidance = {"varsr": (6.0, "linear"), "c2i": (4.0, "ahead"), "var": (1.5, "linear")}[kind]
    return {
        "schedule": {"sides": published_sides(tensors, sizes)},
        "tokenizer": published_tokenizer_sizes(tokenizer),
        "transformer": transformer,
        "prefix": {"channels": sizes["prefix_channels"]} if kind == "varsr" else None,
        "refiner": None if kind == "var" else refiner,
        "sampling": {"guidance": guidance[0], "growth": guidance[1], "raw_last": kind != "var"},
        "weights": {"tokenizer": str(tokenizer), "transformer": str(path)},
    }


def published_tokenizer_sizes(path: Path) -> dict[str, Any]:
    """Arguments of `TokenizerConfig` for a published VQ-VAE."""
    sizes = vqvae_sizes(read_tensors(path, VQVAE_NESTED))
    names = {"code_width": "latent_width", "num_codes": "vocabulary"}
    return {names.get(name, name): size for name, size in sizes.items()} | VQVAE


def published_sides(tensors: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> list[int]:
    """Sides of the scales of a published transformer.

    Raises:
        UserError: the file does not say them, and has another number than the published ones.
    """
    if LEVELS in tensors and not tensors[LEVELS].is_meta:
        counts = torch.bincount(tensors[LEVELS].flatten().long()).tolist()
        return [1, *(math.isqrt(count) for count in counts[1:])]
    if sizes["num_levels"] not in SIDES:
        known = " or ".join(map(str, SIDES))
        raise UserError(f"{LEVELS} is missing, and {sizes['num_levels']} scales are not {known}: the sides are unknown")
    return list(SIDES[sizes["num_levels"]])


def _is_class_model(tensors: Mapping[str, Tensor]) -> bool:
    return not any(name.startswith("prefix_encoder.") for name in tensors)


def _published(path: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a published transformer's tensors that the network has a place for, by our names.

    Raises:
        UserError: another network, or one with parts that this one has not.
    """
    tensors = _raw(path)
    kind = network_kind(tensors)
    if kind not in ("varsr", "c2i", "var"):
        raise UserError(f"{path} is no transformer of VAR or VARSR; get {PUBLISHED['transformer']}")
    names = {name: published_varsr_name(name) for name in wanted}
    left = tensors.keys() - set(names.values()) - {LEVELS, MASK, "pos_1LC"}
    left = {name for name in left if not name.endswith("zero_k_bias")}
    if left and kind != "varsr":
        raise UserError(f"{path} does not fit the model, which has no place for {min(left)} and {len(left) - 1} more")
    return {name: tensors[published] for name, published in names.items() if published in tensors}


def _raw(path: Path) -> dict[str, Tensor]:
    return read_tensors(path, TRANSFORMER_NESTED)


def held_in(path: Path | None, part: str) -> dict[str, Tensor]:
    """A part of a bundle or a run, as `VARSR.parts` names it; no adapters where it has none."""
    if path is not None and is_bundle(path):
        file = tensors_file(path, part)
        return read_tensors(file) if part != ADAPTERS or file.is_file() else {}
    if path is None or not is_run(path):
        return {}
    held = {plain_name(name): tensor for name, tensor in load_run_weights(path).items()}
    if part == ADAPTERS:
        return {name.removeprefix("transformer."): tensor for name, tensor in held.items() if ".lora_" in name}
    own = {n: t for n, t in held.items() if ".lora_" not in n and n.startswith("tokenizer.") == (part == "tokenizer")}
    return {name.removeprefix(f"{part}."): tensor for name, tensor in own.items()}
