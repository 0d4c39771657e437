"""Frozen numbers of the model that comes with the package: any change of what its networks compute shows here.

Inputs are formulas whose bits are far from undecided, so that other processors give the same numbers to 1e-3.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from varestorer.systems.varestorer import VARestorer
from varestorer.tokenizer import MultiScaleTokenizer, TokenizerConfig, TokenPyramid
from varestorer.transformer import TextFeatures
from varestorer.utils.images import resize
from varestorer.weights import DEFAULT

NUMBERS = {
    "restorer": [0.3186, 0.5111, 0.4544, 0.4692, 0.466, 0.5134, 0.5794, 0.5739, 0.4063],
    "encoder": [-0.4079, 0.6712, -0.0329, -0.325, -1.0869, 0.4415, 0.2288, -0.1105, -0.6456],
    "pyramid": [-0.125, 0.125, 0.0, -0.125, -0.125, 0.25, 0.125, 0.0, 0.0],
    "decoder": [-0.0126, -0.0051, 0.0207, -0.1117, -0.1088, -0.0896, -0.061, -0.0559, -0.0376],
    "encoder with norms": [0.9804, 0.9773, 1.1124, 1.0235, 0.782, 0.4952, 0.2538, 0.1252, 0.1577],
    "decoder with norms": [1.1367, 0.7095, 1.0685, 1.0129, 0.8137, 1.4464, 1.1095, 0.996, 0.9016],
    "teacher": [1.1064, 4.3178, -2.6626, 0.4746, -2.6672, -1.0774, -3.2556, -2.8124, 0.7714],
    "teacher with prompts": [1.2469, -2.6832, -2.9154, -3.7669, 0.9875, -2.7727, -3.0402, -3.7437, 1.0733],
    "student": [-1.28, 1.4424, -1.3692, 0.6911, -1.172, -0.96, 0.6869, 0.7718, 1.2158],
    "student as released": [-0.2789, 0.2428, -0.6299, -0.0455, 0.0567, 0.5546, -0.4017, -0.1905, -0.3416],
    "one": [0.4763, 0.4894, 0.4936, 0.466, 0.4747, 0.4896, 0.4815, 0.4658, 0.4995],
    "3": [0.4027, 0.4808, 0.4894, 0.4224, 0.473, 0.5088, 0.4709, 0.4792, 0.5228],
    "multi": [0.4306, 0.4818, 0.5013, 0.4388, 0.4994, 0.5004, 0.5148, 0.51, 0.5888],
}


@pytest.fixture(scope="module")
def nano() -> VARestorer:
    return VARestorer.from_pretrained()


def waves(*shape: int) -> Tensor:
    """Numbers in [0, 1] that change from place to place and from row to row."""
    count = torch.arange(int(torch.tensor(shape).prod()), dtype=torch.float64)
    return (0.5 + 0.25 * torch.sin(0.37 * count) + 0.25 * torch.cos(0.011 * count)).float().view(shape)


def features(system: VARestorer) -> Tensor:
    """A latent map whose residuals are nowhere near zero at any scale."""
    signs = torch.arange(64).mul(7).remainder(3).sub(1)[None, :, None, None] + 0.37
    return (signs * (0.6 + 0.3 * waves(1, 64, *system.schedule.latent_size))).float() * 0.2


def pyramid(system: VARestorer) -> TokenPyramid:
    return system.tokenizer.quantizer(features(system), system.schedule)


def some(values: Tensor) -> list[float]:
    """Nine numbers from all over a tensor."""
    flat = values.detach().float().flatten()
    return [round(value, 4) for value in flat[torch.linspace(0, len(flat) - 1, 9).long()].tolist()]


def margins(logits_BLZ2: Tensor) -> Tensor:
    return logits_BLZ2[..., 1] - logits_BLZ2[..., 0]


def teacher(system: VARestorer, text: TextFeatures) -> Tensor:
    tokens = system.tokenizer.quantizer(features(system).expand(len(text.lengths), -1, -1, -1), system.schedule)
    return margins(system.teacher_logits(tokens, text))


def student(system: VARestorer) -> Tensor:
    condition = system.conditioner.from_pyramid(pyramid(system), system.schedule, waves(1, 3, system.tile, system.tile))
    return margins(system.student_logits(condition, system.null_text(1)))


def as_released(system: VARestorer) -> VARestorer:
    """The same weights as the student of another form: the released one's."""
    traits = {"lora_rank": 64, "lora_targets": system.student_config.lora_targets}
    weights = {part: DEFAULT for part in ("tokenizer", "transformer")}
    return VARestorer(**(system.config | {"student": traits, "weights": weights})).eval()


def published_form() -> MultiScaleTokenizer:
    """An autoencoder with norms, changes of width and of size, whose weights are a formula."""
    tokenizer = MultiScaleTokenizer(TokenizerConfig(32, (1, 2), 8, 1, 1))
    for number, parameter in enumerate(tokenizer.parameters()):
        spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5
        parameter.copy_((waves(*parameter.shape, 2)[..., number % 2] * 4 - 2) * spread)
    return tokenizer


CASES: dict[str, Callable[[VARestorer], Tensor]] = {
    "restorer": lambda system: system.restorer(waves(1, 3, 64, 48)),  # type: ignore[misc]
    "encoder": lambda system: system.tokenizer.features(waves(1, 3, 64, 32) * 2 - 1),
    "pyramid": lambda system: torch.cat([x.flatten() for x in pyramid(system).cumulative]),
    "decoder": lambda system: system.tokenizer.decode(features(system)),
    "encoder with norms": lambda system: published_form().encoder(waves(1, 3, 8, 8) * 2 - 1),
    "decoder with norms": lambda system: published_form().decoder(waves(1, 8, 4, 4) - 0.5),
    "teacher": lambda system: teacher(system, system.null_text(1)),
    "teacher with prompts": lambda system: teacher(system, TextFeatures.from_list([waves(3, 64), 1 - waves(2, 64)])),
    "student": student,
    "student as released": lambda system: student(as_released(system)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_its_networks_give_these_numbers(nano: VARestorer, name: str) -> None:
    assert some(CASES[name](nano)) == pytest.approx(NUMBERS[name], abs=2e-3)


@pytest.mark.parametrize(("steps", "tolerance"), [("one", 0.005), ("3", 0.02), ("multi", 0.03)])
def test_it_restores_to_this_picture(nano: VARestorer, steps: str, tolerance: float) -> None:
    """Means of large squares: a bit that another processor decides otherwise hardly moves them."""
    small = resize(waves(1, 3, 96, 96), (40, 32), "area")[0]
    restored = nano.restore(small, 4, steps=steps).image
    assert some(resize(restored, (4, 3), "area")) == pytest.approx(NUMBERS[steps], abs=tolerance)
