"""The published files of Infinity and VARestorer: names of their tensors, sizes read from them, ours in their form.

One table per network turns our name into the published one. `_tensors` functions go from a file to ours, strictly:
every tensor has a place, and every place its tensor. `published_` functions go the other way.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varestorer.tokenizer import MultiScaleTokenizer, TokenizerConfig
from varestorer.transformer import TransformerConfig, VARTransformer
from varestorer.transformer.adapters import attach_adapters, plain_state_dict
from varestorer.utils.errors import UsageError, UserError, reason
from varestorer.weights.files import Differences, differences
from varestorer.weights.published import (
    STUDENT_FILE,
    TOKENIZER_FILE,
    TRANSFORMER_FILE,
    Table,
    count_of,
    from_published,
    to_published,
    translate,
)
from varestorer.weights.restorers import published_restorer_tensors

LFQ_MASKS = ("quantizer.lfq.mask", "quantize.lfq.mask")  # one tensor under two names; a file may have either or both
TRANSFORMER_KIND = f"a transformer such as {TRANSFORMER_FILE} or {STUDENT_FILE}"
TOKENIZER_KIND = f"a tokenizer such as {TOKENIZER_FILE}"
BLOCK = r"block_chunks\.\d+\.module\.(\d+)\."
TEACHER = "infinity_2b"
STUDENT = "varestorer_student_lora_r32"
TOKENIZER = "infinity_vae_d32"
RESTORER = "general_swinir"
KINDS = (TEACHER, STUDENT, TOKENIZER, RESTORER)
NUM_CHUNKS = 8  # the published blocks are stored in
RANK = 32


def published_tokenizer_name(name: str, num_levels: int) -> str:
    """Our tokenizer's name -> `infinity_vae_d32reg.pth`'s, with the `.conv` and `.norm` infixes."""
    last = num_levels - 1
    table: Table = (
        (r"^encoder\.levels\.(\d+)\.blocks\.", r"encoder.down.\1.block."),
        (r"^encoder\.levels\.(\d+)\.resample\.conv\.", r"encoder.down.\1.downsample.conv.conv."),
        (r"^decoder\.levels\.(\d+)\.blocks\.", lambda m: f"decoder.up.{last - int(m.group(1))}.block."),
        (
            r"^decoder\.levels\.(\d+)\.resample\.conv\.",
            lambda m: f"decoder.up.{last - int(m.group(1))}.upsample.conv.conv.",
        ),
        (r"\.middle\.(\d)\.", lambda m: f".mid.block_{int(m.group(1)) + 1}."),
        (r"\.shortcut\.", ".nin_shortcut.conv."),
        (r"\.(conv1|conv2|conv_in|conv_out)\.", r".\1.conv."),
        (r"\.(norm1|norm2|norm_out)\.", r".\1.norm."),
    )
    return translate(name, table)


def published_transformer_name(name: str, blocks_per_chunk: int) -> str:
    """Our transformer's plain name -> `infinity_2b_reg.pth`'s, or `varestorer.pth`'s for adapters."""

    def block(match: re.Match[str]) -> str:
        number = int(match.group(1))
        return f"block_chunks.{number // blocks_per_chunk}.module.{number % blocks_per_chunk}."

    table: Table = (
        (r"^condition\.null_features$", "cfg_uncond"),
        (r"^condition\.norm\.", "text_norm."),
        (r"^condition\.pool\.query$", "text_proj_for_sos.ca.mat_q"),
        (r"^condition\.pool\.kv\.", "text_proj_for_sos.ca.mat_kv."),
        (r"^condition\.pool\.", "text_proj_for_sos.ca."),
        (r"^condition\.memory\.", "text_proj_for_ca."),
        (r"^condition\.modulation\.", "shared_ada_lin.1."),
        (r"^start$", "pos_start"),
        (r"^level_embed\.", "lvl_embed."),
        (r"^head_modulation\.", "head_nm.ada_lin.1."),
        (r"^blocks\.(\d+)\.", block),
        (r"\.modulation$", ".ada_gss"),
        (r"\.self_attention\.qkv\.", ".sa.mat_qkv."),
        (r"\.self_attention\.log_scale$", ".sa.scale_mul_1H11"),
        (r"\.self_attention\.", ".sa."),
        (r"\.cross_norm\.", ".ca_norm."),
        (r"\.cross_attention\.(q|kv)\.", r".ca.mat_\1."),
        (r"\.cross_attention\.", ".ca."),
    )
    return translate(name, table)


def derived_transformer_buffers(published: Mapping[str, Tensor] | Iterable[str], width: int) -> dict[str, Tensor]:
    """The `zero_k_bias` of every attention, all zero, under published names."""
    attentions = {name.removesuffix("v_bias") for name in published if name.endswith(".v_bias")}
    return {f"{attention}zero_k_bias": torch.zeros(width) for attention in sorted(attentions)}


