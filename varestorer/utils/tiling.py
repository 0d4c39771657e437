"""Restoring images of any size with a network that sees squares of one size.

The image is cut into overlapping tiles at the size of the result, each enlarged straight from the pixels below it,
and the restored tiles are put together with weights that sum to one. What a tile has beyond the image is its mirror
image; nothing is ever squashed.

Letters: `B` tiles of a batch, `C` channels, `H W` image, `t` side of a tile (pixels).
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache, partial
from itertools import product
from math import ceil, floor, inf, prod
from numbers import Real

import torch
from torch import Tensor

from varestorer.utils.device import free_memory, is_out_of_memory
from varestorer.utils.errors import UserError
from varestorer.utils.images import pad_reflect

LOG = logging.getLogger(__name__)

# What neighbors may differ by where both show the same: brightness of each channel, and the logarithms of the contrast
# and of the detail. Of 716 pairs of the small model the largest were 0.04, 0.17 and 0.12; enlarged alone, a square has
# 0.24 less detail.
FAR = (0.06, 0.06, 0.06, 0.3, 0.2)
LEAST_CONTRAST = 0.02  # of what is flat, contrast says nothing
MOST_AGAIN = 0.05  # of the tiles

MAX_RESULT_PIXELS = 2**30  # 12 GiB of float32; beyond it a scale is taken for a slip

Resample = Callable[[int, int, int, int, torch.device], tuple[slice, Tensor]]
"""One of `ENLARGE`, with or without a memory."""

RunTiles = Callable[[Tensor, list[int]], list[Tensor]]
"""(tiles_B3tt, their numbers in row-major order, which key noise) -> restored tiles in each size, (B, C, s, s)."""


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Size of an image enlarged `scale` times: rounded half to even, at least one pixel.

    ValueError: a scale that is no number above 0. UserError: more than `MAX_RESULT_PIXELS`.
    """
    if not isinstance(scale, Real) or isinstance(scale, bool) or not 0 < scale < inf:
        raise ValueError(f"scale must be a number above 0, such as 4 (times larger), got {scale!r}")
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    if size[0] * size[1] > MAX_RESULT_PIXELS:
        raise UserError(f"the result would have {size[1]} x {size[0]} pixels; lower scale, or cut the image")
    return size


