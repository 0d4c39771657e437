import math

import numpy as np
import pytest
import torch
from scipy.special import j1

from varestorer.data.degradation.operations import gaussian_kernel, plateau_kernel, sinc_kernel

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
