"""Where tokens stand: their scale (level) and their position, rotary or of a learned table.

The transformer takes a layout as an argument, so teacher, student and one step of generation are the same network.
Shapes: `L` tokens, `D` head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from varestorer.tokenizer.schedule import Scale, ScaleSchedule
from varestorer.transformer.rope import angles, grid_positions, rope_table, rotate, rotate_complex


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


POSITIONS = ("rope", "rope_grid", "rows", "grid")


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


def reduce_bilinear(x_BChw: Tensor, size: Scale) -> Tensor:
    """Bilinear with antialiasing."""
    return F.interpolate(x_BChw, size=size, mode="bilinear", align_corners=False, antialias=True)


GRID_REDUCTIONS: dict[str, Callable[[Tensor, Scale], Tensor]] = {
    "area": F.adaptive_avg_pool2d,
    "bilinear": reduce_bilinear,
}


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
