"""Preference of the photograph's tokens over the degraded image's (H-VAR: DPO without a reference network).

Shapes: `B` batch, `L` tokens of all scales.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from varestorer.transformer.heads import Head
from varestorer.utils.errors import UserError

REDUCTIONS = ("mean", "sum")


def log_likelihood(head: Head, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """log p of each sample's tokens, (B,), in nats.

    Args:
        head: knows what a symbol is.
        logits: of all tokens, given the true coarser ones.
        labels: the tokens.
        reduction: "mean" over the tokens, or "sum". The ratio of two sums over thousands of tokens saturates the
            preference; that of two means stays near its slope, and moves with beta.

    Raises:
        UserError: another reduction.
    """
    if reduction not in REDUCTIONS:
        raise UserError(f"the preference's likelihood must be {' or '.join(REDUCTIONS)}, got {reduction!r}")
    loss_BL = head.cross_entropy(logits, labels)
    return -(loss_BL.mean(dim=1) if reduction == "mean" else loss_BL.sum(dim=1))


def preference_loss(chosen_B: Tensor, rejected_B: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta (log p(chosen) - log p(rejected))) of each sample, (B,); ln 2 where both are as likely."""
    return F.softplus(-beta * (chosen_B - rejected_B))
