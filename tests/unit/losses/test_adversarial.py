"""The patch discriminator's losses against closed forms, and who gets gradients of which."""

import pytest
import torch
from torch import nn

from varestorer.losses.adversarial import (
    DISCRIMINATOR_FACTOR,
    LARGEST_WEIGHT,
    Adversarial,
    Adversary,
    PatchDiscriminator,
    adaptive_weight,
    frozen_scores,
    hinge_loss,
)
from varestorer.utils.errors import UserError
from varestorer.utils.seeds import torch_generator


def images(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch_generator(seed)) * 2 - 1


def small() -> PatchDiscriminator:
    discriminator = PatchDiscriminator(channels=8, layers=2)
    discriminator.init_weights(torch_generator(0))
    return discriminator


def test_scores_are_of_patches_and_do_not_mix_images() -> None:
    discriminator = small()
    both = discriminator(images(0))
    assert both.shape == (2, 1, 6, 6)
    assert torch.allclose(both[1:], discriminator(images(0)[1:]), atol=1e-6)
    assert PatchDiscriminator(8, 3)(images(0)).shape == (2, 1, 2, 2)
    assert not list(discriminator.buffers())  # nothing that a checkpoint of parameters would miss


def test_hinge_loss_is_the_closed_form() -> None:
    real, fake = torch.tensor([0.5, 3.0]), torch.tensor([-2.0, 0.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * ((0.5 + 0.0) / 2 + (0.0 + 1.0) / 2))


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    reconstruction, adversarial = weight.square().sum() / 2, (0.1 * weight).sum()  # gradients (3, 4) and (0.1, 0.1)
    ratio = adaptive_weight(reconstruction, adversarial, weight)
    assert ratio.item() == pytest.approx(5 / (0.1 * 2**0.5), rel=1e-4)
    assert not ratio.requires_grad
    assert weight.grad is None
    assert adaptive_weight(reconstruction, 0 * adversarial, weight).item() == LARGEST_WEIGHT


def test_frozen_scores_are_the_scores_without_gradients_for_the_weights() -> None:
    discriminator, image = small(), images(1).requires_grad_()
    scores = frozen_scores(discriminator, image)
    assert torch.equal(scores, discriminator(image))
    scores.mean().backward()
    assert image.grad is not None and image.grad.any()
    assert all(p.grad is None for p in discriminator.parameters())


def game(start_step: int = 1, weight: float = 0.5) -> tuple[Adversary, nn.Conv2d]:
    adversary = Adversary(Adversarial(weight, start_step, channels=8, layers=2), seed=3)
    network = nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        network.weight.copy_(torch.eye(3)[:, :, None, None] * 0.5)
    return adversary, network


def test_each_side_learns_from_its_own_loss_alone() -> None:
    """One backward pass of the sum gives both sides the gradients that two separate passes give."""
    adversary, network = game()
    target = images(2)

    def losses() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        image = network(target)
        reconstruction = (image - target).square().mean()
        return adversary(image, target, reconstruction, network.weight, 1), image

    parts, _ = losses()
    parts["adversarial"].backward()
    together = {name: p.grad.clone() for name, p in adversary.named_parameters()}  # type: ignore[union-attr]
    of_network = network.weight.grad.clone()  # type: ignore[union-attr]
    adversary.zero_grad(), network.zero_grad()

    image = network(target)
    own = hinge_loss(adversary.discriminator(target), adversary.discriminator(image.detach()))
    (DISCRIMINATOR_FACTOR * own).backward()
    assert network.weight.grad is None
    for name, parameter in adversary.named_parameters():
        assert torch.allclose(parameter.grad, together[name], atol=1e-7)  # type: ignore[arg-type]

    parts, image = losses()
    expected = -0.5 * parts["adaptive_weight"] * adversary.discriminator(image).mean()
    (gradient,) = torch.autograd.grad(expected, network.weight)
    assert torch.allclose(of_network, gradient, atol=1e-6)
    assert gradient.any()


def test_before_the_start_only_the_discriminator_learns() -> None:
    adversary, network = game(start_step=5)
    target = images(2)
    image = network(target)
    parts = adversary(image, target, (image - target).square().mean(), network.weight, 4)
    assert parts.keys() == {"adversarial", "discriminator"}
    parts["adversarial"].backward()
    assert network.weight.grad is None
    assert all(p.grad is not None and p.grad.any() for n, p in adversary.named_parameters() if n.endswith("weight"))
    image = network(target)
    assert "realism" in adversary(image, target, (image - target).square().mean(), network.weight, 5)


def test_the_first_weights_follow_the_seed() -> None:
    options = Adversarial(1.0, channels=8)
    first = [next(Adversary(options, seed).parameters()) for seed in (0, 0, 1)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(UserError, match=r"adversarial\.channels must be a multiple of 8 .* got 12 and 3"):
        Adversarial(channels=12)
