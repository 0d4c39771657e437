"""Names of tensors in the published files, as functions of ours (spec A, B, C; one table per network).

Each table turns one of our names into the published one; the way back is the inverted dictionary. Tensors that the
published files carry but that follow from the configuration ("derived") must be there, are checked on load and
written on export.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from varestorer.utils.errors import UserError
from varestorer.weights.files import check_names_and_shapes

Table = Iterable[tuple[str, str | Callable[[re.Match[str]], str]]]

TRANSFORMER_FILE = "infinity_2b_reg.pth"
TOKENIZER_FILE = "infinity_vae_d32reg.pth"
STUDENT_FILE = "varestorer.pth"
LFQ_MASKS = ("quantizer.lfq.mask", "quantize.lfq.mask")  # one tensor under two names; a file may have either or both


def translate(name: str, table: Table) -> str:
    """The name after all replacements of the table, one after the other."""
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


def derived_tokenizer_buffers(num_bits: int, names: Iterable[str] = LFQ_MASKS) -> dict[str, Tensor]:
    """The powers of two that would number the codes, under those of their two names that a file has, or the first."""
    there = set(names).intersection(LFQ_MASKS) or LFQ_MASKS[:1]
    mask = 2 ** torch.arange(num_bits - 1, -1, -1, dtype=torch.int64)
    return {name: mask.clone() for name in LFQ_MASKS if name in there}


def from_published(
    wanted: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str],
    derived: Mapping[str, Tensor],
    source: str,
) -> dict[str, Tensor]:
    """Tensors of a published file under our names.

    Args:
        wanted: tensors of the shapes that ours must have, by our names.
        tensors: the file's content.
        names: ours -> published.
        derived: published name -> the value it must have; the file must hold these too, and they do not become ours.
        source: the file, for messages.

    Raises:
        UserError: lists what is missing, unexpected or misshapen, or names a derived tensor of another value.
    """
    shapes = {names[name]: tensor for name, tensor in wanted.items()}
    check_names_and_shapes(shapes | dict(derived), tensors, source)
    check_derived(tensors, derived, source)
    return {name: tensors[published] for name, published in names.items()}


def check_derived(tensors: Mapping[str, Tensor], derived: Mapping[str, Tensor], source: str) -> None:
    """Refuse a file whose derived tensors have other values than the configuration gives.

    Raises:
        UserError: names the first.
    """
    for name, value in derived.items():
        if not torch.equal(tensors[name].to(value.dtype), value):
            raise UserError(f"{source}: {name} has other values than the configuration gives")


def to_published(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], derived: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The inverse of `from_published`."""
    return {names[name]: tensor for name, tensor in tensors.items()} | dict(derived)


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


def published_restorer_name(name: str, unshuffled: bool) -> str:
    """Our restorer's name -> `general_swinir_v1.ckpt`'s.

    Args:
        name: such as `network.conv_first.weight`.
        unshuffled: whether the network folds pixels into channels first; its first convolution is then the second
            of two published layers.
    """
    table: Table = ((r"^network\.", ""), (r"^conv_first\.", "conv_first.1." if unshuffled else "conv_first."))
    return translate(name, table)
