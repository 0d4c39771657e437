"""The second-order degradation of Real-ESRGAN (Wang et al. 2021, section 3), as VARestorer's data uses it.

Each random step is a small frozen dataclass of plain numbers; calling it draws its parameters from a generator and
applies them. The defaults are the published preset (`configs/degradation/realesrgan.yaml`). Noise comes from a
generator of its own, whose seed is drawn, so that no parameter depends on the picture.

Deviations from the reference code: pictures are resized to whole sizes, so that the content keeps its place
(the code resizes by a factor and lets up to a pixel drift at the far edge), and JPEG is the real one, with
whole-numbered quality, not a differentiable imitation.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

import numpy as np
from torch import Tensor

from varestorer.data.degradation.operations import (
    add_gaussian_noise,
    add_poisson_noise,
    blur,
    compress_jpeg,
    gaussian_kernel,
    plateau_kernel,
    resample,
    round_to_8bit,
    sharpen,
    sinc_kernel,
)
from varestorer.utils.errors import UserError
from varestorer.utils.images import resize

Range = tuple[float, float]
# from HQ (3, H, W) to LQ of the same size, both in [0, 1]
Degrade = Callable[[Tensor, np.random.Generator], Tensor]
RESAMPLING = ("area", "bilinear", "bicubic")


class _Step:
    """Checks the settings of a step: lists become tuples, ranges are (low, high), probabilities in [0, 1]."""

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            where = f"{type(self).__name__}.{item.name}"
            if isinstance(item.default, tuple):
                object.__setattr__(self, item.name, tuple(value))
                self._check_tuple(where, tuple(value), item.default)
            elif item.name.endswith("prob") and not 0 <= value <= 1:
                raise UserError(f"{where} must be a probability in [0, 1], got {value}")

    @staticmethod
    def _check_tuple(where: str, value: tuple, default: tuple) -> None:
        wanted = None
        if where.endswith("modes"):
            if not value or not set(value) <= set(RESAMPLING):
                wanted = f"some of {list(RESAMPLING)}"
        elif where.endswith("probs"):
            if len(value) != len(default) or min(value) < 0 or abs(sum(value) - 1) > 1e-6:
                wanted = f"{len(default)} probabilities that sum to 1"
        elif len(value) != 2 or value[0] > value[1]:
            wanted = "a range [low, high]"
        elif where.endswith("size") and value[0] % 2 == 0:
            wanted = "a range that starts with an odd number of pixels"
        if wanted:
            raise UserError(f"{where} must be {wanted}, got {list(value)}")


def _uniform(rng: np.random.Generator, limits: Range) -> float:
    return float(rng.uniform(*limits))


def _integer(rng: np.random.Generator, limits: tuple[int, int], step: int = 1) -> int:
    """low, low + step, ..., high, all equally likely."""
    return int(limits[0] + step * rng.integers((limits[1] - limits[0]) // step + 1))


@dataclass(frozen=True)
class RandomBlur(_Step):
    """Blur by a kernel of random kind, size and shape.

    Attributes:
        prob: probability of any blur.
        sinc_prob: probability of a sinc kernel; otherwise one of the six kinds below.
        kind_probs: Gaussian isotropic, anisotropic; generalized Gaussian iso-, anisotropic; plateau iso-,
            anisotropic.
        sigma: standard deviations, pixels.
        gaussian_beta: shape of the generalized Gaussian; below and above 1 are equally likely.
        plateau_beta: shape of the plateau, likewise.
        size: side of the kernel, odd numbers of this range.
    """

    prob: float = 1.0
    sinc_prob: float = 0.1
    kind_probs: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    sigma: Range = (0.2, 3.0)
    gaussian_beta: Range = (0.5, 4.0)
    plateau_beta: Range = (1.0, 2.0)
    size: tuple[int, int] = (7, 21)

    def __call__(self, img_CHW: Tensor, rng: np.random.Generator) -> Tensor:
        return blur(img_CHW, self.draw_kernel(rng)) if rng.random() < self.prob else img_CHW

    def draw_kernel(self, rng: np.random.Generator) -> Tensor:
        """(size, size) kernel of a random kind."""
        size = _integer(rng, self.size, step=2)
        if rng.random() < self.sinc_prob:
            # small kernels cannot hold the slow ripples of a low cut-off
            return sinc_kernel(size, _uniform(rng, (math.pi / 3 if size < 13 else math.pi / 5, math.pi)))
        family, is_anisotropic = divmod(int(rng.choice(6, p=self.kind_probs)), 2)
        shape: dict[str, float] = {"sigma_x": _uniform(rng, self.sigma)}
        if is_anisotropic:
            shape |= {"sigma_y": _uniform(rng, self.sigma), "theta": _uniform(rng, (-math.pi, math.pi))}
        if family == 2:
            return plateau_kernel(size, **shape, beta=self._draw_beta(rng, self.plateau_beta))
        beta = self._draw_beta(rng, self.gaussian_beta) if family == 1 else 1.0
        return gaussian_kernel(size, **shape, beta=beta)

    @staticmethod
    def _draw_beta(rng: np.random.Generator, limits: Range) -> float:
        """Below and above 1 with equal probability, uniform in either part."""
        low, high = limits
        return _uniform(rng, (low, max(low, 1.0)) if rng.random() < 0.5 else (min(high, 1.0), high))


@dataclass(frozen=True)
class RandomResize(_Step):
    """Resize up, down or not at all (the probabilities), by a random factor and method.

    The factor's range is from the smallest (down) to the largest (up); 1 lies between.
    """

    direction_probs: tuple[float, ...] = (0.2, 0.7, 0.1)
    factor: Range = (0.3, 1.5)

    def __call__(self, img_CHW: Tensor, rng: np.random.Generator, base: tuple[int, int] | None = None) -> Tensor:
        """Resize to a random multiple of `base` (height, width); None: of the picture's own size."""
        height, width = base or (img_CHW.shape[-2], img_CHW.shape[-1])
        low, high = self.factor
        limits = ((1.0, high), (low, 1.0), (1.0, 1.0))[int(rng.choice(3, p=self.direction_probs))]
        factor = _uniform(rng, limits)
        return resample(img_CHW, (_scaled(height, factor), _scaled(width, factor)), _draw_mode(rng))


