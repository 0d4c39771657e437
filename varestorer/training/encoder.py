"""The degraded image as the student's input, with gradients to the tokenizer's encoder.

Shapes: `B` batch, `H W` pixels, `Z` bits per token, `h w` latent positions.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from varestorer.conditioning.pyramid import Condition
from varestorer.systems.varestorer import VARestorer
from varestorer.tokenizer import ScaleSchedule, TokenPyramid
from varestorer.tokenizer.quantisers import Quantiser
from varestorer.tokenizer.residual import resize_area, resize_bilinear
from varestorer.utils.images import to_network


def trained_condition(system: VARestorer, lq_B3HW: Tensor) -> Condition:
    """`system.condition`, the same tokens, but gradients reach the encoder straight through the bits.

    Args:
        system: its restorer, if it has one, stays out of it.
        lq_B3HW: degraded images in [0, 1] of side `system.tile`.
    """
    with torch.no_grad():
        cleaned = lq_B3HW if system.restorer is None else system.restorer(lq_B3HW)
    features = system.tokenizer.features(to_network(cleaned))
    quantizer = system.tokenizer.quantizer
    pyramid = quantizer(features.detach(), system.schedule)
    pyramid = straight_through(pyramid, features.float(), system.schedule, quantizer.quantiser)
    return system.conditioner.from_pyramid(pyramid, system.schedule)


def straight_through(
    pyramid: TokenPyramid, features_BZhw: Tensor, schedule: ScaleSchedule, quantiser: Quantiser
) -> TokenPyramid:
    """The pyramid with the gradient of one whose codes equal the residuals they stand for.

    Each scale passes its gradient to what the coarser ones left over, so the sum over all scales passes its own to the
    features unchanged, and that of fewer scales to their coarse part.
    """
    size = schedule.latent_size
    total, cumulative = torch.zeros_like(features_BZhw), []
    for bits, scale in zip(pyramid.predicted, schedule.scales, strict=True):
        residual = features_BZhw - total
        pooled = residual if scale == size else resize_area(residual, scale)
        codes = pooled + (quantiser.codes(bits) - pooled).detach()
        total = total + resize_bilinear(codes, size)
        cumulative.append(total)
    return replace(pyramid, cumulative=tuple(cumulative))
