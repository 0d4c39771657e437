"""Windows of pictures: where training looks."""

import numpy as np
from torch import Tensor

from varestorer.utils.images import pad_reflect, resize

Box = tuple[int, int, int, int]  # top, left, height, width


def draw_box(size: tuple[int, int], window: int, rng: np.random.Generator) -> Box:
    """Place a square window of `window` pixels; a side shorter than that is taken whole."""
    height, width = (min(side, window) for side in size)
    top, left = int(rng.integers(size[0] - height + 1)), int(rng.integers(size[1] - width + 1))
    return top, left, height, width


def cut(img_CHW: Tensor, box: Box) -> Tensor:
    """The part of a picture inside a box."""
    top, left, height, width = box
    return img_CHW[:, top : top + height, left : left + width]


def fill_square(img_CHW: Tensor, side: int) -> Tensor:
    """Continue a picture smaller than (side, side) by reflection, evenly on both sides."""
    height, width = img_CHW.shape[-2:]
    top, left = (side - height) // 2, (side - width) // 2
    return pad_reflect(img_CHW, top, side - height - top, left, side - width - left)


def center_box(size: tuple[int, int], window: tuple[int, int]) -> Box:
    """The box of at most `window` (height, width) in the middle of a picture."""
    height, width = min(size[0], window[0]), min(size[1], window[1])
    return (size[0] - height) // 2, (size[1] - width) // 2, height, width


def draw_zoom(size: tuple[int, int], crop: int, limits: tuple[float, float], rng: np.random.Generator) -> float:
    """Draw how many photograph pixels one crop pixel covers, no more than the photograph has to give."""
    return min(float(rng.uniform(*limits)), max(1.0, min(size) / crop))


def random_square(
    photo_CHW: Tensor, crop: int, rng: np.random.Generator, downscale: tuple[float, float] | None = None
) -> Tensor:
    """Cut a random square out of an 8-bit photograph.

    Args:
        photo_CHW: uint8 picture of any size; a small one is continued by reflection.
        crop: side of the square, pixels.
        rng: source of place and zoom.
        downscale: range of the zoom: 2 shows twice as much of the photograph at half its resolution
            (Lanczos).
    Returns:
        (C, crop, crop) float32 in [0, 1].
    """
    size = photo_CHW.shape[-2], photo_CHW.shape[-1]
    window = crop if downscale is None else round(crop * draw_zoom(size, crop, downscale, rng))
    square = fill_square(cut(photo_CHW, draw_box(size, window, rng)).float() / 255, window)
    return resize(square, (crop, crop), mode="lanczos")
