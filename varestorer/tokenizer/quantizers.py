"""Quantizers of one residual map, with one interface for the multi-scale quantizer above them.

A quantizer turns features (B, Z, h, w) into `indices` and indices back into `codes` of the features' shape.
Binary spherical indices are bits (B, Z, h, w). Those of a learned codebook are entries (B, h, w).

Shapes: `B` batch, `Z` latent width, `V` codes, `K` scales, `h w` latent positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
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
        unit = F.normalize(features_BZhw.float(), dim=1) / self.magnitude
        probability = torch.sigmoid(2.0 * unit / temperature)
        per_bit = _binary_entropy(probability).mean()
        of_average = _binary_entropy(probability.mean(dim=(0, 2, 3))).mean()
        return per_bit, of_average


class CodebookQuantizer(nn.Module):
    """Each position to the nearest of V learned vectors, by plain Euclidean distance: nothing is normalized.

    Args:
        num_codes: V.
        width: Z.
    """

    def __init__(self, num_codes: int, width: int) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.entries = nn.Parameter(torch.zeros(num_codes, width))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Small random codes for training from scratch, uniform in +-20 / V."""
        nn.init.uniform_(self.entries, -20 / self.num_codes, 20 / self.num_codes, generator=generator)

    @torch.no_grad()
    def indices(self, features_BZhw: Tensor) -> Tensor:
        """Number of the nearest code at each position, (B, h, w) int64; of equally near ones the first."""
        return self._distances(features_BZhw).argmin(dim=-1)

    def codes(self, indices: Tensor) -> Tensor:
        """Numbers (B, h, w), or weights of the codes (B, V, h, w) that sum to 1, to codes (B, Z, h, w) float32."""
        if indices.is_floating_point():
            return torch.einsum("bvhw,vz->bzhw", indices.float(), self.entries.float())
        return rearrange(F.embedding(indices, self.entries.float()), "b h w z -> b z h w")

    def flip(self, indices: Tensor, noise: Tensor, strength: Tensor) -> Tensor:
        """Each number replaced by another one, all others alike, where `noise` is below `strength` (broadcast).

        Args:
            indices: (B, h, w).
            noise: uniform in [0, 1), of the same shape; below `strength` it also says which code comes instead.
            strength: share to be replaced, in [0, 1].
        """
        # what is left of the noise below the strength is uniform again
        steps = 1 + (noise / strength.clamp(min=1e-9) * (self.num_codes - 1)).long()
        return torch.where(noise < strength, (indices + steps) % self.num_codes, indices)

    def entropy_terms(self, features_BZhw: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Entropies in nats of the soft choice softmax(-distance / temperature): its mean, and that of the mean choice.

        The first should be small (decided positions), the second large (all codes in use).
        """
        log_p = (-self._distances(features_BZhw) / temperature).log_softmax(dim=-1)
        p_BhwV = log_p.exp()
        average_V = p_BhwV.mean(dim=(0, 1, 2))
        return -(p_BhwV * log_p).sum(dim=-1).mean(), -torch.xlogy(average_V, average_V).sum()

    def _distances(self, features_BZhw: Tensor) -> Tensor:
        """Squared distance to each code, (B, h, w, V), as |z|^2 + |e|^2 - 2 z e in float32.

        Another order of this sum rounds differently, and near ties would become other tokens than the published
        networks were trained on.
        """
        with torch.autocast(features_BZhw.device.type, enabled=False):
            tokens_NZ = rearrange(features_BZhw.float(), "b z h w -> (b h w) z")
            codebook_VZ = self.entries.float()
            squares_NV = tokens_NZ.square().sum(dim=1, keepdim=True) + codebook_VZ.square().sum(dim=1)
            distances_NV = torch.addmm(squares_NV, tokens_NZ, codebook_VZ.T, alpha=-2)
        return distances_NV.unflatten(0, (features_BZhw.shape[0], *features_BZhw.shape[-2:]))


def vq_losses(features_BZhw: Tensor, cumulative: Sequence[Tensor], beta: float = 0.25) -> Tensor:
    """VQ loss after each scale, (K,): beta |sg[f_hat_k] - f|^2 + |f_hat_k - sg[f]|^2, means over all numbers.

    The first term holds the features to the codes (commitment), the second draws codes and residual convolutions to
    the features. The training loss is the mean over the scales.

    Args:
        features_BZhw: encoder output f.
        cumulative: f_hat_k, the sum of the codes of scales 1 to k, with the graph back to the codebook.
        beta: weight of the commitment.
    """
    features, target = features_BZhw.float(), features_BZhw.detach().float()
    terms = [beta * F.mse_loss(features, total.detach()) + F.mse_loss(total, target) for total in cumulative]
    return torch.stack(terms)


def code_counts(indices: Sequence[Tensor], num_codes: int) -> Tensor:
    """How often each code was chosen in each scale, (K, V) int64; counts of batches and processes may be added.

    Args:
        indices: of each scale, any shape.
        num_codes: V.
    """
    return torch.stack([torch.bincount(scale.flatten(), minlength=num_codes) for scale in indices])


def used_share(counts_KV: Tensor) -> Tensor:
    """Share of the codes that were chosen at all in each scale, (K,) in [0, 1]."""
    return (counts_KV > 0).float().mean(dim=-1)


def perplexity(counts_KV: Tensor) -> Tensor:
    """How many evenly used codes would have the entropy of these counts, (K,) in [1, V]."""
    shares_KV = counts_KV / counts_KV.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.exp(-torch.xlogy(shares_KV, shares_KV).sum(dim=-1))


def _binary_entropy(p: Tensor) -> Tensor:
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())
