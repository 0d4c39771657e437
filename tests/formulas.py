"""Floating-point operations of the networks, by formula from their sizes.

Two operations for a multiplication with its addition, and nothing for norms and activations, as torch's counter has
it. The formulas follow the description of the networks and know nothing of the code, so that the two check each other.

Shapes: `B` batch, `L` tokens, `T` text tokens, `C` width, `E` width of the text encoder, `Z` bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from varestorer.systems.varestorer import VARestorer
from varestorer.tokenizer import ScaleSchedule, TokenizerConfig
from varestorer.transformer import TransformerConfig
from varestorer.transformer.blocks import ffn_width
from varestorer.transformer.layout import BlockCausal, PositionRule, pyramid_layout


def linear(rows: int, inputs: int, outputs: int) -> int:
    """A product of matrices (rows, inputs) x (inputs, outputs)."""
    return 2 * rows * inputs * outputs


def attention(queries: int, keys: int, width: int) -> int:
    """Scores and weighted sum, all heads together."""
    return 2 * linear(queries, width, keys)


def convolution(positions: int, inputs: int, outputs: int, side: int = 3) -> int:
    """A convolution of a side x side kernel at a number of output positions."""
    return linear(positions, inputs * side**2, outputs)


def transformer_flops(
    config: TransformerConfig, num_tokens: int, num_text: int, num_predicted: int, rank: int = 0
) -> int:
    """One pass over a sequence in which all tokens see all, the text's part included.

    Args:
        config: sizes.
        num_tokens: L, the start token included.
        num_text: T.
        num_predicted: tokens that the last block hands on to the head; the others it only makes keys and values of.
        rank: of adapters that are not merged, on all layers of the attentions and none of the feed-forward.
    """
    width, bits = config.width, config.latent_width
    blocks = (config.depth - 1) * _block_flops(width, num_tokens, num_tokens, num_text, rank)
    blocks += _block_flops(width, num_tokens, num_predicted, num_text, rank)
    ends = linear(num_tokens - 1, bits, width) + linear(num_predicted, width, 2 * bits)
    return blocks + ends + text_flops(config, num_text, rank)


def text_flops(config: TransformerConfig, num_text: int, rank: int = 0) -> int:
    """What does not depend on the tokens: the text path, every block's keys and values of it, the head's modulation."""
    width, text = config.width, config.text_width
    pool = linear(num_text, text, 2 * width) + attention(1, num_text, width) + linear(1, width, width)
    memory = linear(num_text, text, width) + linear(num_text, width, width)
    of_block = linear(num_text, width, 2 * width) + linear(num_text, rank, 3 * width)
    return pool + memory + linear(1, width, 6 * width) + linear(1, width, 2 * width) + config.depth * of_block


def _block_flops(width: int, num_tokens: int, num_outputs: int, num_text: int, rank: int) -> int:
    """A block that looks at all its tokens and hands on some; its keys and values of the text are there."""
    after = 3 * linear(1, width, width) + 2 * linear(1, width, ffn_width(width))
    adapters = num_tokens * linear(1, rank, 4 * width) + num_outputs * 3 * linear(1, rank, 2 * width)
    of_tokens = num_tokens * linear(1, width, 3 * width) + num_outputs * after
    return of_tokens + attention(num_outputs, num_tokens, width) + attention(num_outputs, num_text, width) + adapters


def encoder_flops(config: TokenizerConfig, side: int) -> int:
    """The tokenizer's encoder on a square of `side` pixels."""
    side //= config.patch_size
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    flops, width = convolution(side**2, 3 * config.patch_size**2, config.channels), config.channels
    for level, outputs in enumerate(widths):
        flops += _res_blocks(side**2, width, outputs, config.num_encoder_blocks)
        width = outputs
        if level < len(widths) - 1:
            side //= 2
            flops += convolution(side**2, width, width)
    return flops + _res_blocks(side**2, width, width, 2) + convolution(side**2, width, config.latent_width)


def decoder_flops(config: TokenizerConfig, side: int) -> int:
    """The tokenizer's decoder to a square of `side` pixels."""
    side //= config.stride
    widths = [config.channels * multiplier for multiplier in reversed(config.multipliers)]
    width = widths[0]
    flops = convolution(side**2, config.latent_width, width) + _res_blocks(side**2, width, width, 2)
    for level, outputs in enumerate(widths):
        flops += _res_blocks(side**2, width, outputs, config.num_decoder_blocks)
        width = outputs
        if level < len(widths) - 1:
            side *= 2
            flops += convolution(side**2, width, width)
    return flops + convolution(side**2, width, 3 * config.patch_size**2)


