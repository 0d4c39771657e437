"""H-VAR."""

from __future__ import annotations

import math

from einops import rearrange
from torch import Tensor

from varestorer.tokenizer.residual import resize_bicubic


def enlarged_grid(rows_1NC: Tensor, side: int) -> Tensor:
    """A learned square grid of positions, (1, N, C) row-major, enlarged bicubically to (1, side^2, C)."""
    grid_1Chw = rearrange(rows_1NC, "1 (h w) c -> 1 c h w", h=math.isqrt(rows_1NC.shape[1]))
    return rearrange(resize_bicubic(grid_1Chw, (side, side)), "1 c h w -> 1 (h w) c")