def derived_tokenizer_buffers(num_bits: int, names: Iterable[str] = LFQ_MASKS) -> dict[str, Tensor]:
    """The powers of two that would number the codes, under those of their two names that a file has, or the first."""
    there = set(names).intersection(LFQ_MASKS) or LFQ_MASKS[:1]
    mask = 2 ** torch.arange(num_bits - 1, -1, -1, dtype=torch.int64)
    return {name: mask.clone() for name in LFQ_MASKS if name in there}


def add_infixes(tensors: Mapping[str, Tensor], published: Iterable[str]) -> dict[str, Tensor]:
    """Tokenizer files also come without the `.conv` and `.norm` infixes: give such names their full form.

    A name stays as it is where the file has the full form as well: it is one too many then.
    """
    full = {re.sub(r"\.(conv|norm)(?=\.(weight|bias)$)", "", name): name for name in published}
    full_names = set(full.values())

    def longer(name: str) -> str:
        is_bare = name not in full_names and full.get(name, name) not in tensors
        return full.get(name, name) if is_bare else name

    return {longer(name): tensor for name, tensor in tensors.items()}


def transformer_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `TransformerConfig` of a published teacher or student.

    UserError: a tensor that tells a size is missing or of another rank.
    """
    width, latent_width = _shape(tensors, TRANSFORMER_KIND, 2, "word_embed.weight")
    block = min(_blocks(tensors), default="block_chunks.0.module.0")
    text_length, text_width = _shape(tensors, TRANSFORMER_KIND, 2, "cfg_uncond")
    return {
        "width": width,
        "depth": len(_blocks(tensors)),
        "num_heads": _shape(tensors, TRANSFORMER_KIND, 4, f"{block}.sa.scale_mul_1H11")[1],
        "latent_width": latent_width,
        "text_width": text_width,
        "text_length": text_length,
        "num_levels": _shape(tensors, TRANSFORMER_KIND, 2, "lvl_embed.weight")[0],
    }


def adapter_rank(tensors: Mapping[str, Tensor]) -> int:
    """Rank of the adapters of a published student; 0 without adapters."""
    downs = (tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_down.weight"))
    return next(downs, 0)


def tokenizer_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `TokenizerConfig` of a published tokenizer, with or without the `.conv` and `.norm` infixes.

    UserError: a tensor that tells a size is missing or of another rank.
    """
    channels, image_channels, *_ = _convolution(tensors, "encoder.conv_in")
    levels = count_of(tensors, r"encoder\.down\.(\d+)\.")
    widths = [_convolution(tensors, f"encoder.down.{level}.block.0.conv1")[0] for level in range(max(levels, 1))]
    latent_width = _convolution(tensors, "encoder.conv_out")[0]
    _convolution(tensors, "decoder.up.0.block.0.conv1")
    return {
        "channels": channels,
        "multipliers": tuple(width // channels for width in widths),
        "latent_width": latent_width,
        "num_encoder_blocks": count_of(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "num_decoder_blocks": count_of(tensors, r"decoder\.up\.0\.block\.(\d+)\."),
        "patch_size": math.isqrt(image_channels // 3),
    }


def _blocks(tensors: Mapping[str, Tensor]) -> set[str]:
    found = (re.match(r"block_chunks\.\d+\.module\.\d+(?=\.)", name) for name in tensors)
    return {match[0] for match in found if match}


def _convolution(tensors: Mapping[str, Tensor], layer: str) -> tuple[int, ...]:
    """Shape of a convolution's weight: (out, in, height, width)."""
    return _shape(tensors, TOKENIZER_KIND, 4, f"{layer}.conv.weight", f"{layer}.weight")


def _shape(tensors: Mapping[str, Tensor], kind: str, rank: int, *names: str) -> tuple[int, ...]:
    """Shape of the first of the given names that is there."""
    for name in names:
        if name in tensors:
            shape = tuple(tensors[name].shape)
            if len(shape) != rank:
                raise UserError(f"{name} has the shape {shape}, wanted {rank} dimensions: this is not {kind}")
            return shape
    raise UserError(f"no tensor {names[0]}: this is not {kind}")


def tokenizer_tensors(
    wanted: Mapping[str, Tensor], num_levels: int, latent_width: int, tensors: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Tensors of a published tokenizer (`source`, for messages) under our names.

    `wanted` is the state dict of a `MultiScaleTokenizer` of the same sizes, on any device, with so many levels of its
    autoencoder. UserError: names what is missing, unexpected or misshapen.
    """
    names = {name: published_tokenizer_name(name, num_levels) for name in wanted}
    tensors = add_infixes(tensors, names.values())
    return from_published(wanted, tensors, names, derived_tokenizer_buffers(latent_width, tensors), source)


def transformer_tensors(
    wanted: Mapping[str, Tensor], width: int, tensors: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Tensors of a published teacher, or student (base and adapters, known by their names), under our plain names.

    `wanted` is a `VARTransformer`'s state dict under plain names, on any device; for a teacher's file without the
    adapters. UserError: names what is missing, unexpected or misshapen.
    """
    names = transformer_names(wanted, blocks_per_chunk(tensors))
    return from_published(wanted, tensors, names, derived_transformer_buffers(names.values(), width), source)


def transformer_names(plain: Mapping[str, Tensor], per_chunk: int) -> dict[str, str]:
    """Ours -> published for the tensors of a transformer; the base of a layer with adapters is called `X.linear.`."""
    adapted = {name.removesuffix(".lora_down.weight") for name in plain if name.endswith(".lora_down.weight")}
    names = {name: published_transformer_name(name, per_chunk) for name in plain}
    for name, published in names.items():
        layer, _, leaf = name.rpartition(".")
        names[name] = f"{published.removesuffix(leaf)}linear.{leaf}" if layer in adapted else published
    return names


def blocks_per_chunk(tensors: Mapping[str, Tensor]) -> int:
    """Blocks are stored in chunks: how many in each, read from the names (1 where there are none)."""
    numbers = [int(found[1]) for found in (re.match(BLOCK, name) for name in tensors) if found]
    return max(numbers, default=0) + 1


def manifest(kind: str) -> dict[str, Tensor]:
    """Names, shapes and types of a published file (one of `KINDS`), as tensors whose values do not count."""
    if kind == RESTORER:
        return published_restorer_tensors()
    with torch.device("meta"):
        if kind == TOKENIZER:
            return published_tokenizer(MultiScaleTokenizer(TokenizerConfig()))
        transformer = VARTransformer(TransformerConfig())
        if kind == STUDENT:
            attach_adapters(transformer, RANK, cross_value_bias=False)
        return published_transformer(transformer)


def kind_of(names: Mapping[str, Tensor]) -> str | None:
    """Which published file the names are nearest to; None if none."""
    marks = {
        STUDENT: ("block_chunks.", ".lora_down."),  # a file of adapters alone has the second only
        TEACHER: ("block_chunks.",),
        TOKENIZER: ("encoder.down.",),
        RESTORER: (".residual_group.",),
    }
    for kind, wanted in marks.items():
        if all(any(mark in name for name in names) for mark in wanted):
            return kind
    return None


def published_tokenizer(tokenizer: MultiScaleTokenizer) -> dict[str, Tensor]:
    """A tokenizer's tensors by published names, derived ones included."""
    state = tokenizer.state_dict()
    names = {name: published_tokenizer_name(name, len(tokenizer.config.multipliers)) for name in state}
    return to_published(state, names, derived_tokenizer_buffers(tokenizer.config.latent_width))


def published_transformer(transformer: VARTransformer) -> dict[str, Tensor]:
    """A transformer's tensors by published names, derived ones included; with adapters, as a student's."""
    plain = plain_state_dict(transformer)
    depth = transformer.config.depth
    names = transformer_names(plain, depth // NUM_CHUNKS if depth % NUM_CHUNKS == 0 else 1)
    return to_published(plain, names, derived_transformer_buffers(names.values(), transformer.config.width))


def part_tensors(system: Any, part: str) -> dict[str, Tensor]:
    """A part ("transformer", "tokenizer" or "restorer") of a VARestorer by published names; UserError: it has none."""
    if part == "transformer":
        return published_transformer(system.transformer)
    if part == "tokenizer":
        return published_tokenizer(system.tokenizer)
    if system.restorer is None:
        raise UserError("this model has no restorer to write")
    return dict(system.restorer.published_state_dict())


@dataclass(frozen=True)
class Comparison:
    """How a file compares with a manifest.

    Attributes:
        found: names that are missing, unexpected or misshapen (a shape, or an integer for a floating type).
        mapped, total: tensors of the manifest that the file holds in the right shape, and all.
        types: how many tensors of the file are of which type.
        retyped: how many of the mapped are of another floating type than in the manifest.
    """

    found: Differences
    mapped: int
    total: int
    types: dict[str, int]
    retyped: int


def read_manifest(path: str | Path) -> dict[str, Tensor]:
    """A manifest's tensors on the meta device; UsageError without such a file, UserError if it is no manifest."""
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        with torch.device("meta"):
            return {name: torch.empty(x["shape"], dtype=getattr(torch, x["dtype"])) for name, x in entries.items()}
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
