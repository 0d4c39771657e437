"""Multi-scale residual quantization (VAR, algorithms 1 and 2; Infinity, section 3.2).

A quantizer of one map turns features into indices and back: bits on the unit sphere, or entries of a codebook. The sum
of the up-sampled codes of all scales stands here once, in `RunningSum`: quantizing, generating and decoding are that
one object, fed with indices that are found, predicted or given.

Shapes: `B` batch, `Z` latent width, `V` codes, `h w` one scale, `l` its tokens, `L` tokens of all scales, `K` scales.
Indices of a scale are bits (B, Z, h, w) or entries of a codebook (B, h, w).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from varestorer.tokenizer.schedule import Scale, ScaleSchedule
from varestorer.utils.watch import watch


class Quantizer(Protocol):
    """What `MultiScaleQuantizer` asks of a quantizer."""

    def indices(self, features_BZhw: Tensor) -> Tensor:
        """Nearest code of every position."""

    def codes(self, indices: Tensor) -> Tensor:
        """The codes (B, Z, h, w) of indices."""


class BinarySphericalQuantizer(nn.Module):
    """Each of Z channels to +-1/sqrt(Z): the corners of a cube on the unit sphere (BSQ; Infinity, section 3.2)."""

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
    """Each position to the nearest of V learned vectors (V, Z), by plain Euclidean distance: nothing is normalized."""

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
        """Each number (B, h, w) replaced by another one, all others alike, where `noise` is below `strength`, a share.

        Noise is uniform in [0, 1), of the same shape; below `strength` (broadcast) it also says which code comes
        instead.
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
    """How often each of V codes was chosen in each scale, (K, V) int64; counts of batches and processes add up."""
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


# Changes the indices of one scale before they enter the sum: (scale number, indices) -> indices.
Corruption = Callable[[int, Tensor], Tensor]
# Resizes a map (B, Z, h, w): (map, size) -> map.
Resize = Callable[[Tensor, Scale], Tensor]


def _resized(x_BZhw: Tensor, size: Scale, **options: Any) -> Tensor:
    """A map of another size by torch's `interpolate`; the identity at equal size."""
    return x_BZhw if tuple(x_BZhw.shape[-2:]) == size else F.interpolate(x_BZhw, size=size, **options)


# corners are not aligned, and only what says so antialiases
resize_bilinear = partial(_resized, mode="bilinear", align_corners=False)
resize_bicubic = partial(_resized, mode="bicubic", align_corners=False)  # a = -0.75
resize_area = partial(_resized, mode="area")  # mean over the pixels of each target cell
reduce_bicubic = partial(_resized, mode="bicubic", align_corners=False, antialias=True)  # may overshoot
REUSES = ("tokens", "sum", "none")
RESIZES: dict[str, Resize] = {"bilinear": resize_bilinear, "bicubic": resize_bicubic, "area": resize_area}
REDUCTIONS: dict[str, Resize] = {"area": resize_area, "bicubic": reduce_bicubic}
"""How an image is reduced to the target sizes."""


def to_tokens(x: Tensor) -> Tensor:
    """Row-major tokens (B, l, Z) of a map (B, Z, h, w), or (B, l) of a map (B, h, w)."""
    return rearrange(x, "b h w -> b (h w)" if x.ndim == 3 else "b z h w -> b (h w) z")


def to_map(tokens: Tensor, scale: Scale) -> Tensor:
    """The inverse of `to_tokens`: tokens (B, l, Z) or (B, l) of one scale as a map."""
    pattern = "b (h w) -> b h w" if tokens.ndim == 2 else "b (h w) z -> b z h w"
    return rearrange(tokens, pattern, h=scale[0], w=scale[1])


