"""The student's input: the restorer's range, and the order of what the transformer reads."""

import pytest
import torch
from torch import Tensor, nn

from varestorer.systems.varestorer import VARestorer
from varestorer.utils.seeds import torch_generator


class Brightener(nn.Module):
    """A restorer that keeps what it was given."""

    def forward(self, image_B3HW: Tensor) -> Tensor:
        self.seen = image_B3HW
        return 0.5 * image_B3HW + 0.4


def degraded(seed: int = 0) -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch_generator(seed))


@torch.no_grad()
@pytest.mark.parametrize("way", ["restoring", "distillation"])
def test_the_restorer_sees_and_gives_images_from_zero_to_one(tiny_system: VARestorer, way: str) -> None:
    tiny_system.restorer = restorer = Brightener()  # type: ignore[assignment]
    lq, cleaned = degraded(), 0.5 * degraded() + 0.4
    if way == "restoring":
        condition = tiny_system.condition(lq)
    else:
        _, condition = tiny_system.pair_tokens(degraded(1), lq)
    assert torch.allclose(restorer.seen, lq, atol=1e-6)
    assert torch.allclose(condition.image_B3HW, 2 * cleaned - 1, atol=1e-6)
    expected = tiny_system.encode(cleaned)
    assert all(torch.equal(a, b) for a, b in zip(condition.pyramid.indices, expected.indices, strict=True))


@torch.no_grad()
def test_of_a_pair_the_photograph_is_the_teachers_and_the_degraded_image_the_students(tiny_system: VARestorer) -> None:
    hq, lq = degraded(1), degraded(0)
    photograph, condition = tiny_system.pair_tokens(hq, lq)
    for pyramid, image in ((photograph, hq), (condition.pyramid, lq)):
        expected = tiny_system.encode(image)
        assert all(torch.equal(a, b) for a, b in zip(pyramid.indices, expected.indices, strict=True))


@torch.no_grad()
def test_the_complete_codes_come_behind_the_scales(tiny_system: VARestorer) -> None:
    condition = tiny_system.condition(degraded())
    codes = condition.pyramid.codes.flatten(2).transpose(1, 2)
    assert torch.equal(condition.tokens_BLZ[:, :20], condition.pyramid.inputs())
    assert torch.equal(condition.tokens_BLZ[:, 20:], codes)
    assert condition.layout.levels_L.tolist() == [0] + [1] * 4 + [2] * 16 + [3] * 16
