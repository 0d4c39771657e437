"""The same degradation for a whole batch, on any device: what `pipeline.carry_out` does, for many pictures at once.

In the middle of the degradation the pictures of a batch differ in size. They then lie in the top left corners of a
common frame; what is outside a picture is finite, and never looked at.

Kernels, sizes, methods and qualities are those of the plans, as on the CPU. Blur and resize give the same values but
for the rounding of float32. Noise has the same distribution, from torch's generator of the device and the seed of the
plan. JPEG is `jpeg.compress`: at qualities of 60 to 100 it differs from the real one by 0.07 to 0.15 of 255 levels on
average, where JPEG itself changes a photograph by 1.4 to 4.

A sample does not depend on its batch, except through the rounding of float32: where that falls on the other side of a
quantisation step, a few levels of a block differ.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scipy.fft import next_fast_len
from torch import Tensor
from torch.nn.functional import pad

from varestorer.data.degradation import jpeg
from varestorer.data.degradation.operations import LUMA, round_to_8bit
from varestorer.data.degradation.plan import Noise, Plan, Resize
from varestorer.utils.images import to_uint8

Sizes = list[tuple[int, int]]
CHUNK_PIXELS = 8 * 512 * 512  # at once: half a gigabyte of working memory
CUBIC = -0.75  # the constant of torch's bicubic interpolation


def degrade(hq_B3HW: Tensor, plans: Sequence[Plan]) -> Tensor:
    """Degrade pictures as planned.

    Args:
        hq_B3HW: RGB in [0, 1], float32, on any device.
        plans: one a picture, for pictures of this size.
    Returns:
        (B, 3, H, W) float32 in [0, 1], 8-bit levels, on the same device.
    """
    with torch.no_grad(), _full_precision(hq_B3HW.device):
        chunk = max(1, CHUNK_PIXELS // hq_B3HW[0, 0].numel())
        starts = range(0, len(plans), chunk)
        return torch.cat([_degrade(hq_B3HW[at : at + chunk], list(plans[at : at + chunk])) for at in starts])


def _degrade(hq_B3HW: Tensor, plans: list[Plan]) -> Tensor:
    sizes: Sizes = [(hq_B3HW.shape[-2], hq_B3HW.shape[-1])] * len(plans)
    x = blur(hq_B3HW.float(), sizes, [plan.blur1 for plan in plans])
    x, sizes = resample(x, sizes, [plan.resize1 for plan in plans])
    x = add_noise(x, sizes, [plan.noise1 for plan in plans])
    x = compress(x, sizes, [plan.jpeg1 for plan in plans])
    x = blur(x, sizes, [plan.blur2 for plan in plans])
    x, sizes = resample(x, sizes, [plan.resize2 for plan in plans])
    x = add_noise(x, sizes, [plan.noise2 for plan in plans])
    x = compress(x, sizes, [None if plan.is_jpeg_last else plan.jpeg2 for plan in plans])
    x, sizes = resample(x, sizes, [plan.shrink for plan in plans])
    x = blur(x, sizes, [plan.sinc for plan in plans])
    x = compress(x, sizes, [plan.jpeg2 if plan.is_jpeg_last else None for plan in plans])
    x, _ = resample(x, sizes, [plan.enlarge for plan in plans])
    return round_to_8bit(x)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Products in float32, whatever the training around allows."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _where_given(x_B3HW: Tensor, sizes: Sizes, values: Sequence[Any], step: Callable[..., Tensor]) -> Tensor:
    """Apply `step(pictures, sizes, values)` to the pictures whose value is not None; the others stay."""
    rows = [row for row, value in enumerate(values) if value is not None]
    if not rows:
        return x_B3HW
    index = torch.tensor(rows, device=x_B3HW.device)
    done = step(x_B3HW[index], [sizes[row] for row in rows], [values[row] for row in rows])
    return x_B3HW.index_copy(0, index, done)


def blur(x_B3HW: Tensor, sizes: Sizes, kernels: Sequence[np.ndarray | None]) -> Tensor:
    """Correlate each picture with its kernel (None: none), continued by reflection (`operations.blur`).

    Args:
        x_B3HW: pictures in their frame.
        sizes: (height, width) of each.
        kernels: (size, size) float32, odd sizes.
    """
    return _where_given(x_B3HW, sizes, kernels, _blur)


def _blur(x_B3HW: Tensor, sizes: Sizes, kernels: Sequence[np.ndarray]) -> Tensor:
    reach = max(len(kernel) for kernel in kernels) // 2
    margins = [reach - len(kernel) // 2 for kernel in kernels]
    kernel_BKK = torch.stack([pad(torch.from_numpy(k), [m] * 4) for k, m in zip(kernels, margins, strict=True)])
    height, width = x_B3HW.shape[-2:]
    heights, widths = _sides(sizes, x_B3HW.device)
    padded = jpeg.take(x_B3HW, _mirrored(heights, height, reach), _mirrored(widths, width, reach))
    shape = [next_fast_len(length, real=True) for length in padded.shape[-2:]]
    spectrum = torch.fft.rfft2(padded, s=shape) * torch.fft.rfft2(kernel_BKK.to(x_B3HW.device), s=shape).conj()[:, None]
    return torch.fft.irfft2(spectrum, s=shape)[..., :height, :width]


def _sides(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    heights, widths = torch.tensor(sizes, device=device).unbind(1)
    return heights, widths


def _mirrored(lengths_B: Tensor, frame: int, reach: int) -> Tensor:
    """Source (B, frame + 2 reach) of each place of pictures continued by reflection."""
    period = (2 * (lengths_B[:, None] - 1)).clamp_min(1)
    folded = torch.arange(-reach, frame + reach, device=lengths_B.device) % period
    return torch.minimum(folded, period - folded).clamp_max(lengths_B[:, None] - 1)


def resample(x_B3HW: Tensor, sizes: Sizes, resizes: Sequence[Resize]) -> tuple[Tensor, Sizes]:
    """Resize each picture (`operations.resample`).

    Args:
        x_B3HW: pictures in their frame.
        sizes: (height, width) of each.
        resizes: what to do with each.
    Returns:
        the pictures in a frame that just holds the largest, and their new sizes.
    """
    new = [resize.size for resize in resizes]
    if new == sizes:
        return x_B3HW, sizes
    modes = [resize.mode for resize in resizes]
    across, down = (
        _weights([s[axis] for s in sizes], [s[axis] for s in new], modes, x_B3HW.shape[axis - 2], x_B3HW.device)
        for axis in (1, 0)
    )
    return down[:, None] @ (x_B3HW @ across[:, None].transpose(-1, -2)), new


def _weights(before: list[int], after: list[int], modes: list[str], frame: int, device: torch.device) -> Tensor:
    """Weight (B, new place, old place) of one axis: rows beyond the new length repeat the last one."""
    old, new = (torch.tensor(lengths, device=device)[:, None] for lengths in (before, after))
    place = torch.minimum(torch.arange(max(after), device=device), new - 1)
    kinds = {"area": _area_weights, "bilinear": _linear_weights, "bicubic": _cubic_weights}
    weights = torch.zeros(len(before), max(after), frame, device=device)
    for mode in sorted(set(modes)):
        rows = torch.tensor([row for row, other in enumerate(modes) if other == mode], device=device)
        weights[rows] = kinds[mode](place[rows], old[rows], new[rows], frame)
    return weights


def _area_weights(place_BO: Tensor, old_B1: Tensor, new_B1: Tensor, frame: int) -> Tensor:
    """Means over all old pixels that a new one touches."""
    first, end = place_BO * old_B1 // new_B1, -(-(place_BO + 1) * old_B1 // new_B1)
    source = torch.arange(frame, device=place_BO.device)
    is_inside = (source >= first[..., None]) & (source < end[..., None])
    return is_inside / (end - first)[..., None]


def _linear_weights(place_BO: Tensor, old_B1: Tensor, new_B1: Tensor, frame: int) -> Tensor:
    source = _source(place_BO, old_B1, new_B1).clamp_min(0)
    low = source.floor()
    part = source - low
    return _spread([(low, 1 - part), (low + 1, part)], old_B1, frame)


def _cubic_weights(place_BO: Tensor, old_B1: Tensor, new_B1: Tensor, frame: int) -> Tensor:
    source = _source(place_BO, old_B1, new_B1)
    low = source.floor()
    part = source - low
    near, far = _cubic_near(part), _cubic_far(part + 1)
    nearer, farther = _cubic_near(1 - part), _cubic_far(2 - part)
    return _spread([(low - 1, far), (low, near), (low + 1, nearer), (low + 2, farther)], old_B1, frame)


def _cubic_near(distance: Tensor) -> Tensor:
    return ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1


def _cubic_far(distance: Tensor) -> Tensor:
    return CUBIC * (((distance - 5) * distance + 8) * distance - 4)


def _source(place_BO: Tensor, old_B1: Tensor, new_B1: Tensor) -> Tensor:
    """Old coordinate of the middle of each new pixel."""
    return (place_BO + 0.5) * (old_B1 / new_B1) - 0.5


def _spread(taps: list[tuple[Tensor, Tensor]], old_B1: Tensor, frame: int) -> Tensor:
    """Rows of weights (B, O, frame) from (place, weight) pairs; places outside the picture count for its edge."""
    weights = torch.zeros(*taps[0][0].shape, frame, device=old_B1.device)
    for place_BO, weight_BO in taps:
        index = torch.minimum(place_BO.long().clamp_min(0), old_B1 - 1)
        weights.scatter_add_(2, index[..., None], weight_BO[..., None])
    return weights


def add_noise(x_B3HW: Tensor, sizes: Sizes, noises: Sequence[Noise]) -> Tensor:
    """Add to each picture its noise, drawn on the device at the picture's own size, clamped to [0, 1]."""
    noisy = x_B3HW.clone()
    for image, (height, width), noise in zip(noisy, sizes, noises, strict=True):
        picture = image[:, :height, :width]
        generator = torch.Generator(x_B3HW.device).manual_seed(noise.seed)
        add = _gaussian if noise.is_gaussian else _poisson
        picture.copy_((picture + add(picture, noise, generator)).clamp(0, 1))
    return noisy


def _gaussian(img_3HW: Tensor, noise: Noise, generator: torch.Generator) -> Tensor:
    shape = (1 if noise.use_grey else 3, *img_3HW.shape[1:])
    return torch.randn(shape, generator=generator, device=img_3HW.device) * (noise.strength / 255)


def _poisson(img_3HW: Tensor, noise: Noise, generator: torch.Generator) -> Tensor:
    """As `operations.add_poisson_noise`, without a copy to the CPU."""
    luma = LUMA.to(img_3HW.device)[:, None, None]
    levels = to_uint8((img_3HW * luma).sum(0, keepdim=True) if noise.use_grey else img_3HW)
    is_there = torch.zeros(256, dtype=torch.bool, device=levels.device)
    is_there[levels.flatten().long()] = True
    photons = torch.exp2(is_there.sum().double().log2().ceil()).float()
    clean = levels.float() / 255
    return (torch.poisson(clean * photons, generator=generator) / photons - clean) * noise.strength


def compress(x_B3HW: Tensor, sizes: Sizes, qualities: Sequence[int | None]) -> Tensor:
    """Write and read each picture as JPEG (None: leave it), see `jpeg.compress`."""
    return _where_given(x_B3HW, sizes, qualities, jpeg.compress)
