"""The same random square of codes and image, so that only part of an image has to be decoded.

Shapes: `B` batch, `Z` bits per token, `h w` latent positions, `H W` pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def random_crops(codes_BZhw: Tensor, image_B3HW: Tensor, side: int, place_B2: Tensor) -> tuple[Tensor, Tensor]:
    """Cut a square out of each sample's codes, and what it shows out of its image.

    Args:
        codes_BZhw: summed codes.
        image_B3HW: the image they stand for.
        side: of the squares, pixels; a multiple of H / h.
        place_B2: where, row and column: 0 for the first position that fits, towards 1 for the last.
    Returns:
        codes (B, Z, side * h / H, side * w / W) and image (B, 3, side, side).
    """
    stride = image_B3HW.shape[-1] // codes_BZhw.shape[-1]
    length = side // stride
    last = torch.tensor(codes_BZhw.shape[-2:]) - length
    starts = torch.minimum((place_B2.cpu() * (last + 1)).long(), last).tolist()
    codes = [c[:, y : y + length, x : x + length] for c, (y, x) in zip(codes_BZhw, starts, strict=True)]
    images = [
        image[:, y * stride : y * stride + side, x * stride : x * stride + side]
        for image, (y, x) in zip(image_B3HW, starts, strict=True)
    ]
    return torch.stack(codes), torch.stack(images)