class Phi(nn.Module):
    """A few 3x3 convolutions that the scales share: phi(x) = (1 - share) x + share conv(x), with the nearest conv.

    Args:
        channels: Z.
        num_convs: how many there are for all scales.
        share: of the convolution in the result.
    """

    def __init__(self, channels: int, num_convs: int = 4, share: float = 0.5) -> None:
        super().__init__()
        self.share = share
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(num_convs))

    def forward(self, codes_BZhw: Tensor, k: int, num_scales: int) -> Tensor:
        """Smooth the codes of scale k (from 0) of K, already enlarged to the latent size."""
        conv = self.convs[phi_index(k, num_scales, len(self.convs))]
        return codes_BZhw * (1 - self.share) + conv(codes_BZhw) * self.share


def phi_index(k: int, num_scales: int, num_convs: int = 4) -> int:
    """Which convolution scale k (from 0) takes: that of the tick nearest to k / (K - 1).

    The ticks are the middles of `num_convs` equal parts of [0, 1], except that four, the published number, stand at
    1/12, ..., 11/12. An odd K has a tie at 1/2: the first minimum in float64 decides, so these ticks are NumPy's.
    """
    first = 1 / 3 / num_convs if num_convs == 4 else 1 / 2 / num_convs
    ticks = np.linspace(first, 1 - first, num_convs)
    return int(np.argmin(np.abs(ticks - k / max(num_scales - 1, 1))))


@dataclass(frozen=True)
class TokenPyramid:
    """An image as tokens of K scales.

    Attributes:
        indices: labels of each scale, coarse to fine: the quantized residual.
        predicted: the indices that entered the sum; equal to `indices` unless they were corrupted.
        bases: what each scale starts from: the sum of the coarser ones at the size of the scale's map, float32.
        cumulative: the sum after each scale, at the same size.
        residual: what the last scale quantized, before its own codes were taken off (VARSR's continuous residual).
        shrink: how a sum becomes the input of a scale.
    """

    indices: tuple[Tensor, ...]
    predicted: tuple[Tensor, ...]
    bases: tuple[Tensor, ...]
    cumulative: tuple[Tensor, ...]
    residual: Tensor
    shrink: Resize = resize_bilinear

    @property
    def codes(self) -> Tensor:
        """The decoder's input: the sum over all scales, (B, Z, h_K, w_K)."""
        return self.cumulative[-1]

    def halves(self) -> tuple[TokenPyramid, TokenPyramid]:
        """The pyramids of the first and of the second half of the batch."""

        def half(number: int) -> TokenPyramid:
            names = ("indices", "predicted", "bases", "cumulative")
            lists: dict[str, Any] = {name: tuple(x.chunk(2)[number] for x in getattr(self, name)) for name in names}
            return replace(self, **lists, residual=self.residual.chunk(2)[number])

        return half(0), half(1)

    def labels(self) -> Tensor:
        """Indices of all scales as tokens: bits (B, L, Z), or entries (B, L)."""
        return torch.cat([to_tokens(indices) for indices in self.indices], dim=1)

    def inputs(self, resize: Resize | None = None) -> Tensor:
        """Transformer inputs of scales 2 to K: the sum so far, resized to the next scale, (B, L - 1, Z).

        Infinity is trained on the bilinear resize even though it shrinks the map.

        Args:
            resize: another kernel than the tokenizer's own.
        """
        return self._resized(self.bases, resize or self.shrink)

    def own_inputs(self) -> Tensor:
        """As `inputs`, but each sum has the scale's own codes in it: for a student, which is shown the whole image."""
        return self._resized(self.cumulative, self.shrink)

    def _resized(self, sums: Sequence[Tensor], resize: Resize) -> Tensor:
        """Sums of codes at the sizes of scales 2 to K, as tokens."""
        scales = [(indices.shape[-2], indices.shape[-1]) for indices in self.indices]
        resized = [to_tokens(resize(total, size)) for total, size in zip(sums[1:], scales[1:], strict=True)]
        return torch.cat(resized, dim=1) if resized else to_tokens(self.codes)[:, :0]


