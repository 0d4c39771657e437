"""Vector quantization: nearest codes, the convolutions of the sums, VQ losses, usage, the autoencoder's attention."""

import pytest
import torch
from torch import Tensor

from varestorer.tokenizer.autoencoder import AttentionBlock, Decoder, Encoder, init_weights
from varestorer.tokenizer.quantizer import (
    CodebookQuantizer,
    Phi,
    code_counts,
    perplexity,
    phi_index,
    used_share,
    vq_losses,
)


def quantizer(codebook: Tensor) -> CodebookQuantizer:
    made = CodebookQuantizer(*codebook.shape)
    made.entries.data.copy_(codebook)
    return made


def at_positions(tokens: list[list[float]]) -> Tensor:
    """One image of one row of tokens."""
    return torch.tensor(tokens).T[None, :, None]


def test_the_nearest_code_is_found_by_distance_and_not_by_direction() -> None:
    codebook = torch.tensor([[1.0, 0.0], [10.0, 0.0], [0.0, 1.0]])
    found = quantizer(codebook).indices(at_positions([[2.0, 0.1], [9.0, 3.0], [0.1, 0.4]]))
    assert found.dtype == torch.int64
    assert found.tolist() == [[[0, 1, 2]]]


def test_of_equally_near_codes_the_first_is_taken() -> None:
    codebook = torch.tensor([[5.0, 5.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert quantizer(codebook).indices(at_positions([[0.0, 0.0], [1.0, 0.0]])).tolist() == [[[1, 1]]]


def test_autocast_does_not_blur_the_distances() -> None:
    codebook = torch.tensor([[1.0], [1.001]])
    with torch.autocast("cpu", torch.bfloat16):
        assert quantizer(codebook).indices(at_positions([[1.0009]])).item() == 1


def test_codes_give_back_the_vectors_and_mixtures_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    made = quantizer(torch.randn(5, 3, generator=generator))
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
    made = quantizer(torch.tensor([[100.0, 0.0], [0.0, 100.0]]))
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
