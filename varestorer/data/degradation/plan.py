"""What a sample's degradation will do, drawn before any pixel is touched.

A plan holds every draw but the noise itself, of which it holds the seed. So one sample gets the same kernels, sizes,
methods, strengths and qualities wherever its pixels are computed (`pipeline.carry_out`, `batched.degrade`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Resize(NamedTuple):
    """A resize.

    Attributes:
        size: new (height, width), pixels.
        mode: `area`, `bilinear` or `bicubic`.
    """

    size: tuple[int, int]
    mode: str


class Noise(NamedTuple):
    """Noise.

    Attributes:
        is_gaussian: Gaussian noise; Poisson noise otherwise.
        strength: standard deviation in levels of 255, or the factor on Poisson noise.
        use_grey: the same noise in all channels.
        seed: of the generator that draws it.
    """

    is_gaussian: bool
    strength: float
    use_grey: bool
    seed: int


@dataclass(frozen=True)
class Plan:
    """The steps of `Degradation` for one picture, in their order.

    Kernels are (size, size) float32 arrays, None for no blur. Arrays and not tensors: a worker hands over every
    tensor through a file of its own.

    Attributes:
        blur1, resize1, noise1, jpeg1: first order; the last is a quality.
        blur2, resize2, noise2: second order.
        is_jpeg_last: whether `jpeg2` comes after `shrink` and `sinc` instead of before them.
        shrink, sinc, jpeg2: resize to the small size, final filter, quality.
        enlarge: resize back.
    """

    blur1: np.ndarray | None
    resize1: Resize
    noise1: Noise
    jpeg1: int
    blur2: np.ndarray | None
    resize2: Resize
    noise2: Noise
    is_jpeg_last: bool
    shrink: Resize
    sinc: np.ndarray | None
    jpeg2: int
    enlarge: Resize
