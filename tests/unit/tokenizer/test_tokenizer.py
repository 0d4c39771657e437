"""Quantizer, residual pyramid, autoencoder."""

import pytest
import torch

from varestorer.tokenizer import (
    BinarySphericalQuantizer,
    MultiScaleQuantizer,
    MultiScaleTokenizer,
    ScaleSchedule,
    TokenizerConfig,
)
from varestorer.tokenizer.autoencoder import clamp_keeping_gradient, init_weights
from varestorer.utils.errors import UserError
from varestorer.utils.seeds import torch_generator

SCHEDULE = ScaleSchedule.build(sides=[1, 2, 3, 5])


@pytest.fixture
def quantizer() -> MultiScaleQuantizer:
    return MultiScaleQuantizer(BinarySphericalQuantizer(8))


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0))


def test_codes_are_corners_of_the_unit_sphere_and_zero_is_minus() -> None:
    quantizer = BinarySphericalQuantizer(16)
    features = torch.zeros(1, 16, 1, 1)
    features[0, 3] = 1e-9
    codes = quantizer.codes(quantizer.indices(features))
    assert codes.norm(dim=1).item() == pytest.approx(1.0)
    assert (codes > 0).flatten().nonzero().flatten().tolist() == [3]


def test_bits_to_codes_rebuilds_the_pyramid(quantizer: MultiScaleQuantizer, features: torch.Tensor) -> None:
    pyramid = quantizer(features, SCHEDULE)
    assert torch.equal(quantizer.indices_to_codes(pyramid.indices, SCHEDULE), pyramid.codes)
    assert pyramid.labels().shape == (2, SCHEDULE.num_tokens, 8)


def test_each_scale_leaves_less_of_the_features(quantizer: MultiScaleQuantizer, features: torch.Tensor) -> None:
    left = [(features * 0.5 - total).square().mean() for total in quantizer(features * 0.5, SCHEDULE).cumulative]
    assert left[-1] < left[0]


def test_inputs_hold_the_sum_of_all_coarser_scales_only(quantizer: MultiScaleQuantizer, features: torch.Tensor) -> None:
    pyramid = quantizer(features, SCHEDULE)
    inputs = pyramid.inputs()
    assert inputs.shape == (2, SCHEDULE.num_tokens - 1, 8)
    first = inputs[:, :4]  # the 2x2 tokens see the 1x1 code, spread out
    assert torch.allclose(first, pyramid.cumulative[0][:, :, :1, 0].transpose(1, 2).expand(2, 4, 8))


def test_own_inputs_hold_the_scales_own_codes_too(quantizer: MultiScaleQuantizer, features: torch.Tensor) -> None:
    pyramid = quantizer(features, SCHEDULE)
    inputs = pyramid.own_inputs()
    assert inputs.shape == pyramid.inputs().shape
    assert torch.equal(inputs[:, -25:].transpose(1, 2).reshape(2, 8, 5, 5), pyramid.codes)
    flipped = quantizer(features, SCHEDULE, lambda k, bits: ~bits if k == 1 else bits)
    changed = (flipped.own_inputs() != inputs).any(dim=-1)[0]
    assert changed[:4].all() and not torch.equal(flipped.own_inputs(), flipped.inputs())


def test_later_labels_answer_to_flipped_bits(quantizer: MultiScaleQuantizer, features: torch.Tensor) -> None:
    flipped = quantizer(features, SCHEDULE, lambda k, bits: ~bits if k == 0 else bits)
    clean = quantizer(features, SCHEDULE)
    assert torch.equal(flipped.indices[0], clean.indices[0])
    assert torch.equal(flipped.predicted[0], ~clean.indices[0])
    assert not torch.equal(flipped.indices[1], clean.indices[1])


def test_features_of_another_size_are_refused(quantizer: MultiScaleQuantizer) -> None:
    with pytest.raises(ValueError, match="last scale 5x5, got 4x4"):
        quantizer(torch.zeros(1, 8, 4, 4), SCHEDULE)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_decode_undoes_the_stride_of_encode(patch_size: int) -> None:
    config = TokenizerConfig(32, (1, 1, 1), 8, 1, 1, patch_size)
    tokenizer = MultiScaleTokenizer(config).eval()
    assert tokenizer.stride == 4 * patch_size
    schedule = ScaleSchedule.build(sides=[1, 2])
    image = torch.rand(1, 3, 2 * tokenizer.stride, 2 * tokenizer.stride) * 2 - 1
    assert tokenizer.decode(tokenizer.encode(image, schedule).codes).shape == image.shape
    with pytest.raises(ValueError, match=f"multiples of {tokenizer.stride}"):
        tokenizer.features(torch.zeros(1, 3, tokenizer.stride + 1, tokenizer.stride))
    with pytest.raises(ValueError, match="images"):
        tokenizer.features(torch.zeros(3, 8, 8))


def test_published_sizes() -> None:
    with torch.device("meta"):
        tokenizer = MultiScaleTokenizer(TokenizerConfig())
    counts = [sum(p.numel() for p in part.parameters()) for part in (tokenizer, tokenizer.encoder, tokenizer.decoder)]
    assert counts == [110_118_051, 45_025_696, 65_092_355]
    assert tokenizer.stride == 16


def test_clamp_lets_gradients_pass() -> None:
    x = torch.tensor([-3.0, 0.5, 2.0], requires_grad=True)
    y = clamp_keeping_gradient(x)
    y.sum().backward()
    assert y.tolist() == [-1.0, 0.5, 1.0]
    assert x.grad is not None and x.grad.tolist() == [1.0, 1.0, 1.0]


def test_entropy_terms_tell_decided_from_undecided_bits() -> None:
    quantizer = BinarySphericalQuantizer(4)
    half = torch.ones(1, 4, 1, 2)
    half[..., 1] = -1
    decided, used = quantizer.entropy_terms(half, temperature=0.01)
    assert decided.item() < 1e-3
    assert used.item() == pytest.approx(0.6931, abs=1e-3)
    _, constant = quantizer.entropy_terms(torch.ones(1, 4, 1, 2), temperature=0.01)
    assert constant.item() < 1e-3


def test_without_norm_features_keep_the_strength_of_a_square() -> None:
    """Group norm takes the strength of what a square shows out of its features."""
    square = torch.randn(1, 3, 16, 16, generator=torch_generator(0, "square"))
    growth = {}
    for norm in ("group", "none"):
        tokenizer = MultiScaleTokenizer(TokenizerConfig(32, (1,), 8, 1, 1, patch_size=4, norm=norm))
        init_weights(tokenizer, torch_generator(0, "tokenizer"))
        with torch.no_grad():
            growth[norm] = tokenizer.encoder(100 * square).norm() / tokenizer.encoder(square).norm()
    assert growth["none"] > 50 and growth["group"] < 2
    with pytest.raises(UserError, match=r"model\.tokenizer\.norm must be group or none, got 'batch'"):
        TokenizerConfig(norm="batch")


def test_entropies_are_finite_in_bfloat16(features: torch.Tensor) -> None:
    assert all(term.isfinite() for term in BinarySphericalQuantizer(8).entropy_terms(100 * features.bfloat16()))
