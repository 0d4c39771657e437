"""Names and sizes of the published VAR and VARSR networks, as functions of ours; see `published` for the mechanism.

One table serves VAR's and VARSR's VQ-VAE, another one VAR, VARSR and VARSR's class-to-image model (C2I). The files
also carry tensors that follow from the configuration: they are checked where they are there.

Shapes: `T` tokens of the whole sequence, `C` width, `K` scales, `V` codes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from varestorer.utils.errors import UserError
from varestorer.weights.published import Table, count_of, from_published, translate

VARSR_FILE = "VARSR.pth"
VQVAE_FILE = "VQVAE.pth"
TRANSFORMER_NESTED = ("trainer", "var_wo_ddp")
VQVAE_NESTED = ("trainer", "vae_local")
"""Where VARSR's files hold the state dict (`files.read_tensors`); VAR's own are flat."""

VQVAE = {"use_attention": True, "use_quant_conv": True, "num_phi": 4, "enlarge": "bicubic", "shrink": "area"}
"""What makes a tokenizer VAR's."""
USAGE = "quantize.ema_vocab_hit_SV"
"""How often each code was used in training, of as many scales as that had: no part of the network."""
LEVELS = "lvl_1L"
MASK = "attn_bias_for_masking"

VARSR_TABLE: Table = (
    (r"^start$", "pos_start"),
    (r"^positions\.table$", "pos_1LC"),
    (r"^condition\.embedding\.", "class_emb."),
    (r"^level_embed\.", "lvl_embed."),
    (r"^prefix_encoder\.", "con_embedding."),
    (r"^head_modulation\.", "head_nm.ada_lin.1."),
    (r"^refiner_norm\.", "decoder_norm."),
    (r"^refiner\.time_embed\.fc1\.", "diffloss.net.time_embed.mlp.0."),
    (r"^refiner\.time_embed\.fc2\.", "diffloss.net.time_embed.mlp.2."),
    (r"^refiner\.cond_embed\.", "diffloss.net.cond_embed."),
    (r"^refiner\.word_embed\.", "diffloss.net.input_proj."),
    (r"^refiner\.head_modulation\.", "diffloss.net.final_layer.adaLN_modulation.1."),
    (r"^refiner\.head\.", "diffloss.net.final_layer.linear."),
    (r"^refiner\.blocks\.(\d+)\.norm\.", r"diffloss.net.res_blocks.\1.in_ln."),
    (r"^refiner\.blocks\.(\d+)\.fc1\.", r"diffloss.net.res_blocks.\1.mlp.0."),
    (r"^refiner\.blocks\.(\d+)\.fc2\.", r"diffloss.net.res_blocks.\1.mlp.2."),
    (r"^refiner\.blocks\.(\d+)\.modulation\.", r"diffloss.net.res_blocks.\1.adaLN_modulation.1."),
    (r"^(blocks\.\d+)\.modulation\.", r"\1.ada_lin.1."),
    (r"^(blocks\.\d+)\.self_attention\.qkv\.", r"\1.attn.mat_qkv."),
    (r"^(blocks\.\d+)\.self_attention\.log_scale$", r"\1.attn.scale_mul_1H11"),
    (r"^(blocks\.\d+)\.self_attention\.", r"\1.attn."),
)


def published_varsr_name(name: str) -> str:
    """Our transformer's name -> that of `VARSR.pth`, `VARSR_C2I.pth` or `var_d*.pth`."""
    return translate(name, VARSR_TABLE)


def published_vqvae_name(name: str, num_levels: int) -> str:
    """The name of our tokenizer with attention -> that of `VQVAE.pth` or `vae_ch160v4096z32.pth`."""
    last = num_levels - 1

    def up(match: re.Match[str]) -> str:
        return f"decoder.up.{last - int(match[1])}."

    table: Table = (
        (r"^encoder\.levels\.(\d+)\.", r"encoder.down.\1."),
        (r"^decoder\.levels\.(\d+)\.", up),
        (r"^(encoder\.down\.\d+)\.resample\.", r"\1.downsample."),
        (r"^(decoder\.up\.\d+)\.resample\.", r"\1.upsample."),
        (r"\.blocks\.", ".block."),
        (r"\.attentions\.", ".attn."),
        (r"\.middle\.0\.", ".mid.block_1."),
        (r"\.middle\.1\.", ".mid.attn_1."),
        (r"\.middle\.2\.", ".mid.block_2."),
        (r"(\.attn(?:\.\d+|_1))\.proj\.", r"\1.proj_out."),
        (r"\.shortcut\.", ".nin_shortcut."),
        (r"^quantizer\.(?:.*\.)?entries$", "quantize.embedding.weight"),
        (r"^quantizer\.(?:.*\.)?convs\.", "quantize.quant_resi.qresi_ls."),
    )
    return translate(name, table)


def sequence_levels(sides: Sequence[int], num_first: int) -> Tensor:
    """Level of each token of square scales, (T,) int64; 0 for the prefix and the class token (rows of `pos_start`)."""
    counts = torch.tensor([num_first, *(side * side for side in sides[1:])])
    return torch.arange(len(sides)).repeat_interleave(counts)


