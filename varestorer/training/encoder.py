"""Photographs and degraded images as tokens: in one pass, or with gradients to the tokenizer's encoder.

Shapes: `B` batch, `C` channels, `H W` pixels, `Z` bits per token, `h w` latent positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from varestorer.conditioning.pyramid import Condition
from varestorer.systems.varestorer import VARestorer
from varestorer.tokenizer import ScaleSchedule, TokenPyramid
from varestorer.tokenizer.autoencoder import Encoder
from varestorer.tokenizer.quantisers import Quantiser
from varestorer.tokenizer.residual import resize_area, resize_bilinear
from varestorer.utils.images import to_network


@dataclass(frozen=True)
class PairTokens:
    """Tokens of photographs and of the same images degraded.

    Attributes:
        photograph: what the teacher sees.
        condition: what the student sees.
        features_BChw: the encoder's feature maps of the photographs (`Encoder.features`).
    """

    photograph: TokenPyramid
    condition: Condition
    features_BChw: Sequence[Tensor]


@torch.no_grad()
def cleaned_input(system: VARestorer, lq_B3HW: Tensor) -> Tensor:
    """Degraded images in [0, 1] as the encoder gets them: through the restorer, if there is one, and in [-1, 1]."""
    return to_network(lq_B3HW if system.restorer is None else system.restorer(lq_B3HW))


@torch.no_grad()
def pair_tokens(system: VARestorer, hq_B3HW: Tensor, lq_B3HW: Tensor) -> PairTokens:
    """Tokens of both images of each pair, by one pass through the encoder.

    Args:
        system: its restorer, if it has one, cleans the degraded images first.
        hq_B3HW: photographs in [0, 1] of side `system.tile`.
        lq_B3HW: the same degraded.
    """
    cleaned = cleaned_input(system, lq_B3HW)
    with levels_kept(system.tokenizer.encoder) as levels:
        pyramid = system.tokenizer.encode(torch.cat([to_network(hq_B3HW), cleaned]), system.schedule)
    photograph, degraded = halves(pyramid)
    condition = system.conditioner.from_pyramid(degraded, system.schedule, cleaned)
    return PairTokens(photograph, condition, [level.chunk(2)[0] for level in levels])


def halves(pyramid: TokenPyramid) -> tuple[TokenPyramid, TokenPyramid]:
    """The first and the second half of a batch of tokens."""
    names = ("indices", "predicted", "cumulative")
    first, second = (
        TokenPyramid(*(tuple(scale.chunk(2)[number] for scale in getattr(pyramid, name)) for name in names))
        for number in range(2)
    )
    return first, second


@contextmanager
def levels_kept(encoder: Encoder) -> Iterator[list[Tensor]]:
    """The list gets the feature maps (`Encoder.features`) of the image that is encoded inside of the block."""
    kept: list[Tensor] = []
    modules = [*encoder.levels[:-1], encoder.middle]  # type: ignore[misc]
    hooks = [module.register_forward_hook(lambda _, inputs, output: kept.append(output)) for module in modules]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def trained_condition(system: VARestorer, lq_B3HW: Tensor) -> Condition:
    """`system.condition`, the same tokens, but gradients reach the encoder straight through the bits.

    Args:
        system: its restorer, if it has one, stays out of it.
        lq_B3HW: degraded images in [0, 1] of side `system.tile`.
    """
    cleaned = cleaned_input(system, lq_B3HW)
    features = system.tokenizer.features(cleaned)
    quantizer = system.tokenizer.quantizer
    pyramid = quantizer(features.detach(), system.schedule)
    pyramid = straight_through(pyramid, features.float(), system.schedule, quantizer.quantiser)
    return system.conditioner.from_pyramid(pyramid, system.schedule, cleaned)


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
