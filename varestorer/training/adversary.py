"""A discriminator that trains in the same backward pass as the network it judges.

Shapes: `B` batch, `H W` pixels; images in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from varestorer.losses.adversarial import PatchDiscriminator, adaptive_weight, frozen_scores, hinge_loss
from varestorer.utils.errors import UserError
from varestorer.utils.seeds import torch_generator

DISCRIMINATOR_FACTOR = 0.01
"""On the discriminator's own loss: Adam steps are the same with any, but gradients are clipped by the norm over all of
them, and without it the discriminator's, which are some thirty times larger, leave the network next to nothing."""


@dataclass(frozen=True)
class Adversarial:
    """How a discriminator takes part.

    Attributes:
        weight: of the adversarial loss, times the adaptive weight (see `losses.adversarial.adaptive_weight`); 0: there
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
