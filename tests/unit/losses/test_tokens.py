"""Losses on bits against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from varestorer.losses.tokens import distribution_matching_loss, token_weights
from varestorer.tokenizer import ScaleSchedule
from varestorer.transformer.heads import BitHead, CodeHead

SCHEDULE = ScaleSchedule.build(sides=[1, 2])
HEAD = BitHead(1, 3)


def two_way(probability: float) -> torch.Tensor:
    """Logits (1, 5, 3, 2) whose bits are 1 with this probability."""
    pair = torch.tensor([math.log(1 - probability), math.log(probability)])
    return pair.expand(1, 5, 3, 2).clone()


def kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def test_kl_equals_the_closed_form_summed_over_scales() -> None:
    teacher, student = two_way(0.8), two_way(0.3)
    assert distribution_matching_loss(teacher, student, SCHEDULE, HEAD).item() == pytest.approx(
        2 * kl(0.8, 0.3), abs=1e-5
    )
    reverse = distribution_matching_loss(teacher, student, SCHEDULE, HEAD, direction="reverse")
    assert reverse.item() == pytest.approx(2 * kl(0.3, 0.8), abs=1e-5)
    by_token = distribution_matching_loss(teacher, student, SCHEDULE, HEAD, reduction="token")
    assert by_token.item() == pytest.approx(kl(0.8, 0.3), abs=1e-5)


def test_scales_count_alike_however_many_tokens_they_have() -> None:
    teacher, student = two_way(0.5), two_way(0.5)
    student[:, 0] = two_way(0.9)[:, 0]  # the single token of the first scale
    loss = distribution_matching_loss(teacher, student, SCHEDULE, HEAD)
    assert loss.item() == pytest.approx(kl(0.5, 0.9), abs=1e-5)


def test_kl_gradient_is_the_difference_of_probabilities() -> None:
    teacher, student = two_way(0.8), two_way(0.3).requires_grad_()
    distribution_matching_loss(teacher, student, SCHEDULE, HEAD).backward()
    assert student.grad is not None
    assert student.grad[0, 0, 0].tolist() == pytest.approx([0.5 / 3, -0.5 / 3], abs=1e-5)
    assert student.grad[0, 1, 0].tolist() == pytest.approx([0.5 / 12, -0.5 / 12], abs=1e-5)


def test_temperature_softens_both_sides() -> None:
    teacher, student = two_way(0.9), two_way(0.2)
    warm = distribution_matching_loss(teacher, student, SCHEDULE, HEAD, temperature=2.0)
    p, q = torch.sigmoid(torch.tensor([math.log(9.0) / 2, math.log(0.25) / 2])).tolist()
    assert warm.item() == pytest.approx(2 * kl(p, q), abs=1e-5)


def test_no_gradient_reaches_the_teacher() -> None:
    teacher, student = two_way(0.8).requires_grad_(), two_way(0.3).requires_grad_()
    distribution_matching_loss(teacher, student, SCHEDULE, HEAD).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("wrong", [{"direction": "both"}, {"reduction": "mean"}])
def test_unknown_options_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        distribution_matching_loss(two_way(0.5), two_way(0.5), SCHEDULE, HEAD, **wrong)


def test_bit_cross_entropy_equals_the_two_way_cross_entropy() -> None:
    logits = torch.randn(2, 5, 3, 2, generator=torch.Generator().manual_seed(0))
    bits = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(1)) > 0.5
    expected = F.cross_entropy(logits.flatten(0, 2), bits.long().flatten(), reduction="none").view(2, 5, 3).mean(-1)
    assert torch.allclose(HEAD.cross_entropy(logits, bits), expected, atol=1e-6)


def test_token_weights_follow_the_square_root_of_areas() -> None:
    weights = token_weights(SCHEDULE)
    assert weights.sum().item() == pytest.approx(1.0)
    assert (weights[0] / weights[1]).item() == pytest.approx(2.0)  # sqrt(4 / 1)
    assert token_weights(SCHEDULE, reweight_by_scale=False).tolist() == pytest.approx([0.2] * 5)


def test_bit_accuracy_counts_the_likelier_value() -> None:
    bits = torch.ones(1, 5, 3, dtype=torch.bool)
    bits[0, 0, 0] = False
    assert HEAD.accuracy(two_way(0.7), bits)[0].tolist() == pytest.approx([2 / 3, 1, 1, 1, 1])


def test_codes_cost_the_logarithm_of_their_probability() -> None:
    probability = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]])
    head, codes = CodeHead(1, 3), torch.tensor([[1, 2]])
    losses = head.cross_entropy(probability.log().bfloat16(), codes)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, -torch.tensor([[0.25, 0.7]]).log(), atol=1e-2, rtol=0)
    assert head.accuracy(probability.log(), codes).tolist() == [[0.0, 1.0]]
