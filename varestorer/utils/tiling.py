"""Restoring images of any size with a network that sees squares of one size.

An image smaller than a tile is continued by its mirror image, cut into overlapping tiles, and put together
again with weights that sum to one. Nothing is ever squashed.

Letters: `B` tiles of a batch, `H W` image, `t` side of a tile (pixels).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from varestorer.utils.errors import UserError
from varestorer.utils.images import pad_reflect

Window = Callable[[int, int], Tensor]
"""(side of a tile, overlap) -> positive weights (t,), float64; they need not sum to one."""

RunTiles = Callable[[Tensor, list[int]], Tensor]
"""(tiles_B3tt, their numbers in row-major order) -> restored tiles_B3tt."""


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Size of an image enlarged `scale` times: rounded half to even, at least one pixel."""
    return max(round(height * scale), 1), max(round(width * scale), 1)


def tile_positions(length: int, tile: int, overlap: int) -> list[int]:
    """First pixels of the tiles that cover `length` pixels, the last one flush with the end.

    Args:
        length: pixels to cover, at least 1.
        tile: side of a tile, pixels.
        overlap: pixels that neighbours share at least, 0 <= overlap < tile.
    Returns:
        increasing positions; `[0]` where one tile is enough.
    Raises:
        UserError: an overlap that leaves no step from tile to tile.
    """
    if not 0 <= overlap < tile:
        raise UserError(f"overlap must be at least 0 and below the tile's {tile} pixels, got {overlap}")
    if length <= tile:
        return [0]
    last = length - tile
    return [*range(0, last, tile - overlap), last]


def gaussian_window(tile: int, overlap: int = 0) -> Tensor:
    """The released VARestorer's profile p, exp(-((i - (t-1)/2) / t)^2 / 0.02), over its maximum.

    It blends everywhere, so `overlap` changes nothing.

    Returns:
        weights (t,), float64, largest 1.
    """
    offset = (torch.arange(tile, dtype=torch.float64) - (tile - 1) / 2) / tile
    profile = torch.exp(-offset.square() / 0.02)
    return profile / profile.max()


def gaussian_weights(height: int, width: int) -> Tensor:
    """Weights p(y) p(x) of the released tiled mode, (H, W), float64, largest 1."""
    return torch.outer(gaussian_window(height), gaussian_window(width))


def ramp_window(tile: int, overlap: int) -> Tensor:
    """One in the middle and a raised cosine over the `overlap` pixels at both ends.

    Two ramps facing each other sum to one, so tiles blend inside their overlap only, and the slope is zero
    where the blend begins and ends.

    Returns:
        weights (t,), float64, in (0, 1].
    """
    from_edge = torch.arange(tile, dtype=torch.float64) + 0.5
    from_edge = torch.minimum(from_edge, tile - from_edge)
    progress = (from_edge / max(overlap, 1)).clamp(max=1.0)
    return torch.sin(progress * torch.pi / 2).square()


@dataclass(frozen=True)
class _Axis:
    """Tiles along one direction: where they begin, and their weights, which sum to one at every pixel."""

    positions: list[int]
    weights: list[Tensor]

    @classmethod
    def cover(cls, length: int, tile: int, overlap: int, window: Window) -> "_Axis":
        positions = tile_positions(length, tile, overlap)
        profile = window(tile, overlap)
        total = torch.zeros(max(length, tile), dtype=torch.float64)
        for start in positions:
            total[start : start + tile] += profile
        return cls(positions, [(profile / total[start : start + tile]).float() for start in positions])


def restore_tiled(
    image_3HW: Tensor, tile: int, overlap: int, batch: int, run: RunTiles, window: Window = ramp_window
) -> Tensor:
    """Restore an image of any size with a function of square tiles.

    The window is separable, so its sum over a grid of tiles is too: each tile is weighted by two vectors
    already divided by that sum, and besides input and output only one batch of tiles is held.

    Args:
        image_3HW: float image, any range, any size from 1x1.
        tile: side of the squares `run` takes and returns (pixels).
        overlap: pixels shared by neighbouring tiles, 0 <= overlap < tile.
        batch: most tiles in one call.
        run: restores (B, 3, t, t) tiles given their row-major numbers, which key their noise.
        window: profile of the blending weights.
    Returns:
        float32 image of the same size, on the device of the input.
    Raises:
        UserError: an impossible overlap or batch, or an image without pixels.
        ValueError: `run` changed the shape of its tiles.
    """
    if batch < 1:
        raise UserError(f"batch must be at least 1 tile, got {batch}")
    if image_3HW.ndim != 3 or image_3HW.numel() == 0:
        raise UserError(f"an image of 3 dimensions with pixels is needed, got shape {tuple(image_3HW.shape)}")
    height, width = image_3HW.shape[-2:]
    padded = pad_reflect(image_3HW, 0, max(tile - height, 0), 0, max(tile - width, 0))
    rows, columns = (_Axis.cover(side, tile, overlap, window) for side in padded.shape[-2:])
    output = torch.zeros_like(padded, dtype=torch.float32)
    grid = [(y, x) for y in range(len(rows.positions)) for x in range(len(columns.positions))]
    for numbers in _batched(range(len(grid)), batch):
        corners = [(rows.positions[grid[n][0]], columns.positions[grid[n][1]]) for n in numbers]
        tiles_B3tt = torch.stack([padded[:, top : top + tile, left : left + tile] for top, left in corners])
        restored_B3tt = run(tiles_B3tt, numbers)
        if restored_B3tt.shape != tiles_B3tt.shape:
            went, came = tuple(tiles_B3tt.shape), tuple(restored_B3tt.shape)
            raise ValueError(f"tiles must keep their shape: went in as {went}, came back as {came}")
        for number, (top, left), piece in zip(numbers, corners, restored_B3tt, strict=True):
            weight_tt = torch.outer(rows.weights[grid[number][0]], columns.weights[grid[number][1]])
            output[:, top : top + tile, left : left + tile] += piece.to(output) * weight_tt.to(output.device)
    return output[:, :height, :width].contiguous()


def _batched(numbers: range, size: int) -> Iterator[list[int]]:
    """Consecutive lists of at most `size` numbers."""
    iterator = iter(numbers)
    while chunk := list(islice(iterator, size)):
        yield chunk
