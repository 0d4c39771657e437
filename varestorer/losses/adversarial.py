"""A discriminator of patches and its losses (pix2pix, arXiv 1611.07004; VQGAN, arXiv 2012.09841, equations 6 and 7).

Shapes: `B` batch, `H W` pixels, `h w` patches; images in [-1, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST_WEIGHT = 1e4


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
    """Ratio of the norms of two losses' gradients at a layer, so that neither drowns the other there.

    Args:
        reconstruction: scalar loss that the layer had before.
        adversarial: scalar loss that is to weigh as much.
        last_layer: weight that both depend on, the decoder's last.
    Returns:
        A scalar without gradient, at most `LARGEST_WEIGHT`.
    """
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    ]
    return (norms[0] / (norms[1] + 1e-6)).clamp(max=LARGEST_WEIGHT).detach()
