"""Two-dimensional rotary positions over the grids of all scales (Infinity, section 3.3; spec B, RoPE).

Shapes: `L` tokens, `D` head dimension, `N` heads.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from varestorer.tokenizer.schedule import Scale

BASE = 10000.0


def grid_positions(scale: Scale, reference: Scale, round_positions: bool = True) -> Tensor:
    """(row, column) of each token of a scale, on the grid of a reference scale.

    Args:
        scale: (h, w) of the tokens.
        reference: (H, W) of the grid that positions are measured on.
        round_positions: to the nearest integer, halves to even (Infinity); False keeps fractions (VARSR).

    Returns:
        (h * w, 2) float32, row-major.
    """
    rows = torch.arange(scale[0], dtype=torch.float32) * reference[0] / scale[0]
    columns = torch.arange(scale[1], dtype=torch.float32) * reference[1] / scale[1]
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2)
    return grid.round() if round_positions else grid


def angles(positions_L2: Tensor, head_dim: int) -> Tensor:
    """Angle of each pair of a head's channels: the first half turns with rows, the second with columns, (L, D/2)."""
    num_frequencies = head_dim // 4
    exponents = torch.arange(num_frequencies, dtype=torch.float32) * 4 / head_dim
    frequencies = 1.0 / BASE**exponents
    return (positions_L2[:, :, None] * frequencies).reshape(-1, head_dim // 2)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept must serve training too
def rope_table(scales: tuple[Scale, ...], head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the tokens of all `scales` in order, measured on the last scale; each (L, D/2) float32."""
    positions = torch.cat([grid_positions(scale, scales[-1]) for scale in scales])
    table = angles(positions, head_dim)
    return table.cos(), table.sin()


def rotate(x_BNLD: Tensor, cos_LD: Tensor, sin_LD: Tensor) -> Tensor:
    """Turn each pair of channels (2m, 2m + 1) by its token's angle: (a, b) -> (ca - sb, sa + cb)."""
    even, odd = x_BNLD[..., 0::2], x_BNLD[..., 1::2]
    turned = torch.stack((cos_LD * even - sin_LD * odd, sin_LD * even + cos_LD * odd), dim=-1)
    return turned.flatten(-2)


def rotate_complex(x_BNLD: Tensor, turns_LD: Tensor) -> Tensor:
    """The same numbers by one complex product, for float32; `turns_LD` is cos + i sin, complex64."""
    pairs = torch.view_as_complex(x_BNLD.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns_LD).flatten(-2)