def derived_tensor(name: str, levels_T: Tensor, width: int) -> Tensor | None:
    """What a published tensor of this name must be if it follows from the configuration; None for all others."""
    if name == LEVELS:
        return levels_T[None]
    if name == MASK:
        is_seen_TT = levels_T[:, None] >= levels_T[None, :]
        return torch.zeros(is_seen_TT.shape).masked_fill_(~is_seen_TT, float("-inf"))[None, None]
    return torch.zeros(width) if name.endswith(".attn.zero_k_bias") else None


def varsr_tensors(
    wanted: Mapping[str, Tensor], sides: Sequence[int], tensors: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Tensors of a published VAR, VARSR or C2I (`source`, for messages) under our names.

    What follows from the configuration need not be there. `wanted` is the state dict of a network of the same sizes, on
    any device; the sides are those of its schedule. UserError: names what is missing, unexpected or misshapen, or a
    derived tensor of another value.
    """
    names = {name: published_varsr_name(name) for name in wanted}
    levels_T, width = sequence_levels(sides, wanted["start"].shape[1]), wanted["start"].shape[-1]
    derived = {name: derived_tensor(name, levels_T, width) for name in tensors}
    return from_published(wanted, tensors, names, {n: t for n, t in derived.items() if t is not None}, source)


def vqvae_tensors(
    wanted: Mapping[str, Tensor], num_levels: int, tensors: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Tensors of a published VQ-VAE (`source`, for messages), with or without the usage of the codes, under our names.

    `wanted` is the state dict of a tokenizer of the same sizes, on any device, with so many levels of its autoencoder.
    UserError: names what is missing, unexpected or misshapen.
    """
    names = {name: published_vqvae_name(name, num_levels) for name in wanted}
    network = {name: tensor for name, tensor in tensors.items() if name != USAGE}
    return from_published(wanted, network, names, {}, source)


def network_kind(names: Iterable[str]) -> str | None:
    """Which network a file of these names holds: "varsr", "c2i", "var", "vqvae", or None."""
    there = set(names)
    if "quantize.embedding.weight" in there:
        return "vqvae"
    if "pos_1LC" in there:
        return "var"
    if "decoder_norm.weight" in there:
        return "varsr" if "con_embedding.conv_in.weight" in there else "c2i"
    return None


def varsr_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes of a published VAR, VARSR or C2I; UserError, naming it: a tensor that tells a size is missing.

    `num_classes` are the rows of the class embedding, `num_first` the tokens of the first block; `prefix_channels`,
    `refiner_width` and `refiner_depth` are None where there are none.
    """
    prefix = [_rows(tensors, "con_embedding.conv_in.weight")] if "con_embedding.conv_in.weight" in tensors else None
    if prefix is not None:
        halvings = count_of(tensors, r"con_embedding\.blocks\.(\d+)\.") // 2
        prefix += [_rows(tensors, f"con_embedding.blocks.{2 * i + 1}.weight") for i in range(halvings)]
    has_refiner = "diffloss.net.input_proj.weight" in tensors
    num_codes, width = _shape(tensors, "head.weight")
    return {
        "width": width,
        "depth": count_of(tensors, r"blocks\.(\d+)\."),
        "num_heads": _shape(tensors, "blocks.0.attn.scale_mul_1H11")[1],
        "num_codes": num_codes,
        "code_width": _shape(tensors, "word_embed.weight")[1],
        "num_classes": _rows(tensors, "class_emb.weight"),
        "num_levels": _rows(tensors, "lvl_embed.weight"),
        "num_first": _shape(tensors, "pos_start")[1],
        "prefix_channels": None if prefix is None else tuple(prefix),
        "refiner_width": _rows(tensors, "diffloss.net.input_proj.weight") if has_refiner else None,
        "refiner_depth": count_of(tensors, r"diffloss\.net\.res_blocks\.(\d+)\.") if has_refiner else None,
    }


def vqvae_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes of a published VQ-VAE, as arguments of `TokenizerConfig`.

    UserError: a tensor that tells a size is missing; names it.
    """
    channels = _rows(tensors, "encoder.conv_in.weight")
    num_levels = count_of(tensors, r"encoder\.down\.(\d+)\.")
    widths = [_rows(tensors, f"encoder.down.{level}.block.0.conv1.weight") for level in range(num_levels)]
    num_codes, code_width = _shape(tensors, "quantize.embedding.weight")
    return {
        "channels": channels,
        "multipliers": tuple(width // channels for width in widths),
        "num_encoder_blocks": count_of(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "num_decoder_blocks": count_of(tensors, r"decoder\.up\.0\.block\.(\d+)\."),
        "vocabulary": num_codes,
        "latent_width": code_width,
        **VQVAE,
    }


def _rows(tensors: Mapping[str, Tensor], name: str) -> int:
    return _shape(tensors, name)[0]


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in tensors or tensors[name].ndim < 2:
        problem = f"has the shape {tuple(tensors[name].shape)}" if name in tensors else "is missing"
        raise UserError(f"{name} {problem}: this is no file of VAR or VARSR such as {VARSR_FILE} or {VQVAE_FILE}")
    return tuple(tensors[name].shape)
