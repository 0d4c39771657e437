"""The residual pyramid and the tokenizer's terms against plain code."""

import math

import pytest
import torch
import torch.nn.functional as F

from varestorer.systems.varestorer import VARestorer
from varestorer.tokenizer import MultiScaleQuantizer, ScaleSchedule
from varestorer.tokenizer.quantizer import resize_area
from varestorer.training.tasks.tokenizer import TokenizerTask
from varestorer.utils.images import to_network
from varestorer.utils.seeds import torch_generator

SCHEDULE = ScaleSchedule.build(sides=[1, 2, 3, 5])


@pytest.fixture
def quantizer(tiny_system: VARestorer) -> MultiScaleQuantizer:
    return tiny_system.tokenizer.quantizer


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(2, 8, 5, 5, generator=torch_generator(0))


def test_each_scale_is_the_sign_of_the_mean_of_what_is_left(
    quantizer: MultiScaleQuantizer, features: torch.Tensor
) -> None:
    pyramid = quantizer(features, SCHEDULE)
    total = torch.zeros_like(features)
    for bits, side, cumulative in zip(pyramid.indices, (1, 2, 3, 5), pyramid.cumulative, strict=True):
        left = F.adaptive_avg_pool2d(features - total, side)
        assert torch.equal(bits, left > 0)
        codes = torch.where(bits, 1.0, -1.0) / math.sqrt(8)
        total = total + F.interpolate(codes, (5, 5), mode="bilinear", align_corners=False)
        assert torch.allclose(cumulative, total, atol=1e-6)


def test_inputs_are_resized_as_asked(quantizer: MultiScaleQuantizer, features: torch.Tensor) -> None:
    pyramid = quantizer(features, SCHEDULE)
    for resize, by in (
        (None, lambda x, side: F.interpolate(x, (side, side), mode="bilinear", align_corners=False)),
        (resize_area, F.adaptive_avg_pool2d),
    ):
        inputs = pyramid.inputs() if resize is None else pyramid.inputs(resize)
        sums = [by(total, side) for total, side in zip(pyramid.cumulative, (2, 3, 5), strict=False)]
        assert torch.allclose(inputs, torch.cat([x.flatten(2) for x in sums], dim=2).transpose(1, 2), atol=1e-6)
    assert not torch.allclose(pyramid.inputs(), pyramid.inputs(resize_area), atol=1e-3)


def test_bits_flip_where_the_noise_is_below_the_strength(quantizer: MultiScaleQuantizer) -> None:
    bits = torch.tensor([True, True, False, False]).view(1, 4, 1, 1)
    noise = torch.tensor([0.1, 0.6, 0.1, 0.6]).view(1, 4, 1, 1)
    flipped = quantizer.codebook.flip(bits, noise, torch.tensor([0.3]).view(1, 1, 1, 1))
    assert flipped.flatten().tolist() == [False, True, True, False]


@torch.no_grad()
def test_the_terms_of_the_tokenizers_loss_by_hand(tiny_system: VARestorer) -> None:
    """Entropies of the soft bits (BSQ): sigmoid(2 z) of features on the sphere of radius sqrt(Z), at temperature 1."""
    images = torch.rand(2, 3, 32, 32, generator=torch_generator(1))
    batch = {"hq": images, "lq": images, "name": ["a", "b"], "key": torch.tensor([0, 1])}
    weights = {"l1": 2.0, "mse": 3.0, "perceptual": 0.5, "commitment": 0.25, "entropy": 0.1}
    losses = TokenizerTask(tiny_system, weights, perceptual="ms_ssim")(batch, 1)
    features = tiny_system.tokenizer.features(to_network(images))
    p = torch.sigmoid(2 * math.sqrt(8) * features / features.norm(dim=1, keepdim=True))

    def entropy(p: torch.Tensor) -> torch.Tensor:
        return -(p * p.log() + (1 - p) * (1 - p).log())

    decided, used = entropy(p).mean(), entropy(p.mean(dim=(0, 2, 3))).mean()
    assert losses["entropy"].item() == pytest.approx((decided - used).item(), abs=1e-5)
    assert (used - entropy(p.mean(dim=(2, 3))).mean()).item() > 1e-4  # over the batch, not within each image
    codes = tiny_system.encode(images).codes
    assert losses["commitment"].item() == pytest.approx((features - codes).square().mean().item(), abs=1e-5)
    image = tiny_system.tokenizer.decode(codes)
    assert losses["mse"].item() == pytest.approx((image - to_network(images)).square().mean().item(), abs=1e-5)
    assert losses["loss"].item() == pytest.approx(sum(w * losses[name].item() for name, w in weights.items()), abs=1e-4)


def test_the_gradient_of_the_reconstruction_passes_the_bits_unchanged(tiny_system: VARestorer) -> None:
    """Straight through: the encoder gets what the decoder's input got, though the bits have no slope."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, tensor: torch.Tensor) -> None:
        tensor.retain_grad()
        seen[name] = tensor

    tiny_system.tokenizer.encoder.register_forward_hook(lambda _, inputs, output: keep("features", output))
    tiny_system.tokenizer.decoder.register_forward_pre_hook(lambda _, inputs: keep("codes", inputs[0]))
    images = torch.rand(2, 3, 32, 32, generator=torch_generator(1))
    batch = {"hq": images, "lq": images, "name": ["a", "b"], "key": torch.tensor([0, 1])}
    weights = {"l1": 1.0, "mse": 0.0, "perceptual": 0.0, "commitment": 0.0}
    TokenizerTask(tiny_system, weights, perceptual="ms_ssim")(batch, 1)["loss"].backward()
    features, codes = seen["features"].grad, seen["codes"].grad
    assert features is not None and codes is not None and codes.abs().max() > 0
    assert torch.allclose(features, codes, atol=1e-8)
