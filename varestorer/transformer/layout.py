"""Where tokens stand: their scale (level) and their rotary position.

The transformer takes a layout as an argument, so teacher, student and one step of generation are the same network.
Shapes: `L` tokens, `D` head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from varestorer.tokenizer.schedule import ScaleSchedule
from varestorer.transformer.rope import rope_table


@dataclass(frozen=True)
class TokenLayout:
    """Level and rotary position of each token of a sequence.

    Attributes:
        levels_L: row of the level embedding, int64; also what masks compare.
        cos_LD: cosines of the rotary angles, (L, D/2) float32.
        sin_LD: sines.
    """

    levels_L: Tensor
    cos_LD: Tensor
    sin_LD: Tensor

    def __len__(self) -> int:
        return self.levels_L.shape[0]

    def __getitem__(self, tokens: slice) -> TokenLayout:
        return TokenLayout(self.levels_L[tokens], self.cos_LD[tokens], self.sin_LD[tokens])

    def __add__(self, other: TokenLayout) -> TokenLayout:
        """The tokens of this layout, then those of the other."""
        names = ("levels_L", "cos_LD", "sin_LD")
        return TokenLayout(*(torch.cat([getattr(self, name), getattr(other, name)]) for name in names))

    def to(self, device: torch.device | str) -> TokenLayout:
        """The same layout on a device."""
        return TokenLayout(self.levels_L.to(device), self.cos_LD.to(device), self.sin_LD.to(device))


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept must serve training too
def pyramid_layout(schedule: ScaleSchedule, head_dim: int, device: torch.device) -> TokenLayout:
    """Tokens of all scales, coarse to fine: the first rows of the position table."""
    counts = torch.tensor(schedule.num_tokens_per_scale)
    levels = torch.arange(len(schedule)).repeat_interleave(counts)
    cos, sin = rope_table(schedule.position_scales, head_dim)
    return TokenLayout(levels, cos[: len(levels)], sin[: len(levels)]).to(device)


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
    return TokenLayout(levels, cos, sin).to(device)
