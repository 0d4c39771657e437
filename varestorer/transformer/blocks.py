"""One block: modulated self attention, cross attention where there is text, modulated feed-forward (VAR, Infinity).

Shapes: `B` batch, `L` tokens, `C` width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from varestorer.transformer.attention import ALL, CrossAttention, CrossMemory, LayerCache, SelfAttention, SelfConstants
from varestorer.transformer.conditions import Context, distinct_rows
from varestorer.transformer.layout import TokenLayout
from varestorer.transformer.masks import BlockCausal

EPS = 1e-6


@dataclass(frozen=True)
class BlockContext:
    """What a block makes of the condition and of its own vectors: all that does not depend on the tokens.

    Attributes:
        gammas_B1C: factors of self attention and of the feed-forward; here and below one row, or one for each sample.
        gains_B1C: 1 + scale of the adaptive norms before both.
        shifts_B1C: of these norms.
        self_constants: of self attention.
        memory: of cross attention; None without.
    """

    gammas_B1C: tuple[Tensor, Tensor]
    gains_B1C: tuple[Tensor, Tensor]
    shifts_B1C: tuple[Tensor, Tensor]
    self_constants: SelfConstants
    memory: CrossMemory | None


def modulate(x_BLC: Tensor, gain_B1C: Tensor, shift_B1C: Tensor) -> Tensor:
    """Layer norm without weights of its own, then times gain = 1 + scale, plus shift (AdaLN), all float32."""
    if len(gain_B1C) == 1:  # one condition for all: a layer norm with weights, in one pass
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
    """Layer norm in float32, whatever precision its weights are kept in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class Block(nn.Module):
    """A transformer block.

    Args:
        width: C.
        num_heads: of self and cross attention.
        hidden: width of the feed-forward's hidden layer.
        has_text: cross attention to text, and a modulation that is a learned part plus one shared by all blocks
            (Infinity). Else there is none, and each block makes its modulation of the condition itself (VAR).
    """

    def __init__(self, width: int, num_heads: int, hidden: int, has_text: bool) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(1, 1, 6, width)) if has_text else nn.Linear(width, 6 * width)
        self.self_attention = SelfAttention(width, num_heads)
        self.cross_norm = Float32LayerNorm(width, eps=EPS) if has_text else None
        self.cross_attention = CrossAttention(width, num_heads) if has_text else None
        self.ffn = FeedForward(width, hidden)

    def prepare(self, context: Context) -> BlockContext:
        """What does not depend on the tokens."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self._modulation(context).float().unbind(dim=2)
        memory = None
        if self.cross_attention is not None and context.memory_BTC is not None:
            memory = self.cross_attention.memory(context.memory_BTC, context.key_mask)
        constants = self.self_attention.constants()
        return BlockContext((gamma1, gamma2), (1 + scale1, 1 + scale2), (shift1, shift2), constants, memory)

    def _modulation(self, context: Context) -> Tensor:
        """(B, 1, 6, C): gamma, gamma, scale, scale, shift, shift."""
        if isinstance(self.modulation, nn.Linear):
            own = self.modulation(F.silu(distinct_rows(context.cond_BC)))
            return rearrange(own, "b (six c) -> b 1 six c", six=6)
        if context.modulation_B6C is None:
            raise TypeError("blocks with a shared modulation need the context of a text")
        return self.modulation + context.modulation_B6C

    def forward(
        self,
        x_BLC: Tensor,
        context: Context | BlockContext,
        layout: TokenLayout,
        mask: Tensor | BlockCausal | None = None,
        cache: LayerCache | None = None,
        factors_B3: Tensor | None = None,
        asked: slice = ALL,
    ) -> Tensor:
        """Tokens after the block.

        Args:
            x_BLC: tokens before it.
            context: of the condition; prepared, if more than one pass is to use it.
            layout: level and position of each token.
            mask: see `VARTransformer.forward`.
            cache: keys and values of self attention.
            factors_B3: of its branches (self attention, cross attention, feed-forward), see `drop_path`; None leaves
                them.
            asked: tokens that go on; the others are only seen by them.
        """
        prepared = context if isinstance(context, BlockContext) else self.prepare(context)
        factors = (None,) * 3 if factors_B3 is None else factors_B3.unbind(dim=1)
        gamma, gain, shift = prepared.gammas_B1C, prepared.gains_B1C, prepared.shifts_B1C
        normed = modulate(x_BLC, gain[0], shift[0])
        branch = self.self_attention(normed, prepared.self_constants, layout, mask, cache, asked)
        x_BLC = add_branch(x_BLC[:, asked], branch, gamma[0], factors[0])
        if self.cross_attention is not None and self.cross_norm is not None:
            branch = self.cross_attention(self.cross_norm(x_BLC), prepared.memory)
            x_BLC = add_branch(x_BLC, branch, None, factors[1])
        return add_branch(x_BLC, self.ffn(modulate(x_BLC, gain[1], shift[1])), gamma[1], factors[2])
