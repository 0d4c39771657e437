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
from varestorer.transformer.blocks import Block, BlockContext, modulate
from varestorer.transformer.layout import TokenLayout
from varestorer.transformer.masks import BlockCausal
from varestorer.transformer.text import TextContext, TextFeatures, TextPath, distinct_rows

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


@dataclass(frozen=True)
class PreparedText:
    """All that a transformer makes of a text before it sees tokens: computed once, used for any number of passes.

    It belongs to the network as it was: with its adapters on or off, in its precision, with its weights. The network
    refuses it after the adapters are switched or merged or the precision changes; after other changes of the weights
    it has to be made again by the caller.

    Attributes:
        cond_BC: pooled text. Prepared for one prompt, it serves tokens of any batch.
        blocks: what each block needs.
        head_B1C: gain and shift of the head's norm.
        state: of the network, see `VARTransformer.text_state`.
    """

    cond_BC: Tensor
    blocks: tuple[BlockContext, ...]
    head_B1C: tuple[Tensor, Tensor]
    state: tuple[object, ...]


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
        # drawing an embedding's weights on the meta device would import sympy and torch's compiler: seconds
        self.level_embed = nn.Embedding.from_pretrained(torch.zeros(config.num_levels, width), freeze=False)
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

    def prepare(self, text: TextFeatures | TextContext) -> PreparedText:
        """Do all that depends on the text and the weights alone; for weights that rest (no gradients are kept back)."""
        context = self.text(text) if isinstance(text, TextFeatures) else text
        with self._precision(context.cond_BC.device):
            blocks = tuple(block.prepare(context) for block in cast(Iterable[Block], self.blocks))
        head = self._head_norm(context.cond_BC)
        return PreparedText(context.cond_BC, blocks, head, self.text_state())

    def text_state(self) -> tuple[object, ...]:
        """What, beside the weights' values, decides what a text becomes: precision, device, adapters."""
        attention = cast(Block, self.blocks[0]).cross_attention
        adapters_off = getattr(attention.kv, "disable_adapters", None)
        return attention.v_bias.dtype, attention.v_bias.device, attention.use_v_bias, adapters_off

    def embed(self, tokens_BLZ: Tensor | None, context: TextContext | PreparedText, layout: TokenLayout) -> Tensor:
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
            batch_size = len(context.cond_BC if tokens_BLZ is None else tokens_BLZ)
            parts.insert(0, (context.cond_BC[:, None] + self.start).expand(batch_size, -1, -1))
        elif len(layout) != num_tokens:
            raise ValueError(f"layout has {len(layout)} tokens, the inputs {num_tokens} (or one less, for the start)")
        return torch.cat(parts, dim=1) + self.level_embed(layout.levels_L)

    def forward(
        self,
        tokens_BLZ: Tensor | None,
        text: TextFeatures | TextContext | PreparedText,
        layout: TokenLayout,
        mask: Tensor | BlockCausal | None = None,
        cache: list[LayerCache] | None = None,
        after_block: AfterBlock | None = None,
        num_outputs: int | None = None,
    ) -> Tensor:
        """Logits of the bits of every token of the layout.

        Args:
            tokens_BLZ: next-scale inputs (`TokenPyramid.inputs`, or what `PyramidConditioner` makes), see `embed`.
            text: features of the prompts, the context made from them, or all that is made from them (`prepare`).
            layout: level and position of each token.
            mask: `BlockCausal`, or (L, L_keys) bool, True where attention is allowed; None lets all see all.
            cache: one entry per block; keys and values are added to it and looked up in it.
            after_block: may change the tokens after each block (guidance inside the network).
            num_outputs: how many tokens are asked: the first ones, which see the others still; None for all. The last
                block leaves out what only the others need.

        Returns:
            logits (B, L, Z, 2) float32 of the tokens asked: the pair [bit is 0, bit is 1].

        Raises:
            ValueError: the text was prepared by this network in another state.
        """
        context = self.text(text) if isinstance(text, TextFeatures) else text
        if isinstance(context, PreparedText) and context.state != self.text_state():
            raise ValueError("this text was prepared before adapters or precision changed: call prepare(text) again")
        x_BLC = self.embed(tokens_BLZ, context, layout)
        last = len(self.blocks) - 1
        with self._precision(x_BLC.device):
            for number, block in enumerate(self.blocks):
                factors = None if self.branch_factors_BD3 is None else self.branch_factors_BD3[:, number]
                of_block = context.blocks[number] if isinstance(context, PreparedText) else context
                past, asked = cache[number] if cache else None, num_outputs if number == last else None
                x_BLC = self._run(block, x_BLC, of_block, layout, mask, past, factors, asked)
                if after_block is not None:
                    x_BLC = after_block(number, x_BLC)
        head = context.head_B1C if isinstance(context, PreparedText) else self._head_norm(context.cond_BC)
        return self._predict(x_BLC, *head)

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

    def _head_norm(self, cond_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Gain and shift of the norm before the head, (B, 1, C) float32."""
        with _no_autocast(cond_BC.device):
            cond_BC = distinct_rows(cond_BC).float()
            scale, shift = self.head_modulation(F.silu(cond_BC))[:, None].chunk(2, dim=-1)
            return 1 + scale, shift

    def _predict(self, x_BLC: Tensor, gain_B1C: Tensor, shift_B1C: Tensor) -> Tensor:
        """The head, always in float32: logits (B, L, Z, 2) of tokens that left the last block."""
        with _no_autocast(x_BLC.device):
            logits = self.head(modulate(x_BLC.float(), gain_B1C, shift_B1C))
        return rearrange(logits, "b l (z two) -> b l z two", two=2)


def _no_autocast(device: torch.device) -> AbstractContextManager:
    """Float32, whatever the caller chose; the meta device, on which costs are counted, knows no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
