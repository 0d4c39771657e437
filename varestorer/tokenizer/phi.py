"""Convolutions that smooth the enlarged codes before they are summed (VAR, section 3.2: phi).

Shapes: `B` batch, `Z` width of a code, `h w` latent positions, `K` scales.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn


class Phi(nn.Module):
    """A few 3x3 convolutions that the scales share: phi(x) = (1 - share) x + share conv(x), with the nearest conv.

    Args:
        channels: Z.
        num_convs: how many there are for all scales.
        share: of the convolution in the result.
    """

    def __init__(self, channels: int, num_convs: int = 4, share: float = 0.5) -> None:
        super().__init__()
        self.share = share
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(num_convs))

    def forward(self, codes_BZhw: Tensor, k: int, num_scales: int) -> Tensor:
        """Smooth the codes of scale k (from 0) of K, already enlarged to the latent size."""
        conv = self.convs[phi_index(k, num_scales, len(self.convs))]
        return codes_BZhw * (1 - self.share) + conv(codes_BZhw) * self.share


def phi_index(k: int, num_scales: int, num_convs: int = 4) -> int:
    """Which convolution scale k (from 0) takes: that of the tick nearest to k / (K - 1).

    The ticks are the middles of `num_convs` equal parts of [0, 1], except that four, the published number, stand at
    1/12, ..., 11/12. An odd K has a tie at 1/2: the first minimum in float64 decides, so these ticks are NumPy's.
    """
    first = 1 / 3 / num_convs if num_convs == 4 else 1 / 2 / num_convs
    ticks = np.linspace(first, 1 - first, num_convs)
    return int(np.argmin(np.abs(ticks - k / max(num_scales - 1, 1))))
