"""The degraded image as tokens before the sequence: what VARSR restores from (VARSR, section 3.2, prefix tokens).

Shapes: `B` batch, `H W` pixels, `C` width of the transformer, `l` prefix tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from varestorer.utils.errors import UserError

CHANNELS = (32, 128, 256, 512, 1536)


class PrefixEncoder(nn.Module):
    """3x3 convolutions with SiLU between them; a token for every 16x16 pixels.

    Args:
        width: C.
        channels: after the first convolution, and after each of those that halve the size; the published ones do not
            depend on C.
    Raises:
        UserError: fewer than two numbers of channels.
    """

    def __init__(self, width: int, channels: Sequence[int] = CHANNELS) -> None:
        super().__init__()
        if len(channels) < 2:
            raise UserError(f"prefix channels must be at least two numbers, got {list(channels)}")
        self.stride = 2 ** (len(channels) - 1)
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for before, after in pairwise(channels):
            self.blocks.append(nn.Conv2d(before, before, 3, padding=1))
            self.blocks.append(nn.Conv2d(before, after, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(channels[-1], width, 3, padding=1)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights for training from scratch.

        By fan-in, other than the published network's constant 0.02: with few channels nothing of the image would come
        through ten layers of that (1e-12 with 8).
        """
        for layer in (self.conv_in, *self.blocks, self.conv_out):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, lq_B3HW: Tensor) -> Tensor:
        """Tokens (B, l, C) of the image, row-major.

        Args:
            lq_B3HW: in [-1, 1], at the size of the result; H, W multiples of `stride`.
        Raises:
            ValueError: wrong rank, channels or size.
        """
        if lq_B3HW.ndim != 4 or lq_B3HW.shape[1] != 3 or any(side % self.stride for side in lq_B3HW.shape[-2:]):
            wanted = f"(B, 3, H, W) with sides that are multiples of {self.stride} pixels"
            raise ValueError(f"the prefix encoder wants images {wanted}, got {tuple(lq_B3HW.shape)}; pad first")
        x = F.silu(self.conv_in(lq_B3HW))
        for conv in self.blocks:
            x = F.silu(conv(x))
        return rearrange(self.conv_out(x), "b c h w -> b (h w) c")
