"""Stage 1: the tokenizer learns to reconstruct photographs through its bits (BSQ-VAE; spec A)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varestorer.losses.build import perceptual_loss
from varestorer.losses.pixel import l1_loss, mse_loss
from varestorer.systems.varestorer import VARestorer
from varestorer.tokenizer.residual import TokenPyramid
from varestorer.training.task import Batch, Task, train_only
from varestorer.utils.images import to_network


@dataclass(frozen=True)
class TokenizerWeights:
    """Weights of the parts of the loss.

    Attributes:
        l1: absolute error of the image in [-1, 1].
        mse: squared error of it.
        perceptual: of the perceptual loss.
        commitment: squared distance of the features from the codes they became.
        entropy: of (mean entropy of each soft bit - entropy of each bit's mean): decided, evenly used bits.
    """

    l1: float = 0.0
    mse: float = 1.0
    perceptual: float = 0.1
    commitment: float = 0.25
    entropy: float = 0.0


class TokenizerTask(Task):
    """Reconstruction through the multi-scale bits, gradients straight through.

    Args:
        system: holds the tokenizer.
        weights: arguments of `TokenizerWeights`.
        perceptual: see `losses.build.perceptual_loss`; "features" would be the encoder that is being trained, so it
            is not offered here.
        continuous_steps: first steps without quantisation; the network learns to reconstruct before it has to spend
            its features on bits.
    """

    def __init__(
        self,
        system: VARestorer,
        weights: dict[str, float] | None = None,
        perceptual: str = "ms_ssim",
        continuous_steps: int = 0,
    ) -> None:
        super().__init__()
        if perceptual == "features":
            raise ValueError("perceptual=features needs a frozen encoder; take lpips or ms_ssim for the tokenizer")
        self.system = system
        self.weights = TokenizerWeights(**(weights or {}))
        self.perceptual = perceptual_loss(perceptual, system.tokenizer.encoder.features)
        if isinstance(self.perceptual, nn.Module):
            self.perceptual.requires_grad_(False)
        self.continuous_steps = continuous_steps
        train_only(self, system.tokenizer.parameters())

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        tokenizer = self.system.tokenizer
        target = to_network(batch["hq"])
        features = tokenizer.features(target)
        pyramid = tokenizer.quantizer(features.detach(), self.system.schedule)
        codes = features if step <= self.continuous_steps else features + (pyramid.codes - features).detach()
        image = tokenizer.decode(codes)
        decided, used = tokenizer.quantizer.quantiser.entropy_terms(features)
        parts = {
            "l1": l1_loss(image, target),
            "mse": mse_loss(image, target),
            "perceptual": self.perceptual(image, target),
            "commitment": mse_loss(features, pyramid.codes),
            "entropy": decided - used,
        }
        loss = torch.stack([getattr(self.weights, name) * value for name, value in parts.items()]).sum()
        return {"loss": loss, **parts, "bit_usage": bit_usage(pyramid)}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """HQ beside its reconstruction through the bits."""
        return {"tokenizer": self.system.decode(self.system.encode(batch["hq"]).codes), "HQ": batch["hq"]}


def bit_usage(pyramid: TokenPyramid) -> Tensor:
    """How evenly the bits are used over a batch: mean over bits and scales of the entropy of a bit's mean, 0 to 1."""
    entropies = []
    for bits in pyramid.indices:
        ones = bits.float().mean(dim=(0, 2, 3)).clamp(1e-6, 1 - 1e-6)
        entropies.append(-(ones * ones.log2() + (1 - ones) * (1 - ones).log2()).mean())
    return torch.stack(entropies).mean()