def swinir_flops(sizes: Mapping[str, Any], side: int) -> int:
    """A SwinIR that folds pixels into channels, on a square of `side` pixels.

    Args:
        sizes: as `conditioning.restorer.PUBLISHED_SIZES`.
        side: multiple of the window and of the folding.
    """
    width, hidden, num_features = sizes["embed_dim"], int(sizes["embed_dim"] * sizes["mlp_ratio"]), 64
    fold, window = sizes["start_unshuffle"], sizes["window_size"]
    tokens = (side // fold) ** 2
    layer = tokens * (linear(1, width, 4 * width) + 2 * linear(1, width, hidden) + attention(1, window**2, width))
    body = sum(depth * layer + convolution(tokens, width, width) for depth in sizes["depths"])
    ends = convolution(tokens, 3 * fold**2, width) + convolution(tokens, width, width)
    flops = ends + body + convolution(tokens, width, num_features)
    for doubling in range(1, sizes["upscale"].bit_length()):
        flops += convolution(tokens * 4**doubling, num_features, num_features)
    return flops + convolution(side**2, num_features, num_features) + convolution(side**2, num_features, 3)


def t5_flops(config: Any, num_tokens: int) -> int:
    """A gated T5 encoder on one prompt.

    Args:
        config: transformers' `T5Config`.
        num_tokens: of the prompt.
    """
    inner = config.num_heads * config.d_kv
    layer = linear(num_tokens, config.d_model, 4 * inner) + 3 * linear(num_tokens, config.d_model, config.d_ff)
    return int(config.num_layers * (layer + attention(num_tokens, num_tokens, inner)))


def _res_blocks(positions: int, inputs: int, outputs: int, number: int) -> int:
    """Blocks of two 3x3 convolutions; a 1x1 one where the first changes the width."""
    shortcut = convolution(positions, inputs, outputs, side=1) if inputs != outputs else 0
    first = convolution(positions, inputs, outputs) + shortcut + convolution(positions, outputs, outputs)
    return first + (number - 1) * 2 * convolution(positions, outputs, outputs)


def generation_flops(system: VARestorer, words: frozenset[str], batch_size: int) -> tuple[int, int, int]:
    """Operations of a way to generate, the text prepared; tokens that pass the network, and passes."""
    sizes, samples = system.transformer.config, batch_size * (2 if "cfg" in words else 1)
    passes = _passes(system.schedule, words, system.student_config.long_input)
    num_text = sizes.text_length
    flops = samples * sum(_pass_flops(sizes, one, num_text) for one in passes)
    return flops, samples * sum(one.tokens for one in passes), len(passes)


@dataclass(frozen=True)
class _Pass:
    """A pass of one sample through the network.

    Attributes:
        tokens: that enter.
        outputs: that leave the last block.
        pairs: of a token and one that it is compared with, in a block.
        output_pairs: in the last block, where only outputs ask.
        has_start: whether the start token, which has no input, is among them.
        num_ready: tokens of a prefix, which were embedded before.
    """

    tokens: int
    outputs: int
    pairs: int
    output_pairs: int
    has_start: bool = True
    num_ready: int = 0


def _passes(schedule: ScaleSchedule, words: frozenset[str], has_long_input: bool) -> list[_Pass]:
    """The passes of a variant; one whose scales do not see later ones compares as `BlockCausal` does."""
    num_tokens, image = schedule.num_tokens, schedule.num_tokens_per_scale[-1]
    if "one" in words:
        entering = num_tokens + (image if has_long_input and "short" not in words else 0)
        return [_Pass(entering, num_tokens, entering**2, num_tokens * entering)]
    ends = [tokens.stop for tokens in schedule.slices]
    if "nocache" not in words:
        ahead = image if "prefix" in words else 0
        first = ends[0] + ahead
        passes = [_Pass(first, ends[0], first**2, ends[0] * first, num_ready=ahead)]
        for new, end in zip(schedule.num_tokens_per_scale[1:], ends[1:], strict=True):
            passes.append(_Pass(new, new, new * (end + ahead), new * (end + ahead), has_start=False))
        return passes
    pairs = zip(ends, schedule.num_tokens_per_scale, strict=True)
    if "prefix" in words:
        return [_Pass(end + image, new, (end + image) ** 2, new * (end + image), num_ready=image) for end, new in pairs]
    layout = pyramid_layout(schedule, PositionRule("rope", 4), torch.device("cpu"))

    def num_pairs(asked: slice, end: int) -> int:
        calls = BlockCausal.of(layout[:end]).calls(asked, end)
        return sum((asking.stop - asking.start) * keys for asking, keys, _ in calls)

    return [_Pass(e, new, num_pairs(slice(e), e), num_pairs(slice(e - new, e), e)) for e, new in pairs]


def _pass_flops(sizes: TransformerConfig, one: _Pass, num_text: int) -> int:
    """Operations of one pass, the text prepared."""
    width = sizes.width
    alone = transformer_flops(sizes, one.tokens, num_text, one.outputs) - text_flops(sizes, num_text)
    alone -= linear(one.num_ready, sizes.latent_width, width)
    if not one.has_start:
        alone += linear(1, sizes.latent_width, width)
    blocks = (sizes.depth - 1) * attention(1, one.pairs - one.tokens**2, width)
    return alone + blocks + attention(1, one.output_pairs - one.outputs * one.tokens, width)
