"""Multi-scale residual quantisation (VAR, algorithms 1 and 2; Infinity, section 3.2).

Shapes: `B` batch, `Z` bits per token, `h w` one scale, `l` its tokens, `L` tokens of all scales, `K` scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from varestorer.tokenizer.quantisers import Quantiser
from varestorer.tokenizer.schedule import Scale, ScaleSchedule

# Changes the indices of one scale before they enter the sum: (scale number, indices) -> indices.
Corruption = Callable[[int, Tensor], Tensor]


def resize_bilinear(x_BZhw: Tensor, size: Scale) -> Tensor:
    """Bilinear without antialiasing, corners not aligned; the identity at equal size."""
    if tuple(x_BZhw.shape[-2:]) == size:
        return x_BZhw
    return F.interpolate(x_BZhw, size=size, mode="bilinear", align_corners=False)


def resize_area(x_BZhw: Tensor, size: Scale) -> Tensor:
    """Mean over the pixels of each target cell (adaptive average pooling)."""
    return F.adaptive_avg_pool2d(x_BZhw, size)


def to_tokens(x_BZhw: Tensor) -> Tensor:
    """Row-major tokens (B, l, Z) of a map."""
    return rearrange(x_BZhw, "b z h w -> b (h w) z")


@dataclass(frozen=True)
class TokenPyramid:
    """An image as tokens of K scales.

    Attributes:
        indices: labels of each scale, coarse to fine: the quantised residual (bits: bool (B, Z, h, w)).
        predicted: the indices that entered the sum; equal to `indices` unless they were corrupted.
        cumulative: after each scale, the sum of the up-sampled codes so far, (B, Z, h_K, w_K) float32.
    """

    indices: tuple[Tensor, ...]
    predicted: tuple[Tensor, ...]
    cumulative: tuple[Tensor, ...]

    @property
    def codes(self) -> Tensor:
        """The decoder's input: the sum over all scales, (B, Z, h_K, w_K)."""
        return self.cumulative[-1]

    def labels(self) -> Tensor:
        """Bits of all scales as tokens, (B, L, Z) bool."""
        return torch.cat([to_tokens(bits) for bits in self.indices], dim=1)

    def inputs(self, resize: Callable[[Tensor, Scale], Tensor] = resize_bilinear) -> Tensor:
        """Transformer inputs of scales 2 to K: the sum so far, resized to the next scale, (B, L - 1, Z).

        Infinity is trained on the bilinear resize even though it shrinks the map (spec A).
        """
        return self._resized(self.cumulative[:-1], resize)

    def own_inputs(self) -> Tensor:
        """As `inputs`, but each sum has the scale's own codes in it: for a student, which is shown the whole image."""
        return self._resized(self.cumulative[1:], resize_bilinear)

    def _resized(self, sums: Sequence[Tensor], resize: Callable[[Tensor, Scale], Tensor]) -> Tensor:
        """Sums of codes at the sizes of scales 2 to K, as tokens."""
        scales = [(bits.shape[-2], bits.shape[-1]) for bits in self.indices[1:]]
        resized = [resize(total, size) for total, size in zip(sums, scales, strict=True)]
        if not resized:
            return to_tokens(self.codes)[:, :0]
        return torch.cat([to_tokens(x) for x in resized], dim=1)


class MultiScaleQuantizer(nn.Module):
    """Quantises a latent map coarse to fine, each scale what the coarser ones left over.

    Args:
        quantiser: quantiser of one residual map.
    """

    def __init__(self, quantiser: Quantiser) -> None:
        super().__init__()
        self.quantiser = quantiser

    def forward(
        self, features_BZhw: Tensor, schedule: ScaleSchedule, corrupt: Corruption | None = None
    ) -> TokenPyramid:
        """Quantise features at the schedule's last size, in float32.

        Args:
            features_BZhw: encoder output, (h, w) = the last scale.
            schedule: the scales.
            corrupt: optional noise on the indices before they are summed; later residuals see the noise, which is
                how a teacher learns to mend its own errors (bitwise self-correction; Infinity, section 3.4).

        Raises:
            ValueError: the features' size is not the last scale.
        """
        size = schedule.latent_size
        if tuple(features_BZhw.shape[-2:]) != size:
            got = "x".join(str(side) for side in features_BZhw.shape[-2:])
            raise ValueError(f"features must have the size of the last scale {size[0]}x{size[1]}, got {got}")
        features = features_BZhw.float()
        total = features.detach() * 0  # zeros; what is not finite stays so, or the bits would hide it
        labels, predicted, cumulative = [], [], []
        for k, scale in enumerate(schedule.scales):
            residual = features - total
            pooled = resize_area(residual, scale) if scale != size else residual
            bits = self.quantiser.indices(pooled)
            used = bits if corrupt is None else corrupt(k, bits)
            total = total + resize_bilinear(self.quantiser.codes(used), size)
            labels.append(bits)
            predicted.append(used)
            cumulative.append(total)
        return TokenPyramid(tuple(labels), tuple(predicted), tuple(cumulative))

    def indices_to_codes(self, indices: Sequence[Tensor], size: Scale) -> Tensor:
        """Sum of the up-sampled codes of all scales (eq. of `TokenPyramid.codes`).

        Args:
            indices: bits of each scale (B, Z, h, w); float probabilities or straight-through bits keep gradients.
            size: (h, w) of the result.
        """
        total: Tensor | None = None
        for bits in indices:
            upsampled = resize_bilinear(self.quantiser.codes(bits), size)
            total = upsampled if total is None else total + upsampled
        if total is None:
            raise ValueError("indices_to_codes needs the indices of at least one scale, got none")
        return total
