"""Which token sees which. True means the query (row) may look at the key (column)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from varestorer.transformer.layout import TokenLayout

TOGETHER = 512
"""Scales that end within so many tokens are attended in one masked call, each later one in a call of its own."""


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


MASKS = ("cross_scale", "causal")
"""The student's attention by its name in configs: every token sees all (no mask at all), or `BlockCausal`."""
