"""Which token sees which. True means the query (row) may look at the key (column)."""

from __future__ import annotations

from torch import Tensor


def block_causal_mask(levels_L: Tensor) -> Tensor:
    """A token sees its own and all coarser scales (VAR; the teacher): (L, L) bool."""
    return levels_L[:, None] >= levels_L[None, :]


def cross_scale_mask(levels_L: Tensor) -> Tensor | None:
    """Every token sees every token (VARestorer's cross-scale attention): no mask at all."""
    return None
