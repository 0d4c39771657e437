"""Sizes of a published network, read from the names and shapes of its tensors (real ones, or on the meta device)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from varestorer.utils.errors import UserError
from varestorer.weights.published import STUDENT_FILE, TOKENIZER_FILE, TRANSFORMER_FILE

TRANSFORMER_KIND = f"a transformer such as {TRANSFORMER_FILE} or {STUDENT_FILE}"
TOKENIZER_KIND = f"a tokenizer such as {TOKENIZER_FILE}"


def transformer_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `TransformerConfig`.

    Args:
        tensors: a published teacher or student.

    Raises:
        UserError: a tensor that tells a size is missing or of another rank.
    """
    width, latent_width = _shape(tensors, TRANSFORMER_KIND, 2, "word_embed.weight")
    block = f"{first_block(tensors)}."
    text_length, text_width = _shape(tensors, TRANSFORMER_KIND, 2, "cfg_uncond")
    return {
        "width": width,
        "depth": len(_blocks(tensors)),
        "num_heads": _shape(tensors, TRANSFORMER_KIND, 4, f"{block}sa.scale_mul_1H11")[1],
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
    """Arguments of `TokenizerConfig`.

    Args:
        tensors: a published tokenizer, its names with or without the `.conv` and `.norm` infixes.

    Raises:
        UserError: a tensor that tells a size is missing or of another rank.
    """
    channels, image_channels, *_ = _convolution(tensors, "encoder.conv_in")
    levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    widths = [_convolution(tensors, f"encoder.down.{level}.block.0.conv1")[0] for level in range(max(levels, 1))]
    latent_width = _convolution(tensors, "encoder.conv_out")[0]
    _convolution(tensors, "decoder.up.0.block.0.conv1")
    return {
        "channels": channels,
        "multipliers": tuple(width // channels for width in widths),
        "latent_width": latent_width,
        "num_encoder_blocks": _count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "num_decoder_blocks": _count(tensors, r"decoder\.up\.0\.block\.(\d+)\."),
        "patch_size": math.isqrt(image_channels // 3),
    }


def first_block(tensors: Mapping[str, Tensor]) -> str:
    """Published name of the first block: `block_chunks.0.module.0`, also where the file has none."""
    return min(_blocks(tensors), default="block_chunks.0.module.0")


def _blocks(tensors: Mapping[str, Tensor]) -> set[str]:
    found = (re.match(r"block_chunks\.\d+\.module\.\d+(?=\.)", name) for name in tensors)
    return {match[0] for match in found if match}


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers the names have where the pattern's group is."""
    return len({match[1] for match in (re.match(pattern, name) for name in tensors) if match})


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
