"""The steps a photograph is spoilt by: blur, resize, noise, JPEG, rounding.

Functions of one picture (C, H, W), RGB in [0, 1], float32 or float64 (so is the result), on the CPU. Results of
blur and bicubic resizing may leave [0, 1] a little, as in Real-ESRGAN; noise and JPEG clamp. Randomness comes
from the given NumPy generator.

Kernels are those of Real-ESRGAN (Wang et al. 2021, sections 3.1 and 3.3): each function returns a (size, size) float32
kernel whose sum is one and which is its own mirror image through the center. Lengths are pixels, angles radians.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from scipy import fft
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import decode_jpeg, encode_jpeg

from varestorer.utils.images import pad_reflect, to_uint8

LUMA = torch.tensor([0.2989, 0.5870, 0.1140])
MIN_WIDTH = 1e-3


def blur(img_CHW: Tensor, kernel: Tensor) -> Tensor:
    """Correlate every channel with a kernel (odd size); the picture, which may be smaller, is continued by reflection.

    The work is done by FFT: a 21 x 21 kernel costs no more than a 7 x 7 one. SciPy's is as fast as torch's and stays on
    one thread: threads for pictures this small cost far more than they save.
    """
    height, width = img_CHW.shape[-2:]
    reach = kernel.shape[-1] // 2
    padded = pad_reflect(img_CHW, *[reach] * 4)
    shape = [fft.next_fast_len(length, real=True) for length in padded.shape[-2:]]
    spectrum = fft.rfft2(padded.numpy(), s=shape) * fft.rfft2(kernel.numpy(), s=shape).conj()
    # the circular wrap of the FFT only reaches what is cut off here
    blurred = fft.irfft2(spectrum, s=shape)[..., :height, :width]
    return torch.from_numpy(np.ascontiguousarray(blurred))


def sharpen(img_CHW: Tensor, amount: float, sigma: float) -> Tensor:
    """Unsharp mask: add `amount` times what a Gaussian blur of `sigma` pixels takes away; halos are kept."""
    kernel = gaussian_kernel(2 * math.ceil(3 * sigma) + 1, sigma)
    return (img_CHW + amount * (img_CHW - blur(img_CHW, kernel))).clamp(0, 1)


def resample(img_CHW: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize as Real-ESRGAN does: `area` averages, `bilinear` and `bicubic` alias (no antialiasing)."""
    if tuple(img_CHW.shape[-2:]) == size:
        return img_CHW
    options = {} if mode == "area" else {"align_corners": False}
    return interpolate(img_CHW[None], size, mode=mode, **options)[0]


def add_gaussian_noise(img_CHW: Tensor, sigma: float, use_gray: bool, rng: np.random.Generator) -> Tensor:
    """Add white noise of standard deviation `sigma` (levels of 255), clamped; `use_gray`: the same in all channels."""
    shape = (1, *img_CHW.shape[1:]) if use_gray else tuple(img_CHW.shape)
    noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    return (img_CHW + noise * (sigma / 255)).clamp(0, 1)


def add_poisson_noise(img_CHW: Tensor, scale: float, use_gray: bool, rng: np.random.Generator) -> Tensor:
    """Add shot noise, `scale` times what counting `2^ceil(log2(levels))` photons at white gives, clamped.

    `levels` is the number of different 8-bit levels in the picture, so that flat pictures get more noise (Real-ESRGAN's
    reference implementation). `use_gray`: noise of the luma picture, the same in all channels.
    """
    source = (img_CHW * LUMA[:, None, None]).sum(0, keepdim=True) if use_gray else img_CHW
    levels = to_uint8(source).numpy()
    num_levels = np.count_nonzero(np.bincount(levels.ravel(), minlength=256))
    photons = float(2 ** np.ceil(np.log2(num_levels)))
    clean = levels.astype(np.float32) / 255
    noise = (rng.poisson(clean * photons) / photons - clean).astype(np.float32)
    return (img_CHW + torch.from_numpy(noise) * scale).clamp(0, 1)


def compress_jpeg(img_CHW: Tensor, quality: int) -> Tensor:
    """Write and read an RGB JPEG file in memory (4:2:0 chroma), clamped; quality is libjpeg's, 1 to 100."""
    return decode_jpeg(encode_jpeg(to_uint8(img_CHW), quality)).to(img_CHW.dtype) / 255


def round_to_8bit(img: Tensor) -> Tensor:
    """Clamp to [0, 1] and round to the nearest of 256 levels, as a file on disk would."""
    return to_uint8(img).float() / 255


def gaussian_kernel(
    size: int, sigma_x: float, sigma_y: float | None = None, theta: float = 0.0, beta: float = 1.0
) -> Tensor:
    """Generalized Gaussian exp(-(x' S^-1 x)^beta / 2) of an odd side; `beta` 1 is the Gaussian, above 1 it is flatter.

    Sigmas are standard deviations along the axes, which `theta` turns; without the second it is isotropic.
    """
    return _normalize(torch.exp(-0.5 * _squared_distance(size, sigma_x, sigma_y, theta) ** beta))


def plateau_kernel(
    size: int, sigma_x: float, sigma_y: float | None = None, theta: float = 0.0, beta: float = 1.0
) -> Tensor:
    """Plateau-shaped 1 / (1 + (x' S^-1 x)^beta); arguments as in `gaussian_kernel`."""
    return _normalize(1 / (1 + _squared_distance(size, sigma_x, sigma_y, theta) ** beta))


def sinc_kernel(size: int, cutoff: float) -> Tensor:
    """Ideal circular low-pass w J1(w r) / (2 pi r) of an odd side, for ringing and overshoot (eq. 6).

    The cutoff w is in radians a pixel, in (0, pi].
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
