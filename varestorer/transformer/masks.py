"""Which token sees which. True means the query (row) may look at the key (column)."""

from __future__ import annotations

from torch import Tensor


def block_causal_mask(levels_L: Tensor) -> Tensor:
    """A token sees its own and all coarser scales (VAR; the teacher): (L, L) bool."""
    return levels_L[:, None] >= levels_L[None, :]


def cross_scale_mask(levels_L: Tensor) -> Tensor | None:
    """Every token sees every token (VARestorer's cross-scale attention): no mask at all."""
    return None


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


MASKS = {"cross_scale": cross_scale_mask, "causal": block_causal_mask}
"""The student's attention by its name in configs."""
