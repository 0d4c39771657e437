"""One block: modulated self attention, cross attention, modulated feed-forward (spec B, Block).

Shapes: `B` batch, `L` tokens, `C` width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varestorer.transformer.attention import CrossAttention, CrossMemory, LayerCache, SelfAttention, SelfConstants
from varestorer.transformer.layout import TokenLayout
from varestorer.transformer.masks import BlockCausal
from varestorer.transformer.text import TextContext

EPS = 1e-6


@dataclass(frozen=True)
class BlockContext:
    """What a block makes of the text and of its own vectors: all that does not depend on the tokens.

    Attributes:
        gammas_B1C: factors of self attention and of the feed-forward; here and below one row, or one for each sample.
        gains_B1C: 1 + scale of the adaptive norms before both.
        shifts_B1C: of these norms.
        self_constants: of self attention.
        memory: of cross attention.
    """

    gammas_B1C: tuple[Tensor, Tensor]
    gains_B1C: tuple[Tensor, Tensor]
    shifts_B1C: tuple[Tensor, Tensor]
    self_constants: SelfConstants
    memory: CrossMemory


def modulate(x_BLC: Tensor, gain_B1C: Tensor, shift_B1C: Tensor) -> Tensor:
    """Layer norm without weights of its own, then times gain = 1 + scale, plus shift (AdaLN), all float32."""
    if len(gain_B1C) == 1:  # one text for all: a layer norm with weights, in one pass
        return F.layer_norm(x_BLC, x_BLC.shape[-1:], gain_B1C.flatten(), shift_B1C.flatten(), EPS)
    return torch.addcmul(shift_B1C, F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=EPS), gain_B1C)


def add_branch(x_BLC: Tensor, branch_BLC: Tensor, gamma_B1C: Tensor | None, factor_B: Tensor | None) -> Tensor:
    """x + gamma * branch, and the branch of each sample times its factor; None for 1."""
    if factor_B is not None:
        branch_BLC = branch_BLC * factor_B[:, None, None]
    return x_BLC + branch_BLC if gamma_B1C is None else torch.addcmul(x_BLC, gamma_B1C, branch_BLC)


def ffn_width(width: int) -> int:
    """Four times the width, rounded to a multiple of 256 (halves to even), at least 256."""
    return max(1, round(4 * width / 256)) * 256


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BLC), approximate="tanh"))


class Float32LayerNorm(nn.LayerNorm):
    """Layer norm in float32, whatever precision its weights are kept in (spec E)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class Block(nn.Module):
    """A transformer block whose modulation is a learned part plus one shared by all blocks."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(1, 1, 6, width))
        self.self_attention = SelfAttention(width, num_heads)
        self.cross_norm = Float32LayerNorm(width, eps=EPS)
        self.cross_attention = CrossAttention(width, num_heads)
        self.ffn = FeedForward(width, ffn_width(width))

    def prepare(self, context: TextContext) -> BlockContext:
        """What does not depend on the tokens."""
        modulation = (self.modulation + context.modulation_B6C).float()
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(dim=2)
        memory = self.cross_attention.memory(context.memory_BTC, context.key_mask)
        constants = self.self_attention.constants()
        return BlockContext((gamma1, gamma2), (1 + scale1, 1 + scale2), (shift1, shift2), constants, memory)

    def forward(
        self,
        x_BLC: Tensor,
        context: TextContext | BlockContext,
        layout: TokenLayout,
        mask: Tensor | BlockCausal | None = None,
        cache: LayerCache | None = None,
        factors_B3: Tensor | None = None,
        num_outputs: int | None = None,
    ) -> Tensor:
        """Tokens after the block.

        Args:
            x_BLC: tokens before it.
            context: of the text; prepared, if more than one pass is to use it.
            layout: level and position of each token.
            mask: see `VARTransformer.forward`.
            cache: keys and values of self attention.
            factors_B3: of its branches, see `drop_path`; None leaves them.
            num_outputs: how many tokens go on: the first ones; the others are only seen by them. None for all.
        """
        text = context if isinstance(context, BlockContext) else self.prepare(context)
        factors = (None,) * 3 if factors_B3 is None else factors_B3.unbind(dim=1)
        gamma, gain, shift = text.gammas_B1C, text.gains_B1C, text.shifts_B1C
        normed = modulate(x_BLC, gain[0], shift[0])
        branch = self.self_attention(normed, text.self_constants, layout, mask, cache, num_outputs)
        x_BLC = add_branch(x_BLC[:, :num_outputs], branch, gamma[0], factors[0])
        branch = self.cross_attention(self.cross_norm(x_BLC), text.memory)
        x_BLC = add_branch(x_BLC, branch, None, factors[1])
        return add_branch(x_BLC, self.ffn(modulate(x_BLC, gain[1], shift[1])), gamma[1], factors[2])
