"""Where tokens stand and which sees which: scales (levels), positions (rotary or learned), masks.

The transformer takes a layout and a mask as arguments, so teacher, student and one step of generation are the same
network.

Shapes: `L` tokens, `D` head dimension, `N` heads, `C` width. In a mask True means that the query (row) may look at the
key (column).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from varestorer.tokenizer.schedule import Scale, ScaleSchedule

BASE = 10000.0
POSITIONS = ("rope", "rope_grid", "rows", "grid")
GRID_REDUCTIONS: dict[str, Callable[[Tensor, Scale], Tensor]] = {
    "area": F.adaptive_avg_pool2d,
    "bilinear": partial(F.interpolate, mode="bilinear", align_corners=False, antialias=True),
}
TOGETHER = 512
"""Scales that end within so many tokens are attended in one masked call, each later one in a call of its own."""
MASKS = ("cross_scale", "causal")
"""The student's attention by its name in configs: every token sees all (no mask at all), or `BlockCausal`."""


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


@dataclass(frozen=True)
class TokenLayout:
    """Level and position of each token of a sequence.

    Attributes:
        levels_L: row of the level embedding, int64; also what masks compare.
        counts: tokens of each level, in order: what `levels_L` says, known without asking the device.
        cos_LD: cosines of the rotary angles, (L, D/2) float32; None where positions are learned.
        sin_LD: sines.
        rows_L: rows of the learned table of positions, int64; None where positions are rotary.
        grids: sizes of the grids that a learned table is reduced to, see `LearnedPositions`.
        turns_LD: cos + i sin, complex64.
    """

    levels_L: Tensor
    counts: tuple[int, ...]
    cos_LD: Tensor | None = None
    sin_LD: Tensor | None = None
    rows_L: Tensor | None = None
    grids: tuple[Scale, ...] = ()
    turns_LD: Tensor | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        if self.cos_LD is not None and self.sin_LD is not None:
            object.__setattr__(self, "turns_LD", torch.complex(self.cos_LD, self.sin_LD))

    def _changed(self, change: Callable[[Tensor], Tensor], counts: tuple[int, ...]) -> TokenLayout:
        """The layout with each of its tables changed."""
        names = ("levels_L", "cos_LD", "sin_LD", "rows_L")
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        changed: dict[str, Any] = {name: None if t is None else change(t) for name, t in given.items()}
        return replace(self, counts=counts, **changed)

    def __len__(self) -> int:
        return self.levels_L.shape[0]

    def __getitem__(self, tokens: slice) -> TokenLayout:
        """Some consecutive tokens."""
        start, stop, _ = tokens.indices(len(self))
        spans = zip(accumulate(self.counts), self.counts, strict=True)
        counts = (min(stop, end) - max(start, end - count) for end, count in spans)
        return self._changed(lambda table: table[tokens], tuple(count for count in counts if count > 0))

    def to(self, device: torch.device | str) -> TokenLayout:
        """The same layout on a device."""
        return self._changed(lambda table: table.to(device), self.counts)

    def rotate(self, x_BLND: Tensor) -> Tensor:
        """Turn the queries or keys of these tokens, float32, by their positions; learned ones turn nothing."""
        if self.turns_LD is None or self.cos_LD is None or self.sin_LD is None:
            return x_BLND
        if torch.compiler.is_compiling():  # compilers fuse the real form, and know no complex numbers
            return rotate(x_BLND, self.cos_LD[:, None], self.sin_LD[:, None])
        return rotate_complex(x_BLND, self.turns_LD[:, None])


