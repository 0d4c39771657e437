"""Colors of a restored image: what each method takes from the reference and what it leaves."""

import numpy as np
import pytest
import torch
from torch import Tensor

from varestorer.utils.color import COLOR_METHODS, match_color, match_color_8bit
from varestorer.utils.errors import UserError


def noise(seed: int, low: float = 0.2, high: float = 0.8, side: int = 64) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed)) * (high - low) + low


@pytest.mark.parametrize("method", COLOR_METHODS)
def test_an_image_keeps_its_own_colors(method: str) -> None:
    image = noise(0)
    torch.testing.assert_close(match_color(image, image, method), image, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["adain", "wavelet"])
def test_a_shift_of_color_is_taken_back(method: str) -> None:
    image = noise(1)
    shifted = image + torch.tensor([0.1, -0.15, 0.05]).view(1, 3, 1, 1)
    torch.testing.assert_close(match_color(shifted, image, method), image, atol=1e-6, rtol=0)


def test_none_changes_nothing() -> None:
    image = noise(2)
    assert torch.equal(match_color(image, noise(3), "none"), image)


def test_adain_gives_each_channel_of_each_image_the_mean_and_deviation_of_its_reference() -> None:
    tint = torch.tensor([0.1, 0.0, -0.1]).view(1, 3, 1, 1) * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    reference = noise(5, 0.4, 0.6) + tint
    out = match_color(noise(4), reference, "adain")
    torch.testing.assert_close(out.mean(dim=(-2, -1)), reference.mean(dim=(-2, -1)), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std(dim=(-2, -1)), reference.std(dim=(-2, -1)), atol=0, rtol=1e-2)


def test_adain_does_not_blow_up_the_noise_of_a_flat_image() -> None:
    flat = noise(6, 0.5, 0.501)
    assert match_color(flat, noise(7), "adain").std() < 0.3 * noise(7).std()


def test_wavelet_keeps_the_high_frequencies_of_the_image_and_takes_the_low_ones_of_the_reference() -> None:
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 - 0.5  # the first 3x3 blur takes it out altogether
    ramp = torch.linspace(0.4, 0.6, 64).expand(64, 64)
    image, reference = (x.expand(1, 3, 64, 64) for x in (0.3 + 0.2 * board, ramp))
    out = match_color(image, reference + 0.1 * board, "wavelet")
    inner = (..., slice(16, 48), slice(16, 48))
    torch.testing.assert_close(out.diff(dim=-2)[inner], image.diff(dim=-2)[inner], atol=5e-3, rtol=0)
    torch.testing.assert_close(out.mean(), reference.mean(), atol=5e-3, rtol=0)
    flat = match_color(torch.full_like(reference, 0.2), reference, "wavelet")
    torch.testing.assert_close(flat[..., 31:33], reference[..., 31:33], atol=1e-3, rtol=0)


def test_impulses_reach_as_far_as_the_five_levels() -> None:
    reference = torch.full((1, 3, 129, 129), 0.1)
    reference[..., 64, 64] = 1
    changed = match_color(torch.full_like(reference, 0.5), reference, "wavelet")[0, 0, 64] > 0.1 + 1e-7
    assert changed.nonzero().flatten().tolist() == list(range(64 - 31, 64 + 32))


@pytest.mark.parametrize("method", ["adain", "wavelet"])
def test_results_stay_in_range_for_any_pair(method: str) -> None:
    out = match_color(noise(8, 0, 1), noise(9, 0, 1).round(), method)
    assert out.min() >= 0 and out.max() <= 1


def test_unknown_methods_and_other_shapes_are_refused() -> None:
    with pytest.raises(UserError, match="none, adain, wavelet, got 'lab'"):
        match_color(noise(0), noise(0), "lab")
    with pytest.raises(ValueError, match="same shape"):
        match_color(noise(0), noise(0)[:1], "adain")


def test_8_bit_colors_are_cut_off_and_not_rounded() -> None:
    image = np.full((16, 16, 3), 100, np.uint8)
    image[::2] = 102
    reference = np.full((16, 16, 3), 50, np.uint8)
    reference[::4] = 53  # a mean of 50.75, which no pixel of the flat image can hold
    flat = np.full((16, 16, 3), 77, np.uint8)
    assert set(match_color_8bit(flat, reference, "adain").flatten()) == {50}
    assert (match_color_8bit(image, reference, "none") == image).all()
