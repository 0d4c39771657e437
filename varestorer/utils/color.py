"""Giving a restored image the colors of the degraded one.

Letters: `B` images, `H W` pixels. Images are RGB in [0, 1].
"""

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from varestorer.utils.errors import UserError
from varestorer.utils.watch import watch

COLOR_METHODS = ("none", "adain", "wavelet")
WAVELET_LEVELS = 5


@watch("color")
def match_color(image_B3HW: Tensor, reference_B3HW: Tensor, method: str) -> Tensor:
    """Move the colors of images (B, 3, H, W) in [0, 1] to those of references of the same size.

    The method "none" changes nothing; "adain" gives each channel the mean and standard deviation of the reference;
    "wavelet" replaces the low frequencies by those of the reference. UserError: unknown method. ValueError: shapes
    differ.
    """
    if method not in COLOR_METHODS:
        raise UserError(f"color must be one of {', '.join(COLOR_METHODS)}, got {method!r}")
    if image_B3HW.shape != reference_B3HW.shape:
        got = f"{tuple(image_B3HW.shape)} and {tuple(reference_B3HW.shape)}"
        raise ValueError(f"image and reference must have the same shape (B, 3, H, W), got {got}")
    if method == "adain":
        mean_B311, wanted_B311 = (x.mean(dim=(-2, -1), keepdim=True) for x in (image_B3HW, reference_B3HW))
        # 1e-5 on both variances keeps the noise of flat images small
        variances = [x.var(dim=(-2, -1), correction=0, keepdim=True) + 1e-5 for x in (image_B3HW, reference_B3HW)]
        return ((image_B3HW - mean_B311) * (variances[1] / variances[0]).sqrt() + wanted_B311).clamp(0, 1)
    if method == "wavelet":
        return (image_B3HW - _low_frequencies(image_B3HW) + _low_frequencies(reference_B3HW)).clamp(0, 1)
    return image_B3HW


def match_color_8bit(image_HW3: np.ndarray, reference_HW3: np.ndarray, method: str) -> np.ndarray:
    """`match_color` of uint8 pictures (H, W, 3) as VARSR's release does it: the result is truncated, not rounded."""
    image_13HW, reference_13HW = (
        rearrange(torch.from_numpy(x), "h w c -> 1 c h w").float() / 255 for x in (image_HW3, reference_HW3)
    )
    matched_13HW = match_color(image_13HW, reference_13HW, method)
    return rearrange((matched_13HW * 255).to(torch.uint8), "1 c h w -> h w c").numpy()


def _low_frequencies(image_B3HW: Tensor) -> Tensor:
    """What a wavelet decomposition with holes leaves: binomial 3x3 blurs with steps of 1, 2, 4, 8 and 16 pixels."""
    row = torch.tensor([0.25, 0.5, 0.25], dtype=image_B3HW.dtype, device=image_B3HW.device)
    kernel = torch.outer(row, row).expand(image_B3HW.shape[1], 1, 3, 3)
    low = image_B3HW
    for step in (2**level for level in range(WAVELET_LEVELS)):
        padded = F.pad(low, (step,) * 4, mode="replicate")
        low = F.conv2d(padded, kernel, dilation=step, groups=kernel.shape[0])
    return low