def tile_positions(length: int, tile: int, overlap: int, step: int = 1) -> list[int]:
    """First pixels of the tiles that cover `length` pixels, increasing, the last one flush with the end.

    Args:
        length: pixels to cover, at least 1; one tile may be enough.
        tile: side of a tile, pixels.
        overlap: pixels that neighbors share at least, 0 <= overlap < tile.
        step: positions are multiples of it, a divisor of the tile's side; the last tile may then reach beyond the end,
            and an overlap that leaves less than a step between tiles is lowered.
    Raises:
        UserError: an overlap that leaves no step from tile to tile.
    """
    if not 0 <= overlap < tile:
        raise UserError(f"overlap must be at least 0 and below the tile's {tile} pixels, got {overlap}")
    if length <= tile:
        return [0]
    last = ceil((length - tile) / step) * step
    return [*range(0, last, max((tile - overlap) // step * step, step)), last]


def num_tiles(size: tuple[int, int], tile: int, overlap: int, step: int = 1) -> int:
    """How many tiles cover (height, width), see `tile_positions`."""
    return prod(len(tile_positions(length, tile, overlap, step)) for length in size)


def gaussian_weights(side: int) -> Tensor:
    """Weights p(y) p(x) of the released tiled mode, (t, t), float64, largest 1.

    p is exp(-((i - (t-1)/2) / t)^2 / 0.02) over its maximum.
    """
    offset = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2) / side
    profile = torch.exp(-offset.square() / 0.02)
    profile /= profile.max()
    return torch.outer(profile, profile)


def ramp_window(tile: int, overlap: int) -> Tensor:
    """Weights (t,), float64, in (0, 1]: one in the middle, a raised cosine over the `overlap` pixels at both ends.

    Two ramps facing each other sum to one, so tiles blend inside their overlap only, and the slope is zero where the
    blend begins and ends.
    """
    from_edge = torch.arange(tile, dtype=torch.float64) + 0.5
    progress = (torch.minimum(from_edge, tile - from_edge) / max(overlap, 1)).clamp(max=1.0)
    return torch.sin(progress * torch.pi / 2).square()


class _Grid:
    """The tiles of an image, numbered row by row, and how they blend. Weights are separable, and so is their sum."""

    def __init__(self, positions: Sequence[list[int]], tile: int, overlap: int, device: torch.device) -> None:
        """Tiles at these first rows and first columns; their weights sum to one at every pixel."""
        rows, columns = positions
        self.corners, self.tile, self.num_columns = [*product(rows, columns)], tile, len(columns)
        profile, axes = ramp_window(tile, overlap), []
        for starts in positions:
            total = torch.zeros(starts[-1] + tile, dtype=torch.float64)
            for start in starts:
                total[start : start + tile] += profile
            axes.append([(profile / total[start : start + tile]).to(device) for start in starts])
        self.weights = [*product(*axes)]

    def touching(self, number: int) -> list[int]:
        """The tiles that share pixels with one, itself included."""
        top, left = self.corners[number]
        return [n for n, (y, x) in enumerate(self.corners) if max(abs(y - top), abs(x - left)) < self.tile]

    def area(self, number: int, output_CHW: Tensor) -> Tensor:
        """What of an output a tile covers."""
        top, left = self.corners[number]
        return output_CHW[:, top : top + self.tile, left : left + self.tile]

    def blended(self, output_CHW: Tensor, numbers: list[int], pieces_BCtt: Tensor) -> Tensor:
        """The output, in place, with a batch of tiles added; without channels yet, it gets those of the tiles."""
        num_channels = pieces_BCtt.shape[1]
        if pieces_BCtt.shape != (len(numbers), num_channels, self.tile, self.tile):
            raise ValueError(f"{len(numbers)} tiles of side {self.tile} came back as {tuple(pieces_BCtt.shape)}")
        if len(output_CHW) == 0:
            output_CHW = output_CHW.new_zeros((num_channels, *output_CHW.shape[1:]))
        for number, piece_Ctt in zip(numbers, pieces_BCtt, strict=True):
            self.add(piece_Ctt, number, output_CHW)
        return output_CHW

    def add(self, piece_Ctt: Tensor, number: int, output_CHW: Tensor, origin: tuple[int, int] = (0, 0)) -> None:
        """Add a weighted tile, in place, to an output whose first pixel is at `origin`; what lies outside is left."""
        weights_tt = torch.outer(*self.weights[number]).float()
        weighted_Ctt = piece_Ctt.to(output_CHW) * weights_tt.to(output_CHW.device)
        y, x = (place - first for place, first in zip(self.corners[number], origin, strict=True))
        sides = zip((y, x), output_CHW.shape[1:], strict=True)
        rows, columns = (slice(max(start, 0), min(start + self.tile, side)) for start, side in sides)
        output_CHW[:, rows, columns] += weighted_Ctt[
            :, rows.start - y : rows.stop - y, columns.start - x : columns.stop - x
        ]


def enlarged_tile(
    image_3HW: Tensor, size: tuple[int, int], top: int, left: int, tile: int, resample: Resample | None = None
) -> Tensor:
    """One square of `resize(image, size)`, made from the pixels that it needs alone: (3, t, t) float32 in [0, 1].

    Weights are computed in float64. Torch resizes float32 images with float32 positions, and Pillow takes its box in
    float32: far from the corner, and at scales that are not powers of two, both drift (by 1e-3 near pixel 50,000).

    Args:
        image_3HW: float image in [0, 1].
        size: (height, width) of the enlarged image, which may also be a smaller one; its own size only crops.
        top, left: first row and column of the square.
        tile: side of the square; beyond the enlarged image it holds the mirror image.
        resample: see `ENLARGE`; None for bicubic. The weights of other tiles may be remembered.
    """
    bottom, right = min(top + tile, size[0]), min(left + tile, size[1])
    if tuple(image_3HW.shape[-2:]) == tuple(size):
        piece = image_3HW[:, top:bottom, left:right].float()
    else:
        resample = resample or ENLARGE["bicubic"]
        rows, from_rows = resample(image_3HW.shape[-2], size[0], top, bottom, image_3HW.device)
        columns, from_columns = resample(image_3HW.shape[-1], size[1], left, right, image_3HW.device)
        piece = (from_rows @ image_3HW[:, rows, columns].float() @ from_columns.T).clamp(0, 1)
    return pad_reflect(piece, 0, top + tile - bottom, 0, left + tile - right)


def _keys(x: Tensor) -> Tensor:
    """Keys' kernel, a = -0.5."""
    near, far = (1.5 * x - 2.5) * x**2 + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _resampled(
    kernel: Callable[[Tensor], Tensor],
    reach: int,
    length: int,
    target: int,
    start: int,
    stop: int,
    device: torch.device,
) -> tuple[slice, Tensor]:
    """What pixels start to stop of `length` pixels resized to `target` are made of, by a kernel widened when shrinking.

    The kernel of the distance is 0 from `reach` on. Gives the source pixels needed, S of them, and their weights (stop
    - start, S), float32, which sum to one.
    """
    step = length / target
    width = max(step, 1.0)
    center = (torch.arange(start, stop, dtype=torch.float64) + 0.5) * step
    source = slice(max(floor(center[0] - reach * width), 0), min(ceil(center[-1] + reach * width), length))
    weights = kernel(((torch.arange(source.start, source.stop) + 0.5 - center[:, None]) / width).abs())
    return source, (weights / weights.sum(dim=1, keepdim=True)).float().to(device)


ENLARGE: dict[str, Resample] = {
    "bicubic": partial(_resampled, _keys, 2),
    "bilinear": partial(_resampled, lambda x: (1 - x).clamp(min=0), 1),
}


def restore_tiled(
    image_3HW: Tensor,
    size: tuple[int, int],
    tile: int,
    overlap: int,
    batch: int,
    run: Callable[[Tensor, list[int]], Tensor],
) -> Tensor:
    """As `restore_to_sizes`, (C, *size) alone: `run` restores tiles (B, 3, t, t) to (B, C, t, t)."""

    def run_to_one(tiles_B3tt: Tensor, numbers: list[int]) -> list[Tensor]:
        return [run(tiles_B3tt, numbers)]

    return restore_to_sizes(image_3HW, size, tile, overlap, batch, run_to_one, [(size, tile)])[0]


def restore_to_sizes(
    image_3HW: Tensor,
    size: tuple[int, int],
    tile: int,
    overlap: int,
    batch: int,
    run: RunTiles,
    results: Sequence[tuple[tuple[int, int], int]],
    step: int = 1,
    enlarge: str = "bicubic",
    warn: Callable[[str], None] = LOG.warning,
) -> list[Tensor]:
    """Enlarge an image, restore it with a function of square tiles, and put it together in each of several sizes.

    Besides input and outputs only one batch of tiles is held, never the enlarged image. Where memory is too little for
    a batch it is halved, from then on. Tiles that come out unlike their neighbors, see `_Likeness`, are done again, and
    named if that did not help.

    Args:
        image_3HW: float image in [0, 1], any size from 1x1.
        size: (height, width) that the image is enlarged to for the tiles.
        tile: side of the squares that `run` takes, pixels.
        overlap: pixels shared by neighboring tiles, 0 <= overlap < tile.
        batch: most tiles in one call.
        run: restores tiles to the sides that `results` names, in this order, with any number of channels.
        results: of each one (height, width) of the whole, and the side of a tile in it, `tile` at most.
        step: tiles lie at multiples of it, so that their borders are whole pixels in every size.
        enlarge: one of `ENLARGE`.
        warn: is told of what the user should know.
    Returns:
        (C, *size) float32 of each result, not clamped, on the device of the input.
    Raises:
        UserError: an impossible overlap or batch, or an image without pixels.
        ValueError: `run` changed the number of its tiles, or gave another side.
    """
    if batch < 1:
        raise UserError(f"batch must be at least 1 tile, got {batch}")
    if image_3HW.ndim != 3 or image_3HW.numel() == 0 or min(size) < 1:
        raise UserError(f"an image (3, H, W) with pixels is needed, got {tuple(image_3HW.shape)} for {tuple(size)}")
    # outer products of float64 weights, which Apple's GPUs do not know
    exact = torch.device("cpu") if image_3HW.device.type == "mps" else image_3HW.device
    rows, columns = positions = [tile_positions(length, tile, overlap, step) for length in size]
    corners = [*product(rows, columns)]
    grids = []
    for _, side in results:
        share = Fraction(side, tile)
        smaller = [[int(position * share) for position in axis] for axis in positions]
        grids.append(_Grid(smaller, side, round(overlap * share), exact))
    outputs = [image_3HW.new_zeros((0, *whole), dtype=torch.float32) for whole, _ in results]
    resample = lru_cache(maxsize=128)(ENLARGE[enlarge])  # tiles of a row, or of a column, share their weights
    likeness = _Likeness(grids[-1])

    def pieces_of(numbers: list[int]) -> list[Tensor]:
        tiles_B3tt = torch.stack([enlarged_tile(image_3HW, size, *corners[n], tile, resample) for n in numbers])
        return run(tiles_B3tt, numbers)

    first = 0
    while first < len(corners):
        numbers = [*range(first, min(first + batch, len(corners)))]
        restored: list[Tensor] | None = None
        try:
            restored = pieces_of(numbers)
        except (MemoryError, RuntimeError) as error:
            if len(numbers) == 1 or not is_out_of_memory(error):
                raise
        if restored is None:  # outside of the handler, as the error holds on to what was allocated
            free_memory(image_3HW.device)
            batch = len(numbers) // 2
            warn(f"out of memory with {len(numbers)} squares at once, going on with {batch}")
            continue
        parts = zip(grids, outputs, restored, strict=True)
        outputs = [grid.blended(output_CHW, numbers, pieces) for grid, output_CHW, pieces in parts]
        likeness.note(numbers, restored[-1])
        first += len(numbers)
    _do_again(likeness, outputs, grids, pieces_of, warn)
    return outputs


def _do_again(
    likeness: "_Likeness",
    outputs: list[Tensor],
    grids: list[_Grid],
    pieces_of: Callable[[list[int]], list[Tensor]],
    warn: Callable[[str], None],
) -> None:
    """Restore tiles that are unlike their neighbors anew, in place; what remains unlike is named.

    Pieces are not kept, so what a tile covers is put together again from all that touch it.
    """
    odd = likeness.odd()
    if len(odd) <= max(MOST_AGAIN * likeness.total, 2):  # more are no accident
        for number in odd:
            areas = [grid.area(number, output_CHW) for grid, output_CHW in zip(grids, outputs, strict=True)]
            for area in areas:
                area.zero_()
            for neighbor in grids[-1].touching(number):
                restored = pieces_of([neighbor])
                likeness.note([neighbor], restored[-1])
                for grid, area, piece_BCtt in zip(grids, areas, restored, strict=True):
                    grid.add(piece_BCtt[0], neighbor, area, grid.corners[number])
        odd = [number for number in odd if number in likeness.odd()]
    if odd:
        places = ["{1},{0}".format(*grids[-1].corners[number]) for number in odd]
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        warn(
            f"{len(odd)} of {likeness.total} squares differ from their neighbors in brightness or contrast: "
            f"look at the result at x,y = {'; '.join(places[:3])}{more}"
        )


class _Likeness:
    """Compares tiles with their neighbors where both show the same, in brightness, contrast and fine detail.

    What an image shows does not matter so, and neither does what a model does to all of it.
    """

    def __init__(self, grid: _Grid) -> None:
        self.total, self._grid = len(grid.corners), grid
        self._looks: dict[tuple[int, int], Tensor] = {}  # (tile, neighbor) -> the tile where the neighbor is too

    def note(self, numbers: list[int], restored_BCtt: Tensor) -> None:
        """Remember how tiles look along their borders."""
        tile, width, corners = self._grid.tile, self._grid.num_columns, self._grid.corners
        for number, piece_Ctt in zip(numbers, restored_BCtt, strict=True):
            for neighbor in (number - width, number - 1, number + 1, number + width):
                if not 0 <= neighbor < self.total:
                    continue
                down, across = (a - b for a, b in zip(corners[neighbor], corners[number], strict=True))
                if (down and across) or max(abs(down), abs(across)) >= tile - 1:
                    continue
                rows, columns = (slice(max(step, 0), tile + min(step, 0)) for step in (down, across))
                self._looks[number, neighbor] = _look(piece_Ctt[:3, rows, columns].float())

    def odd(self) -> list[int]:
        """Tiles that are unlike most of their neighbors."""
        pairs = [pair for pair in self._looks if pair[0] < pair[1]]
        if not pairs:
            return []
        ours, theirs = (torch.stack([self._looks[pair] for pair in some]) for some in (pairs, [p[::-1] for p in pairs]))
        distances = ((ours - theirs).abs() / torch.tensor(FAR).to(ours)).amax(dim=1)
        # a model whose tiles differ a good deal everywhere
        far = distances > max(1.0, 5 * float(distances.median()))
        unlike = Counter(n for pair, is_far in zip(pairs, far.tolist(), strict=True) if is_far for n in pair)
        neighbors = Counter(n for pair in pairs for n in pair)
        return sorted(number for number, count in unlike.items() if 2 * count > neighbors[number])


def _look(part_Chw: Tensor) -> Tensor:
    """Brightness of the channels, and the logarithms of the contrast and of the detail."""
    step = (part_Chw[..., 1:] - part_Chw[..., :-1]).abs().mean()
    return torch.cat([part_Chw.mean(dim=(1, 2)), torch.stack([part_Chw.std(), step]).add(LEAST_CONTRAST).log()])
