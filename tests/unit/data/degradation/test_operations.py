import math

import numpy as np
import pytest
import torch
from scipy.special import j1
from torch.nn.functional import conv2d, interpolate

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
from varestorer.utils.images import pad_reflect


def noise_image(height=48, width=40, seed=0):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def smooth_image(side=64):
    ramp = torch.linspace(0, 1, side)
    rows, columns = torch.meshgrid(ramp, ramp, indexing="ij")
    return torch.stack([rows, columns, (rows * 20).sin() / 2 + 0.5])


def rng(seed=0):
    return np.random.default_rng(seed)


def test_sharpening_steepens_edges_and_leaves_halos():
    step = torch.full((3, 16, 32), 0.3)
    step[:, :, 16:] = 0.7
    sharp = sharpen(step, 0.8, 1.0)
    assert torch.equal(sharpen(step, 0.0, 1.0), step)
    assert torch.allclose(sharp[:, :, :8], step[:, :, :8], atol=1e-6)
    detail = step - blur(step, gaussian_kernel(7, 1.0))
    assert torch.allclose(sharp, step + 0.8 * detail, atol=1e-6)
    assert sharp.min() < 0.25 and sharp.max() > 0.75
    assert sharpen(torch.ones(3, 8, 8), 5.0, 1.0).max() <= 1


@pytest.mark.parametrize("size", [(48, 40), (12, 12), (3, 30), (1, 1), (37, 61)])
def test_blur_is_a_direct_correlation(size):
    img = noise_image(*size)
    kernel = gaussian_kernel(21, 0.8, 2.5, theta=0.4)
    kernel[0, 3] += 0.2  # no symmetry: a flipped kernel would show
    expected = conv2d(pad_reflect(img, 10, 10, 10, 10)[:, None], kernel[None, None])[:, 0]
    assert blur(img, kernel).shape == img.shape
    assert torch.allclose(blur(img, kernel), expected, atol=2e-6)


def test_blur_keeps_flat_pictures_and_lowers_contrast():
    flat = torch.full((3, 20, 20), 0.3)
    assert torch.allclose(blur(flat, sinc_kernel(21, 1.0)), flat, atol=1e-6)
    assert blur(noise_image(), gaussian_kernel(21, 2.0)).std() < 0.3 * noise_image().std()


@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
def test_resample_is_torchs_without_antialiasing(mode):
    options = {} if mode == "area" else {"align_corners": False}
    expected = interpolate(noise_image()[None], (13, 17), mode=mode, antialias=False, **options)[0]
    assert torch.equal(resample(noise_image(), (13, 17), mode), expected)


@pytest.mark.parametrize("use_gray", [False, True])
def test_gaussian_noise_has_the_moments_asked_for(use_gray):
    clean = torch.full((3, 200, 200), 0.5)
    noise = add_gaussian_noise(clean, 12.0, use_gray, rng()) - clean
    assert abs(noise.mean()) < 1e-3
    assert noise.std() * 255 == pytest.approx(12.0, rel=0.02)
    assert torch.equal(noise[0], noise[1]) == use_gray
    assert torch.equal(noise, add_gaussian_noise(clean, 12.0, use_gray, rng()) - clean)


@pytest.mark.parametrize("use_gray", [False, True])
def test_poisson_noise_has_the_moments_asked_for(use_gray):
    gray = (torch.arange(256 * 256) % 256).float().reshape(1, 256, 256) / 255
    clean = gray.expand(3, -1, -1)  # all 256 levels: 256 photons at white
    noise = add_poisson_noise(clean, 0.5, use_gray, rng()) - clean
    assert torch.equal(noise[0], noise[1]) == use_gray
    for level in (40, 128, 200):
        at_level = noise[:, :, level]
        expected = 0.5 * np.sqrt(level / 255 / 256)
        assert at_level.std() == pytest.approx(expected, rel=0.12)
        assert abs(at_level.mean()) < 5 * expected / np.sqrt(256)
    assert torch.equal(noise, add_poisson_noise(clean, 0.5, use_gray, rng()) - clean)


def test_poisson_noise_of_few_levels_is_stronger():
    two_levels = torch.full((3, 100, 100), 0.5)
    two_levels[:, :, ::2] = 0.6  # 2 levels: 2 photons at white
    noise = add_poisson_noise(two_levels, 0.1, False, rng()) - two_levels
    assert noise[:, :, 1::2].std() == pytest.approx(0.1 * np.sqrt(0.5 / 2), rel=0.05)


def test_noise_stays_in_range():
    for noisy in (
        add_gaussian_noise(noise_image(), 60.0, False, rng()),
        add_poisson_noise(noise_image() * 1.4 - 0.2, 2.0, True, rng()),
    ):
        assert noisy.min() == 0 and noisy.max() == 1


def test_jpeg_loses_more_at_low_quality():
    clean = smooth_image()
    errors = [(compress_jpeg(clean, quality) - clean).abs().mean() for quality in (95, 60, 10)]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.1
    assert torch.equal(compress_jpeg(clean, 60), compress_jpeg(clean, 60))


