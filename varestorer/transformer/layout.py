"""Where tokens stand: their scale (level) and their rotary position.

The transformer takes a layout as an argument, so teacher, student and one step of generation are the same network.
Shapes: `L` tokens, `D` head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from varestorer.tokenizer.schedule import ScaleSchedule
from varestorer.transformer.rope import rope_table, rotate, rotate_complex


@dataclass(frozen=True)
class TokenLayout:
    """Level and rotary position of each token of a sequence.

    Attributes:
        levels_L: row of the level embedding, int64; also what masks compare.
        cos_LD: cosines of the rotary angles, (L, D/2) float32.
        sin_LD: sines.
        counts: tokens of each level, in order: what `levels_L` says, known without asking the device.
        turns_LD: cos + i sin, complex64.
    """

    levels_L: Tensor
    cos_LD: Tensor
    sin_LD: Tensor
    counts: tuple[int, ...]
    turns_LD: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "turns_LD", torch.complex(self.cos_LD, self.sin_LD))

    def __len__(self) -> int:
        return self.levels_L.shape[0]

    def __getitem__(self, tokens: slice) -> TokenLayout:
        """Some consecutive tokens."""
        start, stop, _ = tokens.indices(len(self))
        spans = zip(accumulate(self.counts), self.counts, strict=True)
        counts = (min(stop, end) - max(start, end - count) for end, count in spans)
        tables = (self.levels_L[tokens], self.cos_LD[tokens], self.sin_LD[tokens])
        return TokenLayout(*tables, tuple(count for count in counts if count > 0))

    def __add__(self, other: TokenLayout) -> TokenLayout:
        """The tokens of this layout, then those of the other, which are of other levels."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("levels_L", "cos_LD", "sin_LD"))
        levels, cos, sin = (torch.cat(pair) for pair in pairs)
        return TokenLayout(levels, cos, sin, self.counts + other.counts)

    def to(self, device: torch.device | str) -> TokenLayout:
        """The same layout on a device."""
        return TokenLayout(self.levels_L.to(device), self.cos_LD.to(device), self.sin_LD.to(device), self.counts)

    def rotate(self, x_BLND: Tensor) -> Tensor:
        """Turn the queries or keys of these tokens, float32, by their positions."""
        if torch.compiler.is_compiling():  # compilers fuse the real form, and know no complex numbers
            return rotate(x_BLND, self.cos_LD[:, None], self.sin_LD[:, None])
        return rotate_complex(x_BLND, self.turns_LD[:, None])


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept must serve training too
def pyramid_layout(schedule: ScaleSchedule, head_dim: int, device: torch.device) -> TokenLayout:
    """Tokens of all scales, coarse to fine: the first rows of the position table."""
    levels = torch.arange(len(schedule)).repeat_interleave(torch.tensor(schedule.num_tokens_per_scale))
    cos, sin = rope_table(schedule.position_scales, head_dim)
    counts = tuple(schedule.num_tokens_per_scale)
    return TokenLayout(levels, cos[: len(levels)], sin[: len(levels)], counts).to(device)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept must serve training too
def long_layout(
    schedule: ScaleSchedule, head_dim: int, device: torch.device, positions: str = "next_scale"
) -> TokenLayout:
    """Tokens of all scales, then the last scale's grid once more as level K (the student's long input; spec C).

    Args:
        schedule: the scales.
        head_dim: D.
        device: where the tensors live.
        positions: rotary rows of the appended tokens: "next_scale" just reads on in the table, as the released
            student does (where the table ends, as at 1M, the tokens take their own rows); "own" takes the rows of
            the last scale.
    """
    if positions not in ("next_scale", "own"):
        raise ValueError(f"long_positions must be next_scale or own, got {positions!r}")
    pyramid = pyramid_layout(schedule, head_dim, torch.device("cpu"))
    num_appended, total = schedule.num_tokens_per_scale[-1], schedule.num_tokens
    cos, sin = rope_table(schedule.position_scales, head_dim)
    reads_on = positions == "next_scale" and total + num_appended <= len(cos)
    start = total if reads_on else total - num_appended
    rows = slice(start, start + num_appended)
    levels = torch.cat([pyramid.levels_L, torch.full((num_appended,), len(schedule))])
    cos, sin = torch.cat([pyramid.cos_LD, cos[rows]]), torch.cat([pyramid.sin_LD, sin[rows]])
    return TokenLayout(levels, cos, sin, (*pyramid.counts, num_appended)).to(device)
