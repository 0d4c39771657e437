"""Perceptual losses behind one interface: callables `(pred_B3HW, target_B3HW) -> scalar`, images in [-1, 1].

`LPIPSLoss` is what the paper trains with; it and `DISTSLoss` need published weights. `MSSSIMLoss` is a formula and
needs none. All of them are differentiable in the prediction and average over the batch.

Shapes: B batch, C channels, H W image, h w one level.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varestorer.losses.pixel import float32_pair
from varestorer.utils.iqa import create_metric

PerceptualLoss = Callable[[Tensor, Tensor], Tensor]

LPIPS_METRICS = {"alex": "lpips", "vgg": "lpips-vgg"}
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weight of each scale, fine to coarse (Wang et al. 2003, Multi-scale structural similarity, section 3.2)."""


class MetricLoss(nn.Module):
    """A metric's network as a loss, through pyiqa: frozen, and always in evaluation mode (LPIPS carries dropout).

    Args:
        metric: pyiqa's name.
    Raises:
        MetricUnavailableError: a weight file is missing (one line: which, and where it belongs).
    """

    def __init__(self, metric: str) -> None:
        super().__init__()
        self.network = create_metric(metric).network.requires_grad_(False).to(memory_format=torch.channels_last)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)


class LPIPSLoss(MetricLoss):
    """Learned perceptual distance (Zhang et al. 2018): `L_perc` of the paper.

    Args:
        net: backbone, `alex` (the one that evaluation uses) or `vgg`.
    Raises:
        MetricUnavailableError: see `MetricLoss`.
        ValueError: unknown `net`.
    """

    def __init__(self, net: str = "alex") -> None:
        if net not in LPIPS_METRICS:
            raise ValueError(f"net must be one of {', '.join(LPIPS_METRICS)}, got {net!r}")
        super().__init__(LPIPS_METRICS[net])

    def forward(self, pred_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
        """Distance of the two images, mean over the batch: a float32 scalar >= 0."""
        pred, target = float32_pair(pred_B3HW, target_B3HW)
        with torch.autocast(pred.device.type, enabled=False):
            return self.network(pred, target, normalize=False).mean()


class DISTSLoss(MetricLoss):
    """Distance of structure and texture (Ding et al. 2020, equation 7): texture may lie elsewhere, but must be there.

    Under bfloat16 autocast its VGG16 works in bfloat16, at half the time: the value stays within 0.0002, the gradient
    of one batch keeps its direction roughly (cosine 0.78).

    Raises:
        MetricUnavailableError: see `MetricLoss`.
    """

    def __init__(self) -> None:
        super().__init__("dists")

    def forward(self, pred_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
        """Distance of the two images, mean over the batch: a float32 scalar >= 0."""
        pred, target = float32_pair(pred_B3HW, target_B3HW)
        return self.network((pred + 1) / 2, (target + 1) / 2).float().mean()


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
