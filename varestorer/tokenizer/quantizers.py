"""Quantizers of one residual map, with one interface for the multi-scale quantizer above them.

A quantizer turns features (B, Z, h, w) into `indices` and indices back into `codes` of the features' shape.
Binary spherical indices are bits (B, Z, h, w). Those of a learned codebook are entries (B, h, w).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class Quantizer(Protocol):
    """What `MultiScaleQuantizer` asks of a quantizer."""

    def indices(self, features_BZhw: Tensor) -> Tensor:
        """Nearest code of every position."""

    def codes(self, indices: Tensor) -> Tensor:
        """The codes (B, Z, h, w) of indices."""


class BinarySphericalQuantizer(nn.Module):
    """Each channel to +-1/sqrt(Z): the corners of a cube on the unit sphere (BSQ; Infinity, section 3.2).

    Args:
        num_bits: Z, bits per token.
    """

    def __init__(self, num_bits: int) -> None:
        super().__init__()
        self.num_bits = num_bits
        self.magnitude = num_bits**-0.5

    def indices(self, features_BZhw: Tensor) -> Tensor:
        """Bits (bool): 1 where a feature is positive. Exact zero is 0. Normalizing first would change no sign."""
        return features_BZhw > 0

    def codes(self, indices: Tensor) -> Tensor:
        """Bits (B, Z, h, w), or probabilities of a 1 in [0, 1], to codes in [-1/sqrt(Z), 1/sqrt(Z)], float32."""
        return (indices.float() * 2.0 - 1.0) * self.magnitude

    def flip(self, indices: Tensor, noise: Tensor, strength: Tensor) -> Tensor:
        """Each bit inverted where `noise` (uniform, shape of the bits) is below `strength` (broadcast)."""
        return indices ^ (noise < strength)

    def entropy_terms(self, features_BZhw: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Soft-bit entropies in nats per bit: the mean of each bit's own, and that of each bit's average.

        The first should be small (decided bits), the second large (every bit used both ways): the entropy terms of
        BSQ (arXiv 2406.07548).
        The features are normalized to the unit sphere first.
        """
        unit = nn.functional.normalize(features_BZhw.float(), dim=1) / self.magnitude
        probability = torch.sigmoid(2.0 * unit / temperature)
        per_bit = _binary_entropy(probability).mean()
        of_average = _binary_entropy(probability.mean(dim=(0, 2, 3))).mean()
        return per_bit, of_average


def _binary_entropy(p: Tensor) -> Tensor:
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())
