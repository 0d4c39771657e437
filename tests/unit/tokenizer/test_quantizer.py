"""The residual pyramid, and nearest codes, against plain code; the autoencoder's attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from varestorer.systems.varestorer import VARestorer
from varestorer.tokenizer import MultiScaleQuantizer, ScaleSchedule
from varestorer.tokenizer.autoencoder import AttentionBlock, Decoder, Encoder, init_weights
from varestorer.tokenizer.quantizer import (
    CodebookQuantizer,
    Phi,
    code_counts,
    perplexity,
    phi_index,
    resize_area,
    used_share,
    vq_losses,
)
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


def codebook_quantizer(codebook: Tensor) -> CodebookQuantizer:
    made = CodebookQuantizer(*codebook.shape)
    made.entries.data.copy_(codebook)
    return made


def at_positions(tokens: list[list[float]]) -> Tensor:
    """One image of one row of tokens."""
    return torch.tensor(tokens).T[None, :, None]


def test_the_nearest_code_is_found_by_distance_and_not_by_direction() -> None:
    codebook = torch.tensor([[1.0, 0.0], [10.0, 0.0], [0.0, 1.0]])
    found = codebook_quantizer(codebook).indices(at_positions([[2.0, 0.1], [9.0, 3.0], [0.1, 0.4]]))
    assert found.dtype == torch.int64
    assert found.tolist() == [[[0, 1, 2]]]


def test_of_equally_near_codes_the_first_is_taken() -> None:
    codebook = torch.tensor([[5.0, 5.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert codebook_quantizer(codebook).indices(at_positions([[0.0, 0.0], [1.0, 0.0]])).tolist() == [[[1, 1]]]


def test_autocast_does_not_blur_the_distances() -> None:
    codebook = torch.tensor([[1.0], [1.001]])
    with torch.autocast("cpu", torch.bfloat16):
        assert codebook_quantizer(codebook).indices(at_positions([[1.0009]])).item() == 1


def test_codes_give_back_the_vectors_and_mixtures_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    made = codebook_quantizer(torch.randn(5, 3, generator=generator))
    numbers = torch.randint(5, (2, 4, 6), generator=generator)
    codes = made.codes(numbers)
    assert torch.equal(codes[1, :, 2, 3], made.entries[numbers[1, 2, 3]])
    assert torch.equal(made.indices(codes), numbers)
    one_hot = torch.nn.functional.one_hot(numbers, 5).movedim(-1, 1).float()
    torch.testing.assert_close(made.codes(one_hot), codes)


def test_flipped_numbers_are_other_numbers_and_all_of_them_come() -> None:
    made = CodebookQuantizer(7, 2)
    generator = torch.Generator().manual_seed(1)
    numbers = torch.full((1, 100, 100), 3)
    noise, strength = torch.rand(numbers.shape, generator=generator), torch.tensor(0.3)
    flipped = made.flip(numbers, noise, strength)
    assert torch.equal(flipped != numbers, noise < strength)
    shares = flipped[flipped != 3].bincount(minlength=7) / (flipped != 3).sum()
    assert shares[3] == 0
    assert (shares[[0, 1, 2, 4, 5, 6]] - 1 / 6).abs().max() < 0.02
    assert torch.equal(made.flip(numbers, noise, torch.tensor(0.0)), numbers)


def test_entropies_tell_decided_and_even_choices() -> None:
    made = codebook_quantizer(torch.tensor([[100.0, 0.0], [0.0, 100.0]]))
    decided, used = made.entropy_terms(at_positions([[100.0, 0.0], [0.0, 100.0]]))
    assert decided.item() == pytest.approx(0, abs=1e-6)
    assert used.item() == pytest.approx(torch.tensor(2.0).log().item())
    decided, used = made.entropy_terms(at_positions([[50.0, 50.0]]))
    assert decided.item() == pytest.approx(torch.tensor(2.0).log().item())


def test_vq_losses_hold_the_features_and_draw_the_codes() -> None:
    features = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).requires_grad_()
    codes = torch.tensor([0.0, 4.0]).view(1, 2, 1, 1).requires_grad_()
    losses = vq_losses(features, [codes, features.detach() * 1.0], beta=0.25)
    assert losses.tolist() == [1.25 * (1 + 4) / 2, 0.0]
    losses[0].backward()
    assert features.grad.flatten().tolist() == [0.25, 0.25 * -2]
    assert codes.grad.flatten().tolist() == [-1.0, 2.0]


def test_usage_counts_shares_and_perplexity() -> None:
    counts = code_counts([torch.zeros(2, 1, 1).long(), torch.tensor([[[0, 1], [2, 3]]])], num_codes=8)
    assert counts.tolist() == [[2, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert used_share(counts).tolist() == [1 / 8, 1 / 2]
    assert perplexity(counts).tolist() == pytest.approx([1, 4])


def test_the_published_schedules_share_the_convolutions() -> None:
    assert [phi_index(k, 10) for k in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert [phi_index(k, 12) for k in range(12)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert phi_index(5, 11) == 2  # a tie, by float64
    assert phi_index(0, 1) == 0


def test_phi_is_half_the_codes_and_half_their_convolution() -> None:
    phi = Phi(2)
    for number, conv in enumerate(phi.convs):
        conv.weight.data.zero_()
        conv.bias.data.fill_(float(number))
    codes = torch.ones(1, 2, 3, 3)
    assert [phi(codes, k, 4)[0, 0, 0, 0].item() for k in range(4)] == [0.5, 1.0, 1.5, 2.0]


def test_attention_with_equal_scores_adds_the_mean_of_the_values() -> None:
    block = AttentionBlock(4, norm="none")
    block.qkv.weight.data.zero_()
    block.qkv.bias.data.zero_()
    block.qkv.weight.data[8:, :, 0, 0] = torch.eye(4)
    block.proj.weight.data[:, :, 0, 0] = torch.eye(4)
    block.proj.bias.data.zero_()
    x = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(block(x), x + x.mean(dim=(2, 3), keepdim=True))


def test_attention_is_in_the_coarsest_level_and_in_the_middle_alone() -> None:
    sizes = (8, (1, 1, 2), 4, 2, 1, "none")
    for network in (Encoder(*sizes, use_attention=True), Decoder(*sizes, use_attention=True)):
        init_weights(network, torch.Generator().manual_seed(3))
        places = {name for name, module in network.named_modules() if isinstance(module, AttentionBlock)}
        coarsest = 2 if isinstance(network, Encoder) else 0
        assert places == {f"levels.{coarsest}.attentions.0", f"levels.{coarsest}.attentions.1", "middle.1"}
    image = torch.zeros(1, 3, 16, 16)
    assert Encoder(*sizes, use_attention=True)(image).shape == (1, 4, 4, 4)


def test_without_attention_the_names_are_those_of_before() -> None:
    names = set(Encoder(8, (1, 2), 4, 1, 1, "none").state_dict())
    assert "levels.1.blocks.0.shortcut.weight" in names
    assert "middle.1.conv2.bias" in names
    assert not any("attention" in name for name in names)