@dataclass(frozen=True)
class PositionRule:
    """How tokens get their positions.

    Attributes:
        kind: "rope": rotary, rounded on the grid of the last scale of the table (Infinity); "rope_grid": rotary, with
            fractions, on a grid of constant side (VARSR's scale-aligned RoPE); "rows": a learned row for each token of
            the sequence (VAR); "grid": a learned grid, reduced to each scale (H-VAR).
        head_dim: D.
        side: of the constant or learned grid.
    """

    kind: str
    head_dim: int
    side: int = 32

    def tables(self, schedule: ScaleSchedule, prefix: Scale | None) -> dict[str, Any]:
        """The position tables of a prefix, if there is one, and of all scales, as entries of a `TokenLayout`."""
        num_tokens = schedule.num_tokens
        if self.kind == "rope":
            cos, sin = (table[:num_tokens] for table in rope_table(schedule.position_scales, self.head_dim))
            if prefix is not None:  # a prefix takes the positions of the last scale, whose size it has
                own = slice(num_tokens - prefix[0] * prefix[1], num_tokens)
                cos, sin = torch.cat([cos[own], cos]), torch.cat([sin[own], sin])
            return {"cos_LD": cos, "sin_LD": sin}
        grids = schedule.scales if prefix is None else (prefix, *schedule.scales)
        if self.kind == "rope_grid":
            reference = (self.side, self.side)
            positions = torch.cat([grid_positions(grid, reference, round_positions=False) for grid in grids])
            table = angles(positions, self.head_dim)
            return {"cos_LD": table.cos(), "sin_LD": table.sin()}
        return {"rows_L": torch.arange(sum(h * w for h, w in grids)), "grids": grids}


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept must serve training too
def pyramid_layout(
    schedule: ScaleSchedule, rule: PositionRule, device: torch.device, prefix: Scale | None = None
) -> TokenLayout:
    """Tokens of all scales, coarse to fine, behind those of a prefix where there is one.

    Args:
        schedule: the scales.
        rule: of the positions.
        device: where the tensors live.
        prefix: size of a map whose tokens stand in front. They share level 0 with the start token, or, by Infinity's
            rule of positions, have the level behind the last.
    """
    counts = tuple(schedule.num_tokens_per_scale)
    numbers = torch.arange(len(schedule))
    if prefix is not None and rule.kind == "rope":
        counts, numbers = (prefix[0] * prefix[1], *counts), torch.cat([torch.tensor([len(schedule)]), numbers])
    elif prefix is not None:
        counts = (prefix[0] * prefix[1] + counts[0], *counts[1:])
    levels = numbers.repeat_interleave(torch.tensor(counts))
    return TokenLayout(levels, counts, **rule.tables(schedule, prefix)).to(device)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept must serve training too
def long_layout(
    schedule: ScaleSchedule, rule: PositionRule, device: torch.device, positions: str = "next_scale"
) -> TokenLayout:
    """Tokens of all scales, then the last scale's grid once more as level K (VARestorer's long student input).

    Args:
        schedule: the scales.
        rule: of the positions.
        device: where the tensors live.
        positions: those of the appended tokens: "next_scale" just reads on in the rotary table, as the released
            student does (where the table ends, as at 1M, the tokens take their own rows); "own" takes those of the
            last scale.
    """
    if positions not in ("next_scale", "own"):
        raise ValueError(f"long_positions must be next_scale or own, got {positions!r}")
    num_appended, total = schedule.num_tokens_per_scale[-1], schedule.num_tokens
    num_positions = sum(h * w for h, w in schedule.position_scales)
    if positions == "next_scale" and rule.kind == "rope" and total + num_appended <= num_positions:
        cos, sin = rope_table(schedule.position_scales, rule.head_dim)
        tables: dict[str, Any] = {"cos_LD": cos[: total + num_appended], "sin_LD": sin[: total + num_appended]}
    else:
        rows = torch.cat([torch.arange(total), torch.arange(total - num_appended, total)])
        own = rule.tables(schedule, None)
        tables = own | {name: table[rows] for name, table in own.items() if torch.is_tensor(table)}
    counts = (*schedule.num_tokens_per_scale, num_appended)
    levels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return TokenLayout(levels, counts, **tables).to(device)


