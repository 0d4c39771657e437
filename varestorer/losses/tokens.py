"""How much each token counts in the losses of the teacher (Infinity).

Shapes: `L` tokens of all scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varestorer.tokenizer.schedule import ScaleSchedule


def token_weights(schedule: ScaleSchedule, reweight_by_scale: bool = True) -> Tensor:
    """Weight of each token, (L,), sum 1: equal, or sqrt(A_K / A_k) with A_k the tokens of its scale."""
    areas = torch.tensor(schedule.num_tokens_per_scale, dtype=torch.float32)
    per_scale = (areas[-1] / areas).sqrt() if reweight_by_scale else torch.ones_like(areas)
    weights = per_scale.repeat_interleave(torch.tensor(schedule.num_tokens_per_scale))
    return weights / weights.sum()
