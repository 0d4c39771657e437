"""One block: modulated self attention, cross attention, modulated feed-forward (spec B, Block).

Shapes: `B` batch, `L` tokens, `C` width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varestorer.transformer.attention import CrossAttention, LayerCache, SelfAttention
from varestorer.transformer.layout import TokenLayout
from varestorer.transformer.text import TextContext

EPS = 1e-6


def modulate(x_BLC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor) -> Tensor:
    """Layer norm without weights, then (1 + scale) and shift (AdaLN)."""
    return F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=EPS) * (1 + scale_B1C) + shift_B1C


def scaled(x_BLC: Tensor, factor_B: Tensor | None) -> Tensor:
    """Each sample times its factor; None for no change."""
    return x_BLC if factor_B is None else x_BLC * factor_B[:, None, None]


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

    def forward(
        self,
        x_BLC: Tensor,
        context: TextContext,
        layout: TokenLayout,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        factors_B3: Tensor | None = None,
    ) -> Tensor:
        """Tokens after the block; `factors_B3` multiplies its branches (see `drop_path`), None leaves them."""
        factors = (None,) * 3 if factors_B3 is None else factors_B3.unbind(dim=1)
        modulation = self.modulation + context.modulation_B6C
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(dim=2)
        branch = gamma1 * self.self_attention(modulate(x_BLC, scale1, shift1), layout, mask, cache)
        x_BLC = x_BLC + scaled(branch, factors[0])
        branch = self.cross_attention(self.cross_norm(x_BLC), context.memory_BTC, context.key_mask)
        x_BLC = x_BLC + scaled(branch, factors[1])
        return x_BLC + scaled(gamma2 * self.ffn(modulate(x_BLC, scale2, shift2)), factors[2])
