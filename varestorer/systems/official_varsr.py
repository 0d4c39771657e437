"""VARSR's released inference around the network, step by step; for parity, not for use.

What it does, and what restoring with tiles does instead:

- 8 bits between all steps; ours stays in floats and resizes once.
- Non-square images are squashed, or in the tiled mode stretched a little (each side to a multiple of 64 pixels); ours
  keeps the aspect.
- Tiles are blended as latents, with weights whose middle lies half a position lower for rows than for columns.
- The colors' result is truncated to 8 bits, which darkens it by half a level; ours is rounded.

Shapes: `H W` pixels, `h w` latent positions, `t` tiles of one row, `Z` width of a code. Arrays end in `3` because
Pillow's do.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from varestorer.utils.color import match_color_8bit
from varestorer.utils.images import from_levels, from_network, to_levels, to_network
from varestorer.utils.tiling import tile_positions

STRIDE = 16
TILE, OVERLAP = 32, 8  # latent positions
SIDE = TILE * STRIDE
COLOR = "adain"
VARIANCE = 0.01  # of the tiles' weights, their side taken for 1

Encode = Callable[[Tensor], Tensor]
"""Enlarged tiles of one row (t, 3, 512, 512) in [-1, 1] -> their latents (t, Z, 32, 32), refined; first row first."""
Decode = Callable[[Tensor], Tensor]
"""Latents (1, Z, h, w) -> image (1, 3, H, W) in [-1, 1]."""


def restore_square(lq_HW3: np.ndarray, encode: Encode, decode: Decode) -> np.ndarray:
    """The whole image as one square, whatever its aspect (`test_varsr`): uint8 (H, W, 3) to (512, 512, 3)."""
    # the released script looks at the height alone: an image 512 high has to be 512 wide
    square_HW3 = lq_HW3 if lq_HW3.shape[0] == SIDE else resized(lq_HW3, (SIDE, SIDE))
    latents = encode(to_network(from_levels(square_HW3)[None]))
    image_HW3 = to_levels(from_network(decode(latents))[0])
    return match_color_8bit(image_HW3, square_HW3, COLOR)


def restore_tiled(lq_HW3: np.ndarray, encode: Encode, decode: Decode, scale: int = 4) -> np.ndarray:
    """An image of any size: overlapping tiles, blended as latents and decoded as a whole (`test_tile`).

    uint8 (H, W, 3) to (scale H, scale W, 3); tiles are encoded row by row, from top to bottom.
    """
    height, width = lq_HW3.shape[:2]
    enlarged_13HW = to_network(from_levels(resized(lq_HW3, enlarged_size(height, width, scale)))[None])
    rows, columns = (tile_positions(side // STRIDE, TILE, OVERLAP) for side in enlarged_13HW.shape[-2:])
    latents = []
    for row in rows:
        places = [(slice(x * STRIDE, x * STRIDE + SIDE) for x in (row, column)) for column in columns]
        latents.append(encode(torch.cat([enlarged_13HW[..., y, x] for y, x in places])))
    image_HW3 = to_levels(from_network(decode(blend_latents(torch.cat(latents), rows, columns)))[0])
    size = (scale * height, scale * width)
    return match_color_8bit(resized(image_HW3, size), resized(lq_HW3, size), COLOR)


def enlarged_size(height: int, width: int, scale: int = 4) -> tuple[int, int]:
    """Size at which the tiled mode works: each side, rounded up to a multiple of 16, times scale; at least 512."""
    rows, columns = (max(SIDE, math.ceil(side / 16) * 16 * scale) for side in (height, width))
    return rows, columns


def tile_weights() -> Tensor:
    """Weights of a tile's positions, (32, 32) float64: a Gaussian around row 16 and column 15.5."""

    def bell(middle: float) -> Tensor:
        distance = (torch.arange(TILE, dtype=torch.float64) - middle) / TILE
        return torch.exp(-distance.square() / (2 * VARIANCE)) / math.sqrt(2 * math.pi * VARIANCE)

    return torch.outer(bell(TILE / 2), bell((TILE - 1) / 2))


def blend_latents(tiles_NZhw: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """Weighted mean of overlapping tiles (their latents in row-major order), (1, Z, h, w) float32.

    Given are the first latent row of each row of tiles, and the first column of each column.
    """
    weights_hw = tile_weights().to(tiles_NZhw.device)
    total = tiles_NZhw.new_zeros(1, tiles_NZhw.shape[1], rows[-1] + TILE, columns[-1] + TILE)
    weight = torch.zeros_like(total)
    for tile, (row, column) in zip(tiles_NZhw, ((y, x) for y in rows for x in columns), strict=True):
        place = (..., slice(row, row + TILE), slice(column, column + TILE))
        total[place] += tile * weights_hw
        weight[place] += weights_hw
    return total / weight


def resized(image_HW3: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """8-bit pixels at (height, width) by Pillow's bicubic, which rounds to 8 bits between its two passes."""
    return np.array(Image.fromarray(image_HW3).resize((size[1], size[0]), Image.Resampling.BICUBIC))
