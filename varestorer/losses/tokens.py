"""Losses on tokens: bits (Infinity; spec F) and codes of a codebook (VAR, VARSR).

Shapes: `B` batch, `L` tokens of all scales, `Z` bits per token, whose logits end in the pair [bit is 0, bit is 1]; `V`
codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from varestorer.tokenizer.schedule import ScaleSchedule


def bit_cross_entropy(logits_BLZ2: Tensor, bits_BLZ: Tensor) -> Tensor:
    """Two-way cross entropy of each token's bits in nats, mean over the bits: (B, L)."""
    logits = logits_BLZ2.float()
    # -log p(bit) = softplus(wrong - right)
    margin = (logits[..., 1] - logits[..., 0]) * (bits_BLZ.float() * 2 - 1)
    return F.softplus(-margin).mean(dim=-1)


def code_cross_entropy(logits_BLV: Tensor, codes_BL: Tensor) -> Tensor:
    """Cross entropy of each token's code in nats: (B, L)."""
    losses = F.cross_entropy(logits_BLV.float().flatten(0, 1), codes_BL.flatten(), reduction="none")
    return losses.view(codes_BL.shape)


def token_weights(schedule: ScaleSchedule, reweight_by_scale: bool = True) -> Tensor:
    """Weight of each token, (L,), sum 1: equal, or sqrt(A_K / A_k) with A_k the tokens of its scale."""
    areas = torch.tensor(schedule.num_tokens_per_scale, dtype=torch.float32)
    per_scale = (areas[-1] / areas).sqrt() if reweight_by_scale else torch.ones_like(areas)
    weights = per_scale.repeat_interleave(torch.tensor(schedule.num_tokens_per_scale))
    return weights / weights.sum()


def bit_accuracy(logits_BLZ2: Tensor, bits_BLZ: Tensor) -> Tensor:
    """Share of bits whose likelier value is the right one, (B, L)."""
    likelier = logits_BLZ2[..., 1] > logits_BLZ2[..., 0]
    return (likelier == bits_BLZ.bool()).float().mean(dim=-1)


def code_accuracy(logits_BLV: Tensor, codes_BL: Tensor) -> Tensor:
    """1 where the likeliest code is the right one, else 0: (B, L) float."""
    return (logits_BLV.argmax(dim=-1) == codes_BL).float()