class MultiScaleQuantizer(nn.Module):
    """Quantizes a latent map coarse to fine, each scale what the coarser ones left over.

    Args:
        codebook: quantizer of one residual map: bits or entries.
        enlarge: kernel that brings codes to the size of the map, one of `RESIZES`.
        shrink: kernel that brings the sum to the size of the next scale, likewise.
        phi: convolutions after the enlarging, `phi(map, scale number, number of scales)`; None for none.
        reuse: what becomes of the sum where the size of the map grows (H-VAR): "tokens" renders all earlier scales
            anew at the new size, "sum" enlarges the finished sum. "none" says that the tokens were found at the last
            size alone, as VAR's; what is decoded of them at a smaller one is rendered as by "tokens".
    """

    def __init__(
        self,
        codebook: Quantizer,
        enlarge: str = "bilinear",
        shrink: str = "bilinear",
        phi: nn.Module | None = None,
        reuse: str = "tokens",
    ) -> None:
        super().__init__()
        self.codebook: Any = codebook
        self.enlarge = RESIZES[enlarge]
        self.shrink = RESIZES[shrink]
        self.phi = phi
        self.reuse = reuse

    def running_sum(self, schedule: ScaleSchedule, raw_last: bool = False, shrink: Resize | None = None) -> RunningSum:
        """An empty sum; see `RunningSum`."""
        return RunningSum(self, schedule, raw_last, shrink or self.shrink)

    def forward(
        self,
        features_BZhw: Tensor | Sequence[Tensor],
        schedule: ScaleSchedule,
        corrupt: Corruption | None = None,
        raw_last: bool = False,
    ) -> TokenPyramid:
        """Quantize features, in float32.

        Args:
            features_BZhw: encoder output, (h, w) = the last scale; one map for each of the schedule's `targets`
                where it has several.
            schedule: the scales.
            corrupt: optional noise on the indices before they are summed; later residuals see the noise, which is
                how a teacher learns to mend its own errors (bitwise self-correction; Infinity, section 3.4).
            raw_last: leave phi out at the last scale (VARSR).
        Raises:
            ValueError: the features' sizes are not the targets.
        """
        maps = [features_BZhw] if isinstance(features_BZhw, Tensor) else list(features_BZhw)
        sizes = [tuple(features.shape[-2:]) for features in maps]
        if sizes != list(schedule.targets):
            wanted, got = (", ".join(f"{h}x{w}" for h, w in some) for some in (schedule.targets, sizes))
            raise ValueError(f"features must have the size of the last scale {wanted}, got {got}")
        features = {size: features.float() for size, features in zip(sizes, maps, strict=True)}
        zeros = features[schedule.map_sizes[0]].detach() * 0  # what is not finite stays so, or the bits would hide it
        total = RunningSum(self, schedule, raw_last, self.shrink, zeros)
        labels, bases, cumulative, residual = [], [], [], maps[-1]
        for k, (scale, size) in enumerate(zip(schedule.scales, schedule.map_sizes, strict=True)):
            base = total.at(size)
            bases.append(zeros if base is None else base)
            residual = features[size] - bases[-1]
            indices = self.codebook.indices(resize_area(residual, scale))
            labels.append(indices)
            cumulative.append(total.add(indices if corrupt is None else corrupt(k, indices)))
        maps_of_sums = tuple(bases), tuple(cumulative)
        return TokenPyramid(tuple(labels), tuple(total.indices), *maps_of_sums, residual, self.shrink)

    def codebook_losses(self, features: Sequence[Tensor], pyramid: TokenPyramid, schedule: ScaleSchedule) -> Tensor:
        """Squared distance of each scale's codes to the residual that they stand for, (K,); draws the codes alone.

        Args:
            features: what `forward` was given, one map for each target.
            pyramid: what it gave.
            schedule: the scales.
        """
        at_size = dict(zip(schedule.targets, features, strict=True))
        terms = []
        for scale, size, indices, base in zip(
            schedule.scales, schedule.map_sizes, pyramid.indices, pyramid.bases, strict=True
        ):
            residual = resize_area((at_size[size].float() - base).detach(), scale)
            terms.append(F.mse_loss(self.codebook.codes(indices), residual))
        return torch.stack(terms)

    def targets_to_codes(self, indices: Sequence[Tensor], schedule: ScaleSchedule) -> list[Tensor]:
        """The sum of codes at each target that the given first scales complete, smallest first."""
        total = self.running_sum(schedule)
        sums = [total.add(of_scale) for of_scale in indices]
        return [codes for k, codes in enumerate(sums) if schedule.ends_target(k)]

    def indices_to_codes(self, indices: Sequence[Tensor], schedule: ScaleSchedule, raw_last: bool = False) -> Tensor:
        """Sum of the up-sampled codes of the first scales.

        Args:
            indices: of each scale; float probabilities or straight-through symbols keep gradients.
            schedule: the scales, of which all or the first may be given.
            raw_last: see `forward`.
        """
        total = self.running_sum(schedule, raw_last)
        for of_scale in indices:
            total.add(of_scale)
        return total.codes


