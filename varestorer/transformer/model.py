"""The visual autoregressive transformer; teacher and student are this one network (Infinity, section 3; spec B).

Shapes: `B` batch, `L` tokens of a sequence, `C` width, `Z` bits per token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from einops import rearrange
from torch import Tensor, nn

from varestorer.transformer.adapters import adapters_are_on, adapters_off
from varestorer.transformer.attention import LayerCache
from varestorer.transformer.blocks import Block, modulate
from varestorer.transformer.layout import TokenLayout
from varestorer.transformer.text import TextContext, TextFeatures, TextPath

# Called with (block number, tokens) after each block; returns the tokens that go on.
AfterBlock = Callable[[int, Tensor], Tensor]

# Parameters of more than one dimension that weight decay leaves alone (spec F).
UNDECAYED = re.compile(r"(^|\.)(text\.(null_features|pool\.query)|start|level_embed\.weight|modulation|log_scale)$")


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a transformer; the defaults are Infinity-2B (2,204,564,032 parameters).

    Attributes:
        width: C.
        depth: number of blocks.
        num_heads: heads of self and cross attention.
        num_bits: Z, bits per token.
        text_width: width of the text encoder's features.
        text_length: rows of the learned null text.
        num_levels: rows of the level embedding; at least one more than the scales of a schedule.
        gamma_init: factor on the initial gates of the blocks (from scratch; Infinity's 5e-6 suits long runs).
    """

    width: int = 2048
    depth: int = 32
    num_heads: int = 16
    num_bits: int = 32
    text_width: int = 2048
    text_length: int = 512
    num_levels: int = 15
    gamma_init: float = 5e-6

    def __post_init__(self) -> None:
        if self.width % self.num_heads or (self.width // self.num_heads) % 4:
            raise ValueError(
                f"width / num_heads must be a multiple of 4 (2-D rotary pairs), got {self.width} / {self.num_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.width // self.num_heads


class VARTransformer(nn.Module):
    """Predicts the bits of every token. The mask and the layout are arguments: scale-causal for the teacher,
    none for the student."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.text = TextPath(config.text_width, config.text_length, width)
        self.start = nn.Parameter(torch.zeros(1, 1, width))
        self.word_embed = nn.Linear(config.num_bits, width)
        self.level_embed = nn.Embedding(config.num_levels, width)
        self.blocks = nn.ModuleList(Block(width, config.num_heads) for _ in range(config.depth))
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, 2 * config.num_bits)
        self.checkpoint_activations = False
        self.branch_factors_BD3: Tensor | None = None

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights for training from scratch (spec F, Init)."""
        std = math.sqrt(1 / (3 * self.config.width))
        for name, parameter in self.named_parameters():
            if ".lora_" in name:
                continue
            if name.endswith((".q_bias", ".v_bias", ".bias")):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            elif name.endswith("log_scale"):
                nn.init.constant_(parameter, math.log(4.0))
            elif not name.endswith(".modulation"):
                nn.init.trunc_normal_(parameter, std=std, a=-2, b=2, generator=generator)
        for block in cast(Iterable[Block], self.blocks):
            for layer in (block.self_attention.proj, block.cross_attention.proj, block.ffn.fc2):
                layer.weight.div_(math.sqrt(2 * self.config.depth))
            block.modulation.normal_(std=self.config.width**-0.5, generator=generator)
            block.modulation[:, :, :2].mul_(self.config.gamma_init)
            block.modulation[:, :, 2:].mul_(1e-3)
        self.head.weight.mul_(0.02)
        self.head_modulation.weight.mul_(1e-3)

    def embed(self, tokens_BLZ: Tensor | None, context: TextContext, layout: TokenLayout) -> Tensor:
        """The sequence that enters block 0.

        Args:
            tokens_BLZ: inputs of the tokens, or None for the start token alone.
            context: encoded text.
            layout: of the whole sequence. Where it has one token more than `tokens_BLZ`, the start token (pooled
                text plus a learned position) comes first.
        """
        parts = [] if tokens_BLZ is None else [self.word_embed(tokens_BLZ)]
        num_tokens = 0 if tokens_BLZ is None else tokens_BLZ.shape[1]
        if len(layout) == num_tokens + 1:
            parts.insert(0, context.cond_BC[:, None] + self.start)
        elif len(layout) != num_tokens:
            raise ValueError(f"layout has {len(layout)} tokens, the inputs {num_tokens} (or one less, for the start)")
        return torch.cat(parts, dim=1) + self.level_embed(layout.levels_L)

    def forward(
        self,
        tokens_BLZ: Tensor | None,
        text: TextFeatures | TextContext,
        layout: TokenLayout,
        mask: Tensor | None = None,
        cache: list[LayerCache] | None = None,
        after_block: AfterBlock | None = None,
    ) -> Tensor:
        """Logits of the bits of every token of the layout.

        Args:
            tokens_BLZ: next-scale inputs (`TokenPyramid.inputs` or `.long_inputs`), see `embed`.
            text: features of the prompts, or the context made from them.
            layout: level and position of each token.
            mask: (L, L_keys) bool, True where attention is allowed; None lets all see all.
            cache: one entry per block; keys and values are added to it and looked up in it.
            after_block: may change the tokens after each block (guidance inside the network).

        Returns:
            logits (B, L, Z, 2) float32: the pair [bit is 0, bit is 1].
        """
        context = self.text(text) if isinstance(text, TextFeatures) else text
        x_BLC = self.embed(tokens_BLZ, context, layout)
        with self._precision(x_BLC.device):
            for number, block in enumerate(self.blocks):
                factors = None if self.branch_factors_BD3 is None else self.branch_factors_BD3[:, number]
                x_BLC = self._run(block, x_BLC, context, layout, mask, cache[number] if cache else None, factors)
                if after_block is not None:
                    x_BLC = after_block(number, x_BLC)
        return self.predict(x_BLC, context.cond_BC)

    def _precision(self, device: torch.device) -> AbstractContextManager:
        """Blocks kept in bfloat16 compute their matrix products in it, as the released ones do (spec E)."""
        if self.blocks[0].modulation.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def _run(self, block: nn.Module, *args: object) -> Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            # the backward pass computes the block again when `adapters_off` may have ended long ago
            again = nullcontext() if adapters_are_on(block) else adapters_off(block)
            checkpoint = torch.utils.checkpoint.checkpoint
            return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again))
        return block(*args)

    def predict(self, x_BLC: Tensor, cond_BC: Tensor) -> Tensor:
        """The head, always in float32: logits (B, L, Z, 2) of tokens that left the last block."""
        with _no_autocast(x_BLC.device):
            scale, shift = self.head_modulation(F.silu(cond_BC.float()))[:, None].chunk(2, dim=-1)
            logits = self.head(modulate(x_BLC.float(), scale, shift))
        return rearrange(logits, "b l (z two) -> b l z two", two=2)


def _no_autocast(device: torch.device) -> AbstractContextManager:
    """Float32, whatever the caller chose; the meta device, on which costs are counted, knows no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
