"""Perceptual losses behind one interface: callables `(pred_B3HW, target_B3HW) -> scalar`, images in [-1, 1].

`LPIPSLoss` is what the paper trains with; it and `DISTSLoss` need published weights, but not pyiqa (see `MetricLoss`).
`MSSSIMLoss` is a formula and needs none. All of them are differentiable in the prediction and average over the batch.

Shapes: B batch, C channels, H W image, h w one level.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varestorer.losses.pixel import float32_pair
from varestorer.utils.errors import reason
from varestorer.utils.iqa import METRIC_ERRORS, MetricUnavailableError, weight_files

PerceptualLoss = Callable[[Tensor, Tensor], Tensor]

WITH_WEIGHTS = ("lpips", "lpips-vgg", "dists")
NAMES = (*WITH_WEIGHTS, "ms_ssim")
VGG_TAPS = (4, 9, 16, 23, 30)
LPIPS = {"alex": ("lpips", (2, 5, 8, 10, 12)), "vgg": ("lpips-vgg", VGG_TAPS)}
LPIPS_MEAN, LPIPS_STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of images in [0, 1]
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weight of each scale, fine to coarse (Wang et al. 2003, Multi-scale structural similarity, section 3.2)."""


class SumLoss(nn.Module):
    """The sum of some perceptual losses, each of a share of the batch, rounded up: of its first images."""

    def __init__(self, parts: list[tuple[PerceptualLoss, float]]) -> None:
        super().__init__()
        self.parts = parts
        self.networks = nn.ModuleList(loss for loss, _ in parts if isinstance(loss, nn.Module))  # to move with this one

    def forward(self, pred_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
        """Sum of the distances, each a mean over its images: a float32 scalar."""
        total = pred_B3HW.new_zeros(())
        for loss, share in self.parts:
            count = ceil(len(pred_B3HW) * share)
            total = total + loss(pred_B3HW[:count], target_B3HW[:count])
        return total


def perceptual_parts(perceptual: str) -> list[tuple[str, float]]:
    """The losses of a sum as configs write it, and the share of the batch that each looks at.

    `lpips+dists/4` is LPIPS, and DISTS of a quarter of the batch, whose VGG16 would take longer than all the rest.

    Raises:
        ValueError: an unknown name, or a share that is none.
    """
    found = []
    for part in perceptual.split("+"):
        name, _, divisor = part.partition("/")
        if name not in NAMES or not (divisor or "1").isdecimal() or int(divisor or 1) < 1:
            raise ValueError(f"perceptual must be of {', '.join(NAMES)}, as lpips or lpips+dists/4, got {perceptual!r}")
        found.append((name, 1 / int(divisor or 1)))
    return found


def perceptual_loss(perceptual: str) -> PerceptualLoss:
    """The perceptual loss a config names.

    Args:
        perceptual: "lpips" (Alex), "lpips-vgg" or "dists", which need published weights; "ms_ssim", which needs none;
            or the sum of several, see `perceptual_parts`.
    Raises:
        UserError: weights that are missing.
        ValueError: an unknown name.
    """
    makers: dict[str, Callable[[], PerceptualLoss]] = {
        "lpips": LPIPSLoss,
        "lpips-vgg": partial(LPIPSLoss, net="vgg"),
        "dists": DISTSLoss,
        "ms_ssim": MSSSIMLoss,
    }
    parts = [(makers[name](), share) for name, share in perceptual_parts(perceptual)]
    return parts[0][0] if len(parts) == 1 and parts[0][1] == 1 else SumLoss(parts)


class MetricLoss(nn.Module):
    """A backbone of torchvision and the weights by which a metric compares its features; all frozen.

    Our own code, as pyiqa's may not be used commercially; it reads the same weight files.

    Args:
        metric: `lpips`, `lpips-vgg` or `dists`.
        taps: numbers of the layers before which features are taken.
    Attributes:
        slices: the layers from one tap to the next.
        own: name -> the metric's own weights.
    Raises:
        MetricUnavailableError: a weight file is missing or damaged (one line: which, and where it belongs).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, metric: str, taps: tuple[int, ...]) -> None:
        from torchvision import models

        super().__init__()
        backbone, own = (_read(path) for path in weight_files(metric))
        with torch.device("meta"):  # without the time to draw a classifier's weights
            layers = (models.alexnet if metric == "lpips" else models.vgg16)().features
        names = [name for name in backbone if name.startswith("features.")]
        layers.load_state_dict({name.removeprefix("features."): backbone[name] for name in names}, assign=True)
        self.slices = nn.ModuleList(layers[first:last] for first, last in pairwise((0, *taps)))
        self.own = nn.ParameterDict({name.replace(".", "_"): nn.Parameter(value) for name, value in own.items()})
        self.requires_grad_(False).to(memory_format=torch.channels_last)


class LPIPSLoss(MetricLoss):
    """Learned perceptual distance (Zhang et al. 2018, equation 1): `L_perc` of the paper.

    `net` is the backbone, `alex` (the one that evaluation uses) or `vgg`, else a ValueError; see `MetricLoss`.
    """

    def __init__(self, net: str = "alex") -> None:
        if net not in LPIPS:
            raise ValueError(f"net must be one of {', '.join(LPIPS)}, got {net!r}")
        super().__init__(*LPIPS[net])
        self.register_buffer("mean", torch.tensor(LPIPS_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(LPIPS_STD)[:, None, None])

    def forward(self, pred_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
        """Distance of the two images, mean over the batch: a float32 scalar >= 0."""
        pair = float32_pair(pred_B3HW, target_B3HW)
        distance = pair[0].new_zeros(())
        with torch.autocast(distance.device.type, enabled=False):
            x, y = ((image - self.mean) / self.std for image in pair)
            for layers, weight_1C11 in zip(self.slices, self.own.values(), strict=True):
                x, y = layers(x), layers(y)
                difference = (F.normalize(x, eps=1e-10) - F.normalize(y, eps=1e-10)).square()
                distance = distance + F.conv2d(difference, weight_1C11).mean()
        return distance


class DISTSLoss(MetricLoss):
    """Distance of structure and texture (Ding et al. 2020, equation 7): texture may lie elsewhere, but must be there.

    Under bfloat16 autocast its VGG16 works in bfloat16, at half the time: the value stays within 0.0002, the gradient
    of one batch keeps its direction roughly (cosine 0.78).

    Raises:
        MetricUnavailableError: see `MetricLoss`.
    """

    def __init__(self) -> None:
        super().__init__("dists", VGG_TAPS)
        for layers in self.slices[1:]:
            cast(nn.Sequential, layers)[0] = L2Pool()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None])

    def forward(self, pred_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
        """Distance of the two images, mean over the batch: a float32 scalar >= 0."""
        pair = [(image + 1) / 2 for image in float32_pair(pred_B3HW, target_B3HW)]
        total = self.own["alpha"].sum() + self.own["beta"].sum()
        terms = [_ssim_of_features(*pair)]
        x, y = ((image - self.mean) / self.std for image in pair)
        for layers in self.slices:
            x, y = layers(x), layers(y)
            terms.append(_ssim_of_features(x, y))
        texture_BC, structure_BC = (torch.cat(term, dim=1) for term in zip(*terms, strict=True))
        similarity = self.own["alpha"].flatten() * texture_BC + self.own["beta"].flatten() * structure_BC
        return 1 - (similarity.sum(dim=1) / total).mean()


class L2Pool(nn.Module):
    """Root of the squares under a Hann window, in place of VGG's pooling by the maximum (Ding et al. 2020, 3.1)."""

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Features of half the height and width, rounded up."""
        hann = x_BChw.new_tensor([0.25, 0.5, 0.25])
        kernel = (hann[:, None] * hann).expand(x_BChw.shape[1], 1, 3, 3)
        blurred = F.conv2d(x_BChw.square(), kernel, stride=2, padding=1, groups=x_BChw.shape[1])
        return (blurred + 1e-12).sqrt()


class MSSSIMLoss:
    """1 - MS-SSIM: compares structure at several scales and needs no weights; see `ms_ssim`."""

    def __call__(self, pred_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
        """Distance of the two images, mean over the batch: a float32 scalar, 0 for equal images."""
        pred, target = float32_pair(pred_B3HW, target_B3HW)
        return 1 - ms_ssim((pred + 1) / 2, (target + 1) / 2).mean()


def ms_ssim(pred_B3HW: Tensor, target_B3HW: Tensor, window: int = 11, max_scales: int = 5) -> Tensor:
    """Multi-scale structural similarity of RGB images in [0, 1] (Wang et al. 2003, equation 7).

    The paper's five scales want images of 176 pixels. Smaller ones use as many scales as leave the window
    inside the image (48 pixels: three), with weights scaled to sum to one. Values outside [0, 1] may occur.

    Args:
        pred_B3HW: images, float.
        target_B3HW: images of the same shape.
        window: side of the Gaussian window, sigma 1.5 (pixels, odd); shrinks for images smaller than it.
        max_scales: 1 to 5.
    Returns:
        Similarity of each image (B,), float32; 1 for equal images.
    """
    pred, target = float32_pair(pred_B3HW, target_B3HW)
    shortest = min(pred.shape[-2:])
    window = min(window, shortest - 1 + shortest % 2)
    weights = pred.new_tensor(MS_SSIM_WEIGHTS[: num_scales(shortest, window, max_scales)])
    weights = weights / weights.sum()
    similarity = pred.new_ones(pred.shape[:2])
    with torch.autocast(pred.device.type, enabled=False):
        for level, weight in enumerate(weights):
            luminance_BC, contrast_BC = _ssim_terms(pred, target, window)
            is_coarsest = level == len(weights) - 1
            term_BC = luminance_BC if is_coarsest else contrast_BC
            # A negative base has no real power; the small floor keeps the gradient finite.
            similarity = similarity * term_BC.clamp(min=1e-4) ** weight
            pred, target = F.avg_pool2d(pred, 2), F.avg_pool2d(target, 2)
    return similarity.mean(dim=1)


def num_scales(shortest_side: int, window: int = 11, max_scales: int = 5) -> int:
    """How many halvings, the full size included, keep the shortest side (pixels) at least one window long."""
    scales = 1
    while scales < min(max_scales, len(MS_SSIM_WEIGHTS)) and shortest_side // 2**scales >= window:
        scales += 1
    return scales


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors of a weight file; MetricUnavailableError if it is damaged."""
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except METRIC_ERRORS as error:
        raise MetricUnavailableError(f"{path} cannot be read ({reason(error)}): delete it and get it anew") from error
    return state


def _ssim_of_features(x_BChw: Tensor, y_BChw: Tensor) -> tuple[Tensor, Tensor]:
    """Texture (means) and structure (covariance) of DISTS, (B, C) each, in [-1, 1] (equations 5 and 6)."""
    x, y = x_BChw.float(), y_BChw.float()
    (var_x, mean_x), (var_y, mean_y) = (torch.var_mean(features, dim=(2, 3), correction=0) for features in (x, y))
    covariance = (x * y).mean(dim=(2, 3)) - mean_x * mean_y
    texture = (2 * mean_x * mean_y + 1e-6) / (mean_x.square() + mean_y.square() + 1e-6)
    return texture, (2 * covariance + 1e-6) / (var_x + var_y + 1e-6)


def _ssim_terms(pred_B3hw: Tensor, target_B3hw: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """SSIM and its contrast-structure part, (B, 3) each, over the windows that lie inside the image."""
    c1, c2 = 0.01**2, 0.03**2
    mean_p, mean_t = _blur(pred_B3hw, window), _blur(target_B3hw, window)
    product, squares = mean_p * mean_t, mean_p.square() + mean_t.square()
    covariance = _blur(pred_B3hw * target_B3hw, window) - product
    variances = _blur(pred_B3hw.square() + target_B3hw.square(), window) - squares
    contrast = (2 * covariance + c2) / (variances + c2)
    luminance = (2 * product + c1) / (squares + c1)
    return (luminance * contrast).mean(dim=(2, 3)), contrast.mean(dim=(2, 3))


def _blur(image_B3hw: Tensor, window: int) -> Tensor:
    """Separable Gaussian, no padding; products of matrices, as depthwise convolutions of long kernels are slow."""
    height, width = image_B3hw.shape[-2:]
    columns_wn = gaussian_band(width, window, image_B3hw.device).T
    return gaussian_band(height, window, image_B3hw.device) @ (image_B3hw @ columns_wn)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept must serve training too
def gaussian_band(side: int, window: int, device: torch.device, sigma: float = 1.5) -> Tensor:
    """The matrix that blurs a column of `side` pixels where the window fits: (side - window + 1, side)."""
    offsets = torch.arange(window, dtype=torch.float32) - window // 2
    kernel = torch.softmax(-offsets.square() / (2 * sigma**2), dim=0)
    rows = [F.pad(kernel, (first, side - window - first)) for first in range(side - window + 1)]
    return torch.stack(rows).to(device)