def test_jpeg_halves_the_color_resolution():
    stripes = torch.zeros(3, 32, 32)
    stripes[0, :, ::2], stripes[2, :, 1::2] = 1, 1  # red and blue columns
    out = compress_jpeg(stripes, 100)
    assert (out[0, :, ::2] - out[0, :, 1::2]).mean() < 0.5


def test_jpeg_takes_what_overshoots_and_tiny_pictures():
    out = compress_jpeg(noise_image(1, 3) * 3 - 1, 75)
    assert out.shape == (3, 1, 3) and out.min() >= 0 and out.max() <= 1


def test_rounding():
    out = round_to_8bit(torch.tensor([-0.2, 0.3, 1.7]))
    assert out.tolist() == pytest.approx([0, round(0.3 * 255) / 255, 1])


@pytest.mark.parametrize(("levels", "photons"), [(3, 4), (5, 8), (8, 8)])
def test_photons_are_the_next_power_of_two_of_the_levels(levels, photons):
    picture = torch.full((3, 200, 200), 0.5)
    picture[:, 0, :levels] = torch.linspace(0.5, 0.9, levels)
    noise = (add_poisson_noise(picture, 0.1, False, rng()) - picture)[:, 1:]
    assert noise.std() == pytest.approx(0.1 * np.sqrt(0.5 / photons), rel=0.03)


KERNELS = [
    gaussian_kernel(7, 0.2),
    gaussian_kernel(21, 3.0),
    gaussian_kernel(21, 0.4, 2.8, theta=1.0),
    gaussian_kernel(15, 1.5, beta=0.5),
    gaussian_kernel(15, 0.2, 3.0, theta=-2.0, beta=4.0),
    plateau_kernel(9, 2.0, beta=1.0),
    plateau_kernel(21, 0.2, 3.0, theta=0.3, beta=2.0),
    sinc_kernel(7, math.pi),
    sinc_kernel(21, math.pi / 5),
]


@pytest.mark.parametrize("kernel", KERNELS)
def test_sum_one_and_point_symmetric(kernel):
    assert kernel.dtype == torch.float32 and torch.isfinite(kernel).all()
    assert abs(kernel.sum() - 1) < 1e-6
    assert torch.allclose(kernel, kernel.flip(0, 1), atol=1e-7)
    assert kernel.argmax() == kernel.numel() // 2


def test_gaussian_against_its_formula():
    axis = np.arange(21) - 10
    expected = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 1.7**2))
    assert np.allclose(gaussian_kernel(21, 1.7), expected / expected.sum(), atol=1e-7)


@pytest.mark.parametrize("shape", [gaussian_kernel, plateau_kernel])
def test_rotated_kernels_against_the_matrix_form(shape):
    sigma_x, sigma_y, theta, beta = 0.8, 2.5, 0.7, 1.6
    rotation = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
    inverse = np.linalg.inv(rotation @ np.diag([sigma_x**2, sigma_y**2]) @ rotation.T)
    axis = np.arange(15) - 7
    points = np.stack(np.meshgrid(axis, axis), axis=-1)  # (row, column, (x, y))
    distance = np.einsum("ijk,kl,ijl->ij", points, inverse, points) ** beta
    expected = np.exp(-distance / 2) if shape is gaussian_kernel else 1 / (1 + distance)
    assert np.allclose(shape(15, sigma_x, sigma_y, theta, beta), expected / expected.sum(), atol=1e-7)


def test_isotropic_kernels_do_not_see_rotation():
    assert torch.allclose(gaussian_kernel(9, 1.3, 1.3, theta=1.1, beta=0.7), gaussian_kernel(9, 1.3, beta=0.7))


@pytest.mark.parametrize(("size", "cutoff"), [(7, math.pi), (13, 1.0), (21, math.pi / 3)])
def test_sinc_against_the_closed_form(size, cutoff):
    axis = np.arange(size) - size // 2
    radius = np.hypot(axis[:, None], axis[None])
    with np.errstate(invalid="ignore"):
        expected = cutoff * j1(cutoff * radius) / (2 * np.pi * radius)
    expected[size // 2, size // 2] = cutoff**2 / (4 * np.pi)
    assert np.allclose(sinc_kernel(size, cutoff), expected / expected.sum(), atol=1e-6)


def test_sinc_cuts_high_frequencies_and_rings():
    kernel = sinc_kernel(21, math.pi / 3)
    assert kernel.min() < 0
    response = torch.fft.fft2(kernel, s=(64, 64)).abs()
    assert response[0, 4] > 0.8 and response[0, 24:33].max() < 0.1


@pytest.mark.parametrize("size", [0, 4, -3])
def test_even_sizes_are_refused(size):
    with pytest.raises(ValueError, match="odd and positive"):
        gaussian_kernel(size, 1.0)
