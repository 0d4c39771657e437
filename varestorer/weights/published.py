"""Names of tensors in the published files, as functions of ours (spec A, B, C; one table per network).

Each table turns one of our names into the published one; the way back is the inverted dictionary. Tensors that the
published files carry but that follow from the configuration ("derived") are checked on load and written on export.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from varestorer.utils.errors import UserError

Table = Iterable[tuple[str, str | Callable[[re.Match[str]], str]]]

TRANSFORMER_FILE = "infinity_2b_reg.pth"
TOKENIZER_FILE = "infinity_vae_d32reg.pth"
STUDENT_FILE = "varestorer.pth"


def _translate(name: str, table: Table) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


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
    return _translate(name, table)


def published_transformer_name(name: str, blocks_per_chunk: int) -> str:
    """Our transformer's plain name -> `infinity_2b_reg.pth`'s, or `varestorer.pth`'s for adapters."""

    def block(match: re.Match[str]) -> str:
        number = int(match.group(1))
        return f"block_chunks.{number // blocks_per_chunk}.module.{number % blocks_per_chunk}."

    table: Table = (
        (r"^text\.null_features$", "cfg_uncond"),
        (r"^text\.norm\.", "text_norm."),
        (r"^text\.pool\.query$", "text_proj_for_sos.ca.mat_q"),
        (r"^text\.pool\.kv\.", "text_proj_for_sos.ca.mat_kv."),
        (r"^text\.pool\.", "text_proj_for_sos.ca."),
        (r"^text\.memory\.", "text_proj_for_ca."),
        (r"^text\.modulation\.", "shared_ada_lin.1."),
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
    return _translate(name, table)


def published_student_name(name: str, blocks_per_chunk: int, adapted: set[str]) -> str:
    """As `published_transformer_name`, with `X.linear.` for the base of the layers named in `adapted`."""
    layer, _, leaf = name.rpartition(".")
    published = published_transformer_name(name, blocks_per_chunk)
    if layer in adapted:
        return published.removesuffix(leaf) + "linear." + leaf
    return published


def adapted_layers(names: Iterable[str]) -> set[str]:
    """Layers that carry adapters, from plain names."""
    return {name.removesuffix(".lora_down.weight") for name in names if name.endswith(".lora_down.weight")}


def derived_transformer_buffers(published: Mapping[str, Tensor] | Iterable[str], width: int) -> dict[str, Tensor]:
    """The `zero_k_bias` of every attention, all zero, under published names."""
    attentions = {name.removesuffix("v_bias") for name in published if name.endswith(".v_bias")}
    return {f"{attention}zero_k_bias": torch.zeros(width) for attention in sorted(attentions)}


def derived_tokenizer_buffers(num_bits: int, names: Iterable[str]) -> dict[str, Tensor]:
    """The powers of two that would number the codes, under those of the given names that are there."""
    mask = 2 ** torch.arange(num_bits - 1, -1, -1, dtype=torch.int64)
    return {name: mask for name in ("quantizer.lfq.mask", "quantize.lfq.mask") if name in set(names)}


def from_published(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], derived: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Tensors of a published file under our names.

    Args:
        tensors: the file's content.
        names: ours -> published.
        derived: published name -> the value it must have; these do not become ours.
        source: the file, for messages.

    Raises:
        UserError: a derived tensor has another value. (Missing and unexpected names are for `check_names_and_shapes`
            to find: unexpected ones keep their published name.)
    """
    for name, value in derived.items():
        if name in tensors and not torch.equal(tensors[name].to(value.dtype), value):
            raise UserError(f"{source}: {name} has other values than the configuration gives")
    ours = {published: name for name, published in names.items()}
    return {ours.get(name, name): tensor for name, tensor in tensors.items() if name not in derived}


def to_published(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], derived: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The inverse of `from_published`."""
    return {names[name]: tensor for name, tensor in tensors.items()} | dict(derived)


def add_infixes(tensors: Mapping[str, Tensor], published: Iterable[str]) -> dict[str, Tensor]:
    """Tokenizer files also come without the `.conv` and `.norm` infixes: give such names their full form."""
    full = {re.sub(r"\.(conv|norm)(?=\.(weight|bias)$)", "", name): name for name in published}
    full_names = set(full.values())
    return {name if name in full_names else full.get(name, name): tensor for name, tensor in tensors.items()}
