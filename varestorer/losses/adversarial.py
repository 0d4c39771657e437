"""A discriminator of patches and its game (pix2pix, arXiv 1611.07004; VQGAN, arXiv 2012.09841, equations 6 and 7).

Shapes: `B` batch, `H W` pixels, `h w` patches; images in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varestorer.utils.errors import UserError
from varestorer.utils.seeds import torch_generator

LARGEST_WEIGHT = 1e4
DISCRIMINATOR_FACTOR = 0.01
"""On the discriminator's own loss: Adam steps are the same with any, but gradients are clipped by the norm over all of
them, and without it the discriminator's, which are some thirty times larger, leave the network next to nothing."""


class PatchDiscriminator(nn.Module):
    """Says of every patch of an image how real it looks: above 0 for photographs.

    Group norm, unlike pix2pix's batch norm, keeps no running averages and does not mix the images of a batch.

    Args:
        channels: of the first convolution, a multiple of 8; each further one doubles them, up to 8 times as many.
        layers: convolutions of stride 2; 3 see patches of 70 pixels.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**number, 8) for number in range(layers + 1)]
        stages: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for number in range(1, layers + 1):
            stride = 2 if number < layers else 1
            stages.append(nn.Conv2d(widths[number - 1], widths[number], 4, stride=stride, padding=1))
            stages += [nn.GroupNorm(8, widths[number]), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*stages, nn.Conv2d(widths[-1], 1, 4, padding=1))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random convolutions of standard deviation 0.02, as pix2pix draws them."""
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                layer.weight.normal_(std=0.02, generator=generator)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Scores of the patches, (B, 1, h, w)."""
        return self.layers(image_B3HW)


def frozen_scores(discriminator: nn.Module, image_B3HW: Tensor) -> Tensor:
    """The discriminator's scores, with gradients for the image alone and none for its weights."""
    weights = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    return torch.func.functional_call(discriminator, weights, (image_B3HW,))


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: scores of photographs should be above 1, those of reconstructions below -1."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Ratio of the norms of two scalar losses' gradients at a layer, so that neither drowns the other there.

    The layer's weight is one that both depend on, the decoder's last. A scalar without gradient, at most
    `LARGEST_WEIGHT`.
    """
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    ]
    return (norms[0] / (norms[1] + 1e-6)).clamp(max=LARGEST_WEIGHT).detach()


@dataclass(frozen=True)
class Adversarial:
    """How a discriminator takes part.

    Attributes:
        weight: of the adversarial loss, times the adaptive weight (see `adaptive_weight`); 0: there
            is no discriminator.
        start_step: first step in which the network listens to the discriminator, which learns from the first on.
        channels: of the discriminator's first convolution.
        layers: its convolutions of stride 2.
    """

    weight: float = 0.0
    start_step: int = 1
    channels: int = 64
    layers: int = 3

    def __post_init__(self) -> None:
        if self.channels < 8 or self.channels % 8 or self.layers < 1:
            got = f"{self.channels} and {self.layers}"
            raise UserError(f"adversarial.channels must be a multiple of 8 and adversarial.layers 1 or more, got {got}")


class Adversary(nn.Module):
    """The discriminator and both sides of its game as one sum of losses.

    The discriminator's loss sees the reconstruction detached, the network's loss sees the discriminator's weights
    detached. So no gradient of one reaches the other, and one backward pass and one optimizer make the same step as two
    of each (Adam treats every weight alone); both share learning rate and schedule. Clipping alone joins them, see
    `DISCRIMINATOR_FACTOR`. The adaptive weight is of a micro-batch, not of each sample.

    Args:
        options: see `Adversarial`.
        seed: of the discriminator's first weights.
    """

    def __init__(self, options: Adversarial, seed: int = 0) -> None:
        super().__init__()
        self.options = options
        self.discriminator = PatchDiscriminator(options.channels, options.layers)
        self.discriminator.init_weights(torch_generator(seed, "discriminator"))

    def forward(
        self, image_B3HW: Tensor, target_B3HW: Tensor, reconstruction: Tensor, last_layer: Tensor, step: int
    ) -> dict[str, Tensor]:
        """Scalars: `adversarial`, to be added to the loss; `discriminator`, its part that trains the discriminator.

        From `start_step` on also `realism`, the mean score of the reconstruction, and `adaptive_weight`.

        Args:
            image_B3HW: the reconstruction, with gradients.
            target_B3HW: the photographs.
            reconstruction: the scalar loss that the adversarial one is weighed against.
            last_layer: the decoder's last weight.
            step: the optimizer step being taken, from 1.
        """
        own = hinge_loss(self.discriminator(target_B3HW), self.discriminator(image_B3HW.detach()))
        if step < self.options.start_step:
            return {"adversarial": DISCRIMINATOR_FACTOR * own, "discriminator": own}
        realism = frozen_scores(self.discriminator, image_B3HW).float().mean()
        weight = adaptive_weight(reconstruction, -realism, last_layer)
        total = DISCRIMINATOR_FACTOR * own - self.options.weight * weight * realism
        return {"adversarial": total, "discriminator": own, "realism": realism, "adaptive_weight": weight}
