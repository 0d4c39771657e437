"""Blur kernels of the Real-ESRGAN degradation (Wang et al. 2021, sections 3.1 and 3.3).

Pure functions of their parameters: each returns a (size, size) float32 kernel whose sum is one and which is
its own mirror image through the center. Lengths are pixels, angles radians.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

MIN_WIDTH = 1e-3


def gaussian_kernel(
    size: int, sigma_x: float, sigma_y: float | None = None, theta: float = 0.0, beta: float = 1.0
) -> Tensor:
    """Generalized Gaussian exp(-(x' S^-1 x)^beta / 2); `beta` 1 is the Gaussian, above 1 it is flatter.

    Args:
        size: odd side of the kernel.
        sigma_x: standard deviation along the first axis.
        sigma_y: along the second axis; None: as `sigma_x` (isotropic).
        theta: rotation of the axes.
        beta: shape.
    """
    return _normalize(torch.exp(-0.5 * _squared_distance(size, sigma_x, sigma_y, theta) ** beta))


def plateau_kernel(
    size: int, sigma_x: float, sigma_y: float | None = None, theta: float = 0.0, beta: float = 1.0
) -> Tensor:
    """Plateau-shaped 1 / (1 + (x' S^-1 x)^beta); arguments as in `gaussian_kernel`."""
    return _normalize(1 / (1 + _squared_distance(size, sigma_x, sigma_y, theta) ** beta))


def sinc_kernel(size: int, cutoff: float) -> Tensor:
    """Ideal circular low-pass, w J1(w r) / (2 pi r), for ringing and overshoot (eq. 6).

    Args:
        size: odd side of the kernel.
        cutoff: w, radians a pixel, in (0, pi].
    """
    row, column = _offsets(size)
    radius = torch.hypot(row, column)
    # the value at the center is the limit for r -> 0
    away = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius.clamp_min(1e-9))
    return _normalize(torch.where(radius == 0, cutoff**2 / (4 * math.pi), away))


@lru_cache(maxsize=64)
def _offsets(size: int) -> tuple[Tensor, Tensor]:
    """(size, 1) rows and (1, size) columns relative to the center, float64."""
    if size < 1 or size % 2 == 0:
        raise ValueError(f"the side of a kernel must be odd and positive, got {size}")
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    return axis[:, None], axis[None, :]


def _squared_distance(size: int, sigma_x: float, sigma_y: float | None, theta: float) -> Tensor:
    """x' S^-1 x with S = R diag(sigma_x^2, sigma_y^2) R', for every pixel x of the kernel."""
    row, column = _offsets(size)
    along = math.cos(theta) * column + math.sin(theta) * row
    across = math.cos(theta) * row - math.sin(theta) * column
    width = max(sigma_x, MIN_WIDTH)
    height = width if sigma_y is None else max(sigma_y, MIN_WIDTH)
    return (along / width) ** 2 + (across / height) ** 2


def _normalize(kernel: Tensor) -> Tensor:
    """Sum one, float32."""
    return (kernel / kernel.sum()).float()
