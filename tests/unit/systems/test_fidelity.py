"""Giving up what the network guessed."""

import pytest
import torch
from torch import Tensor

from varestorer.systems.fidelity import MOST_SORTED, blend, ranks
from varestorer.systems.varestorer import VARestorer
from varestorer.utils.errors import UserError
from varestorer.utils.images import is_gray, resize
from varestorer.utils.seeds import torch_generator


def picture(height: int, width: int) -> Tensor:
    return torch.rand(3, height, width, generator=torch_generator(3))


def test_ranks_are_shares_of_the_area_whatever_the_unit() -> None:
    doubt = torch.rand(400, 300, generator=torch_generator(0))  # more pixels than are sorted
    assert doubt.numel() > MOST_SORTED
    found = ranks(doubt)
    assert torch.allclose(found, doubt, atol=0.01) and torch.allclose(found, ranks(9 * doubt - 4), atol=1e-3)
    assert torch.equal(ranks(torch.full((5, 4), 0.7)), torch.full((5, 4), 0.5))


def test_the_most_doubtful_share_of_the_area_is_replaced() -> None:
    doubt = torch.linspace(0, 1, 1000)[None]
    for fidelity in (0.0, 0.1, 0.25, 0.5, 0.9, 1.0):
        mixed = blend(torch.zeros(3, 1, 1000), torch.ones(3, 1, 1000), doubt, fidelity)
        assert mixed.mean().item() == pytest.approx(fidelity, abs=2e-3) and (mixed.diff(dim=2) >= 0).all()
    assert mixed.min() == 1 and blend(mixed * 0, mixed, doubt, 0.0).max() == 0


def test_fidelity_goes_from_the_result_to_what_it_was_made_from(tiny_system: VARestorer) -> None:
    lq = picture(20, 13)
    result = tiny_system.restore(lq, 4).image
    assert torch.equal(tiny_system.restore(lq, 4, fidelity=0).image, result)
    whole = tiny_system.restore(lq, 4, fidelity=1).image
    assert torch.allclose(whole, resize(lq, (80, 52)), atol=2e-3)
    half = tiny_system.restore(lq, 4, fidelity=0.5, uncertainty=True)
    assert half.uncertainty_KHW is not None and half.uncertainty_KHW.shape == (3, 80, 52)
    moved = (half.image - result).abs().mean() / (whole - result).abs().mean()
    assert 0.2 < moved < 0.8


def test_what_falls_back_is_the_restorers(tiny_system: VARestorer) -> None:
    half = torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    tiny_system.restorer = lambda image: image * half  # type: ignore[assignment]
    lq = picture(8, 8)
    assert torch.allclose(tiny_system.restore(lq, 4, fidelity=1).image, resize(lq, (32, 32)) * half, atol=2e-3)
    assert is_gray(tiny_system.restore(lq[:1].expand(3, -1, -1), 4, fidelity=0.6).image)


def test_fidelity_that_cannot_be_is_refused(tiny_system: VARestorer) -> None:
    for options in ({"fidelity": 1.5}, {"fidelity": 0.5, "sizes": [4]}):
        with pytest.raises(UserError, match="fidelity must be from 0 to 1, and 0 with sizes"):
            tiny_system.restore(picture(8, 8), **options)
    with pytest.raises(UserError, match="one-step student's"):
        tiny_system.restore(picture(8, 8), fidelity=0.5, steps="multi")