@dataclass(frozen=True)
class RandomNoise(_Step):
    """Gaussian noise or else Poisson noise.

    Attributes:
        gaussian_prob: probability of Gaussian noise (Poisson otherwise).
        sigma: standard deviation of Gaussian noise, levels of 255.
        poisson_scale: factor on Poisson noise.
        gray_prob: probability of the same noise in all channels.
    """

    gaussian_prob: float = 0.5
    sigma: Range = (1.0, 15.0)
    poisson_scale: Range = (0.05, 2.0)
    gray_prob: float = 0.4

    def __call__(self, img_CHW: Tensor, rng: np.random.Generator) -> Tensor:
        is_gaussian, use_gray = bool(rng.random() < self.gaussian_prob), bool(rng.random() < self.gray_prob)
        strength = _uniform(rng, self.sigma if is_gaussian else self.poisson_scale)
        source = np.random.Generator(np.random.PCG64(int(rng.integers(2**63))))
        add = add_gaussian_noise if is_gaussian else add_poisson_noise
        return add(img_CHW, strength, use_gray, source)


@dataclass(frozen=True)
class Degradation(_Step):
    """Real-ESRGAN's order of steps, without its sharpening of the target.

    blur, resize, noise, JPEG; blur, resize to about 1/scale, noise; {resize to 1/scale and sinc} and JPEG in
    random order; resize back, clamp, round to 8 bit.

    Attributes:
        scale: how much smaller the picture is just before the last resize.
        blur1, resize1, noise1: first order.
        jpeg1: quality of the first JPEG (libjpeg's scale, both ends included).
        blur2, resize2, noise2: second order; resize2's factors are relative to 1/scale.
        final_sinc_prob: probability of the final sinc filter.
        final_sinc_cutoff: its cut-off, radians a pixel.
        final_sinc_size: its side, odd numbers of this range.
        sharpen_prob: probability of sharpening the small picture, as telephones do, with halos.
        sharpen: how much of the detail is added again (unsharp mask).
        sharpen_sigma: what counts as detail, pixels of the small picture.
        jpeg2: quality of the second JPEG.
        enlarge_modes: methods to draw from for the last resize; [bicubic] is how test images are enlarged.
    """

    scale: int = 4
    blur1: RandomBlur = field(default_factory=RandomBlur)
    resize1: RandomResize = field(default_factory=RandomResize)
    noise1: RandomNoise = field(default_factory=RandomNoise)
    jpeg1: tuple[int, int] = (60, 95)
    blur2: RandomBlur = field(default_factory=lambda: RandomBlur(prob=0.5, sigma=(0.2, 1.5)))
    resize2: RandomResize = field(default_factory=lambda: RandomResize((0.3, 0.4, 0.3), (0.6, 1.2)))
    noise2: RandomNoise = field(default_factory=lambda: RandomNoise(sigma=(1.0, 12.0), poisson_scale=(0.05, 1.0)))
    final_sinc_prob: float = 0.8
    final_sinc_cutoff: Range = (math.pi / 3, math.pi)
    final_sinc_size: tuple[int, int] = (7, 21)
    sharpen_prob: float = 0.0
    sharpen: Range = (0.3, 1.2)
    sharpen_sigma: Range = (0.6, 1.5)
    jpeg2: tuple[int, int] = (60, 100)
    enlarge_modes: tuple[str, ...] = RESAMPLING

    def __call__(self, hq_3HW: Tensor, rng: np.random.Generator) -> Tensor:
        """Spoil a picture, RGB in [0, 1], of any size, best a multiple of `scale`: (3, H, W) float32, 8-bit levels.

        The steps are computed in its type: float64 gives the same 8-bit levels on all processors, float32 differs in a
        few.
        """
        size: tuple[int, int] = (hq_3HW.shape[-2], hq_3HW.shape[-1])
        small = _small_size(size, self.scale)
        x = self.noise1(self.resize1(self.blur1(hq_3HW, rng), rng), rng)
        x = compress_jpeg(x, _integer(rng, self.jpeg1))
        x = self.noise2(self.resize2(self.blur2(x, rng), rng, small), rng)
        is_jpeg_last, mode = rng.random() < 0.5, _draw_mode(rng)
        sinc = None
        if rng.random() < self.final_sinc_prob:
            sinc = sinc_kernel(_integer(rng, self.final_sinc_size, 2), _uniform(rng, self.final_sinc_cutoff))
        quality = _integer(rng, self.jpeg2)
        if not is_jpeg_last:
            x = compress_jpeg(x, quality)
        x = resample(x, small, mode)
        if sinc is not None:
            x = blur(x, sinc)
        # nothing is drawn where it is off, so that other presets keep their pictures
        if self.sharpen_prob and rng.random() < self.sharpen_prob:
            x = sharpen(x, _uniform(rng, self.sharpen), _uniform(rng, self.sharpen_sigma))
        if is_jpeg_last:
            x = compress_jpeg(x, quality)
        return round_to_8bit(resample(x, size, _draw_mode(rng, self.enlarge_modes)))


