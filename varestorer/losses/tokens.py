"""Losses of tokens: what each counts (Infinity), matching of distributions (VARestorer), preference (H-VAR).

Shapes: `B` batch, `L` tokens of all scales, `S` symbols per token.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from varestorer.tokenizer.schedule import ScaleSchedule
from varestorer.transformer.heads import Head
from varestorer.utils.errors import UserError


def token_weights(schedule: ScaleSchedule, reweight_by_scale: bool = True) -> Tensor:
    """Weight of each token, (L,), sum 1: equal, or sqrt(A_K / A_k) with A_k the tokens of its scale."""
    areas = torch.tensor(schedule.num_tokens_per_scale, dtype=torch.float32)
    per_scale = (areas[-1] / areas).sqrt() if reweight_by_scale else torch.ones_like(areas)
    weights = per_scale.repeat_interleave(torch.tensor(schedule.num_tokens_per_scale))
    return weights / weights.sum()


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept must serve training too
def token_shares(schedule: ScaleSchedule, reduction: str, device: torch.device) -> Tensor:
    """What each token counts in the sum over the tokens, (L,): one over the tokens of its scale, or of all scales."""
    counts = torch.tensor(schedule.num_tokens_per_scale)
    shares = 1 / counts if reduction == "scale" else torch.full((len(counts),), 1 / schedule.num_tokens)
    return shares.repeat_interleave(counts).to(device)


def distribution_matching_loss(
    teacher_logits: Tensor,
    student_logits: Tensor,
    schedule: ScaleSchedule,
    head: Head,
    direction: str = "forward",
    temperature: float = 1.0,
    reduction: str = "scale",
) -> Tensor:
    """L_KL = sum_k KL(p_T(r_k | r_HQ,<k) || p_S(r_k | r_LQ)), in nats.

    Args:
        teacher_logits: (B, L, ...) of the teacher; no gradient is taken through them.
        student_logits: of the student.
        schedule: which tokens belong to which scale.
        head: knows the KL of its symbols.
        direction: "forward" KL(teacher || student), as in the paper, or "reverse" KL(student || teacher).
        temperature: both distributions are softened by it.
        reduction: "scale" averages over the tokens and symbols of a scale and sums over the scales; "token" averages
            over all tokens and symbols.
    Returns:
        Scalar, mean over the batch.
    Raises:
        ValueError: unknown direction or reduction.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"KL direction must be forward or reverse, got {direction!r}")
    if reduction not in ("scale", "token"):
        raise ValueError(f"KL reduction must be scale or token, got {reduction!r}")
    teacher = teacher_logits.detach().float() / temperature
    student = student_logits.float() / temperature
    kl_BLS = head.kl(teacher, student) if direction == "forward" else head.kl(student, teacher)
    shares_L = token_shares(schedule, reduction, kl_BLS.device)
    return (kl_BLS.mean(dim=(0, 2)) * shares_L).sum()


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
    if reduction not in ("mean", "sum"):
        raise UserError(f"the preference's likelihood must be mean or sum, got {reduction!r}")
    loss_BL = head.cross_entropy(logits, labels)
    return -(loss_BL.mean(dim=1) if reduction == "mean" else loss_BL.sum(dim=1))


def preference_loss(chosen_B: Tensor, rejected_B: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta (log p(chosen) - log p(rejected))) of each sample, (B,); ln 2 where both are as likely.

    The photograph's tokens over the degraded image's (H-VAR): DPO without a reference network.
    """
    return F.softplus(-beta * (chosen_B - rejected_B))
