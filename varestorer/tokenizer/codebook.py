"""Vector quantization by a codebook (VAR, section 3.2; VARSR).

Shapes: `B` batch, `Z` width of a code, `V` codes, `K` scales, `h w` latent positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class CodebookQuantizer(nn.Module):
    """Each position to the nearest of V learned vectors, by plain Euclidean distance: nothing is normalized.

    Args:
        num_codes: V.
        width: Z.
    """

    def __init__(self, num_codes: int, width: int) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.codebook = nn.Parameter(torch.zeros(num_codes, width))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Small random codes for training from scratch, uniform in +-20 / V."""
        nn.init.uniform_(self.codebook, -20 / self.num_codes, 20 / self.num_codes, generator=generator)

    @torch.no_grad()
    def indices(self, features_BZhw: Tensor) -> Tensor:
        """Number of the nearest code at each position, (B, h, w) int64; of equally near ones the first."""
        return self._distances(features_BZhw).argmin(dim=-1)

    def codes(self, indices: Tensor) -> Tensor:
        """Numbers (B, h, w), or weights of the codes (B, V, h, w) that sum to 1, to codes (B, Z, h, w) float32."""
        if indices.is_floating_point():
            return torch.einsum("bvhw,vz->bzhw", indices.float(), self.codebook.float())
        return rearrange(F.embedding(indices, self.codebook.float()), "b h w z -> b z h w")

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
            codebook_VZ = self.codebook.float()
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