@dataclass(frozen=True)
class BicubicDegradation:
    """Antialiased bicubic down by `scale` and up again, rounded to 8 bit after both; nothing random."""

    scale: int = 4

    def __call__(self, hq_3HW: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """(3, H, W) in [0, 1] to the same size; `rng` is not used."""
        full: tuple[int, int] = (hq_3HW.shape[-2], hq_3HW.shape[-1])
        small = round_to_8bit(resize(hq_3HW.float(), _small_size(full, self.scale)))
        return round_to_8bit(resize(small, full))


def check_weights(key: str, weights: Mapping[str, float], parts: Mapping[str, object], parts_key: str) -> None:
    """Refuse weights (UserError) that are not those of the parts, by their names, or not positive."""
    if not parts or parts.keys() != weights.keys() or min(weights.values()) <= 0:
        wanted = ", ".join(parts) or f"{parts_key}, which are none"
        raise UserError(f"{key} must hold a positive number for each of {wanted}, got {dict(weights)}")


class OneOf:
    """One of several degradations, by names of your choice, for each picture.

    The weights say how often each is taken, by the same names; they need not sum to one. UserError: weights that are
    not those of the degradations, or not positive.
    """

    def __init__(self, degradations: Mapping[str, Degrade], weights: Mapping[str, float]) -> None:
        check_weights("degradation.weights", weights, degradations, "degradation.degradations")
        self.degradations = [degradations[name] for name in weights]
        self.shares = np.array([*weights.values()]) / sum(weights.values())

    def __call__(self, hq_3HW: Tensor, rng: np.random.Generator) -> Tensor:
        """(3, H, W) in [0, 1] to the same size; `rng` draws which, and all that is random in it."""
        return self.degradations[int(rng.choice(len(self.shares), p=self.shares))](hq_3HW, rng)


def _draw_mode(rng: np.random.Generator, modes: tuple[str, ...] = RESAMPLING) -> str:
    return modes[int(rng.integers(len(modes)))]


def _scaled(length: int, factor: float) -> int:
    return max(1, int(length * factor))


def _small_size(size: tuple[int, int], scale: int) -> tuple[int, int]:
    return max(1, round(size[0] / scale)), max(1, round(size[1] / scale))
