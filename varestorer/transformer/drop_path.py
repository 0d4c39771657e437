"""Drop path (stochastic depth): whole branches of blocks are left out at random while the network trains.

Shapes: `B` batch, `D` blocks, 3 branches of a block (self attention, cross attention, feed-forward).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from varestorer.transformer.model import VARTransformer


def branch_factors(uniform_BD3: Tensor, rate: float) -> Tensor:
    """Factor of each branch, (B, D, 3): 0 where it is dropped, else 1 / (1 - p), so that its mean is 1.

    Args:
        uniform_BD3: uniform noise in [0, 1).
        rate: p of the last block, in [0, 1]; it grows linearly from 0 in the first (stochastic depth).
    """
    rates = torch.linspace(0, rate, uniform_BD3.shape[1], device=uniform_BD3.device)[:, None]
    return (uniform_BD3 >= rates) / (1 - rates).clamp(min=1e-6)


@contextmanager
def dropped_paths(transformer: VARTransformer, factors_BD3: Tensor | None) -> Iterator[None]:
    """Multiply the branches of the transformer's blocks by these factors inside the `with`; None for no change."""
    transformer.branch_factors_BD3 = factors_BD3
    try:
        yield
    finally:
        transformer.branch_factors_BD3 = None