class LearnedPositions(nn.Module):
    """A learned row for each token of the sequence (VAR), or a learned grid that is reduced to each scale (H-VAR).

    Args:
        num_rows: rows of the table.
        width: C.
        is_grid: whether the rows are a square grid.
        reduction: of the grid, one of `GRID_REDUCTIONS`.
    """

    def __init__(self, num_rows: int, width: int, is_grid: bool, reduction: str = "area") -> None:
        super().__init__()
        self.is_grid = is_grid
        self.reduction = GRID_REDUCTIONS[reduction]
        self.table = nn.Parameter(torch.zeros(1, num_rows, width))

    def forward(self, layout: TokenLayout) -> Tensor:
        """Positions (L, C) of the tokens of a layout."""
        rows_LC = self.table[0]
        if self.is_grid:
            side = math.isqrt(len(rows_LC))
            grid_1Chw = rearrange(rows_LC, "(h w) c -> 1 c h w", h=side)
            reduced = [self.reduction(grid_1Chw, grid) for grid in layout.grids]
            rows_LC = torch.cat([rearrange(x, "1 c h w -> (h w) c") for x in reduced])
        return rows_LC[layout.rows_L]


@dataclass(frozen=True)
class BlockCausal:
    """A token sees its own and all earlier blocks of a layout: `block_causal_mask` without the (L, L) matrix.

    The queries of a scale look at the keys up to its end, so that attention needs no mask and leaves out what nobody
    may see. The small scales, whose calls would cost more than their arithmetic, share one call with a small mask.

    Attributes:
        ends: tokens up to the end of the small scales, then up to the end of each later one.
        first_LL: mask among the tokens of the small scales; None if that is a single one.
    """

    ends: tuple[int, ...]
    first_LL: Tensor | None

    @classmethod
    def of(cls, layout: TokenLayout) -> BlockCausal:
        """The mask of a sequence of scales, coarse to fine, perhaps with a prefix in front."""
        ends = tuple(accumulate(layout.counts))
        number = max(sum(end <= TOGETHER for end in ends), 1)
        first_LL = _order_mask(layout.counts[:number], layout.levels_L.device) if number > 1 else None
        return cls(ends[number - 1 :], first_LL)

    def calls(self, queries: slice, num_keys: int) -> Iterator[tuple[slice, int, Tensor | None]]:
        """The queries, the number of keys and the mask of each call of attention.

        Args:
            queries: consecutive tokens of the sequence that ask; the others are only seen.
            num_keys: tokens of the sequence, and those before it (of a cache), which all may see.
        """
        before = num_keys - self.ends[-1]
        first, stop, _ = queries.indices(self.ends[-1])
        for start, end in zip((0, *self.ends), self.ends, strict=False):
            asked = slice(max(start, first), min(end, stop))
            if asked.start >= asked.stop:
                continue
            mask = self.first_LL if start == 0 else None
            if mask is not None:
                mask = F.pad(mask[asked], (before, 0), value=True) if before else mask[asked]
            yield asked, before + end, mask


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must serve training too
def _order_mask(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """`block_causal_mask` of blocks of so many tokens."""
    return block_causal_mask(torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))).to(device)


def block_causal_mask(levels_L: Tensor) -> Tensor:
    """A token sees its own and all coarser scales (VAR; the teacher): (L, L) bool."""
    return levels_L[:, None] >= levels_L[None, :]


def prefix_causal_mask(levels_L: Tensor, is_prefix_L: Tensor, dropped_B: Tensor | None = None) -> Tensor:
    """All tokens see the prefix, which sees itself alone; otherwise a token sees its own and all coarser scales.

    Args:
        levels_L: scale of each token; the prefix has one of its own.
        is_prefix_L: bool.
        dropped_B: samples in which nobody but the prefix itself sees the prefix (for guidance).
    Returns:
        (L, L) bool, or (B, 1, L, L) where samples differ.
    """
    mask_LL = is_prefix_L[None, :] | (block_causal_mask(levels_L) & ~is_prefix_L[:, None])
    if dropped_B is None:
        return mask_LL
    hidden_LL = is_prefix_L[None, :] & ~is_prefix_L[:, None]
    return (mask_LL & ~(hidden_LL & dropped_B[:, None, None]))[:, None]
