"""Distribution matching between the teacher's and the student's bits (paper, L_KL).

Shapes: `B` batch, `L` tokens of all scales, `Z` bits per token; logits end in the pair [bit is 0, bit is 1].
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from varestorer.tokenizer.schedule import ScaleSchedule


def bit_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) of each two-way distribution in nats; the last dimension (2) is summed.

    With the margins m = logit of 1 - logit of 0 and p_1 = sigmoid(m_p), log p_0 = -softplus(m_p) and log p_1 = m_p +
    log p_0, so KL = p_1 (m_p - m_q) + softplus(m_q) - softplus(m_p): half the numbers of two log-softmaxes.
    """
    p_margin, q_margin = p_logits[..., 1] - p_logits[..., 0], q_logits[..., 1] - q_logits[..., 0]
    return torch.sigmoid(p_margin) * (p_margin - q_margin) + F.softplus(q_margin) - F.softplus(p_margin)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept must serve training too
def token_shares(schedule: ScaleSchedule, reduction: str, device: torch.device) -> Tensor:
    """What each token counts in the sum over the tokens, (L,): one over the tokens of its scale, or of all scales."""
    counts = torch.tensor(schedule.num_tokens_per_scale)
    shares = 1 / counts if reduction == "scale" else torch.full((len(counts),), 1 / schedule.num_tokens)
    return shares.repeat_interleave(counts).to(device)


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
    shares_L = token_shares(schedule, reduction, kl_BLZ.device)
    return (kl_BLZ.mean(dim=(0, 2)) * shares_L).sum()
