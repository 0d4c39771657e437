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
from varestorer.transformer.adapters import assign_plain
from varestorer.utils.errors import UserError
from varestorer.weights.bundle import is_bundle
from varestorer.weights.files import check_names_and_shapes, read_tensors
from varestorer.weights.load import check_part, fill, held_in, in_float32, split_adapters
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
from varestorer.weights.runs import is_run

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
KINDS = ("varsr", "c2i", "var")


def fill_tokenizer(tokenizer: MultiScaleTokenizer, path: Path) -> None:
    """Fill a tokenizer from a published file, a bundle or a run.

    UserError: no such file (says which to get), or one that does not fit.
    """
    if is_run(path) or is_bundle(path):
        return fill(tokenizer, "tokenizer", path)
    check_part("tokenizer", path, PUBLISHED)
    wanted, levels = tokenizer.state_dict(), len(tokenizer.config.multipliers)
    assign_plain(tokenizer, in_float32(vqvae_tensors(wanted, levels, read_tensors(path, VQVAE_NESTED), str(path))))


def network_of(wanted: Mapping[str, Tensor], sides: Sequence[int], path: Path) -> dict[str, Tensor]:
    """Tensors of all but the tokenizer from a published file, a bundle or a run; adapters, where it has any, too.

    A restorer takes from a model of classes what fits: no prefix, no level embedding of another schedule, and of the
    classes the first ones; it may be some of the wanted tensors then, else it is all.

    Args:
        wanted: of the network to be filled, by the names of `weights.published.varsr`.
        sides: of its schedule.
        path: the file.
    Raises:
        UserError: no such file (says which to get), or one that does not fit.
    """
    source = str(path)
    published, adapters = dict[str, Tensor](), dict[str, Tensor]()
    if is_run(path) or is_bundle(path):
        given, adapters = split_adapters(held_in(path, "transformer"))
    else:
        check_part("transformer", path, PUBLISHED)
        published = read_tensors(path, TRANSFORMER_NESTED)
        kind, names = network_kind(published), {name: published_varsr_name(name) for name in wanted}
        if kind not in KINDS:
            raise UserError(f"{path} is no transformer of VAR or VARSR; get {PUBLISHED['transformer']}")
        left = published.keys() - set(names.values()) - {LEVELS, MASK, "pos_1LC"}
        left = {name for name in left if not name.endswith("zero_k_bias")}
        if left and kind != "varsr":
            more = f"{min(left)} and {len(left) - 1} more"
            raise UserError(f"{path} does not fit the model, which has no place for {more}")
        given = {name: published[theirs] for name, theirs in names.items() if theirs in published}
    is_class_model, makes_one = (not any(n.startswith("prefix_encoder.") for n in some) for some in (given, wanted))
    if is_class_model and not makes_one:
        return in_float32(class_to_restoration(wanted, given, source)) | adapters
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
    if published:
        return in_float32(varsr_tensors(wanted, sides, published, source))
    check_names_and_shapes(wanted, given, source)
    return given | adapters


def class_to_restoration(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """What a restorer takes of a model of classes (C2I, VAR), by our names.

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

    UserError: a file is missing, one of them is another network, or the sides of its scales are unknown.
    """
    tensors = read_tensors(path, TRANSFORMER_NESTED)
    kind = network_kind(tensors)
    if kind not in KINDS:
        held = "a tokenizer" if kind == "vqvae" else "none"
        raise UserError(f"{path} holds {held}; give {PUBLISHED['transformer']}")
    tokenizer = Path(tokenizer_file).expanduser() if tokenizer_file else path.parent / VQVAE_FILE
    check_part("tokenizer", tokenizer, PUBLISHED)
    sizes = varsr_sizes(tensors)
    if LEVELS in tensors and not tensors[LEVELS].is_meta:
        counts = torch.bincount(tensors[LEVELS].flatten().long()).tolist()
        sides = [1, *(math.isqrt(count) for count in counts[1:])]
    elif sizes["num_levels"] in SIDES:
        sides = list(SIDES[sizes["num_levels"]])
    else:
        known = " or ".join(map(str, SIDES))
        raise UserError(f"{LEVELS} is missing, and {sizes['num_levels']} scales are not {known}: the sides are unknown")
    own = ("width", "depth", "num_heads", "num_classes", "num_levels")
    transformer = {name: sizes[name] for name in own}
    if kind == "var":
        transformer |= {"positions": "rows", "position_size": tensors["pos_1LC"].shape[1]}
    refiner = {"width": sizes["refiner_width"], "depth": sizes["refiner_depth"]}
    guidance = {"varsr": (6.0, "linear"), "c2i": (4.0, "ahead"), "var": (1.5, "linear")}[kind]
    return {
        "schedule": {"sides": sides},
        "tokenizer": vqvae_sizes(read_tensors(tokenizer, VQVAE_NESTED)),
        "transformer": transformer,
        "prefix": {"channels": sizes["prefix_channels"]} if kind == "varsr" else None,
        "refiner": None if kind == "var" else refiner,
        "sampling": {"guidance": guidance[0], "growth": guidance[1], "raw_last": kind != "var"},
        "weights": {"tokenizer": str(tokenizer), "transformer": str(path)},
    }
