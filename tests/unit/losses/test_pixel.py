"""Losses of pixels."""

import pytest
import torch

from varestorer.losses.pixel import mesh_loss
from varestorer.utils.seeds import torch_generator


def mesh(side: int, period: int) -> torch.Tensor:
    """Lines at every `period`-th column, 1 high."""
    return (torch.arange(side) % period == 0).float().expand(1, 3, side, side)


def test_a_mesh_costs_what_it_deviates_from_its_mean() -> None:
    smooth = torch.linspace(-1, 1, 70).expand(1, 3, 70, 70)
    faint = smooth + 0.04 * mesh(70, 4)
    # a quarter of the columns is 0.03 above the mean, three quarters 0.01 below
    assert mesh_loss(faint, smooth).item() == pytest.approx(0.015, rel=1e-4)
    assert mesh_loss(smooth + 0.5, smooth).item() == pytest.approx(0, abs=1e-6)


def test_other_patterns_and_noise_cost_next_to_nothing() -> None:
    flat = torch.zeros(1, 3, 64, 64)
    noise = 0.04 * torch.randn(1, 3, 64, 64, generator=torch_generator(0))
    assert mesh_loss(flat + noise, flat).item() < 0.006  # an eighth of the noise, of 64 pixels a phase
    assert mesh_loss(flat + 0.04 * mesh(64, 5), flat).item() < 0.004


def test_images_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="prediction must have the target's shape"):
        mesh_loss(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 36))