class RunningSum:
    """The codes of the scales so far, enlarged and summed: up-sampling, adding, and the next scale's input.

    Args:
        quantizer: its codebook, kernels and phi are used.
        schedule: the scales, added in order.
        raw_last: leave phi out at the last scale. It is a property of the call: VAR has phi everywhere, VARSR codes
            and restores without it there, with the same weights.
        shrink: kernel of `next_input`.
        start: what the codes are added to; None for nothing.
    """

    def __init__(
        self,
        quantizer: MultiScaleQuantizer,
        schedule: ScaleSchedule,
        raw_last: bool,
        shrink: Resize,
        start: Tensor | None = None,
    ) -> None:
        self.quantizer = quantizer
        self.schedule = schedule
        self.raw_last = raw_last
        self.shrink = shrink
        self.indices: list[Tensor] = []
        self._total = start

    @property
    def codes(self) -> Tensor:
        """The sum so far."""
        if self._total is None:
            raise ValueError("a running sum needs the indices of at least one scale, got none")
        return self._total

    @watch("sum codes")
    def add(self, indices: Tensor) -> Tensor:
        """Add the next scale; returns the sum, (B, Z, h, w) at the size of that scale's map."""
        k = len(self.indices)
        size = self.schedule.map_sizes[k]
        base, rendered = self.at(size), self._rendered(k, indices, size)
        self.indices.append(indices)
        self._total = rendered if base is None else base + rendered
        return self._total

    def at(self, size: Scale) -> Tensor | None:
        """The sum so far as a map of a size; None before the first scale."""
        if self._total is None or tuple(self._total.shape[-2:]) == size:
            return self._total
        if self.quantizer.reuse == "sum":
            return self.quantizer.enlarge(self._total, size)
        rendered = [self._rendered(k, indices, size) for k, indices in enumerate(self.indices)]
        return torch.stack(rendered).sum(dim=0)

    def next_input(self) -> Tensor | None:
        """Transformer input (B, l, Z) of the scale to come; None after the last one."""
        k = len(self.indices)
        if k == len(self.schedule):
            return None
        base = self.at(self.schedule.map_sizes[k])
        if base is None:
            raise ValueError("the first scale has no input: it starts from the start token")
        return to_tokens(self.shrink(base, self.schedule.scales[k]))

    def _rendered(self, k: int, indices: Tensor, size: Scale) -> Tensor:
        """What scale k adds to a map of this size."""
        enlarged = self.quantizer.enlarge(self.quantizer.codebook.codes(indices), size)
        is_raw = self.raw_last and k == len(self.schedule) - 1
        phi = self.quantizer.phi
        return enlarged if phi is None or is_raw else phi(enlarged, k, len(self.schedule))
