"""Distribution matching between the teacher's and the student's bits (paper, L_KL).

Shapes: `B` batch, `L` tokens of all scales, `Z` bits per token; logits end in the pair [bit is 0, bit is 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from varestorer.tokenizer.schedule import ScaleSchedule


def bit_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) of each two-way distribution in nats; the last dimension (2) is summed."""
    log_p, log_q = p_logits.log_softmax(dim=-1), q_logits.log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def distribution_matching_loss(
    teacher_BLZ2: Tensor,
    student_BLZ2: Tensor,
    schedule: ScaleSchedule,
    direction: str = "forward",
    temperature: float = 1.0,
    reduction: str = "scale",
) -> Tensor:
    """L_KL = sum_k KL(p_T(r_k | r_HQ,<k) || p_S(r_k | r_LQ)), in nats.

    Args:
        teacher_BLZ2: logits of the teacher; no gradient is taken through them.
        student_BLZ2: logits of the student.
        schedule: which tokens belong to which scale.
        direction: "forward" KL(teacher || student), as in the paper, or "reverse" KL(student || teacher).
        temperature: both distributions are softened by it.
        reduction: "scale" averages over the tokens and bits of a scale and sums over the scales; "token" averages
            over all tokens and bits.

    Returns:
        Scalar, mean over the batch.

    Raises:
        ValueError: unknown direction or reduction.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"KL direction must be forward or reverse, got {direction!r}")
    if reduction not in ("scale", "token"):
        raise ValueError(f"KL reduction must be scale or token, got {reduction!r}")
    teacher = teacher_BLZ2.detach().float() / temperature
    student = student_BLZ2.float() / temperature
    kl_BLZ = bit_kl(teacher, student) if direction == "forward" else bit_kl(student, teacher)
    if reduction == "token":
        return kl_BLZ.mean()
    return torch.stack([kl_BLZ[:, tokens].mean() for tokens in schedule.slices]).sum()
