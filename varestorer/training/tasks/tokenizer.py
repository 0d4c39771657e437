"""Stage 1: the tokenizer learns to reconstruct photographs through its bits (BSQ-VAE) or codes (VQ-VAE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varestorer.losses.adversarial import Adversarial, Adversary
from varestorer.losses.perceptual import perceptual_loss
from varestorer.losses.pixel import l1_loss, mse_loss
from varestorer.systems.base import System
from varestorer.tokenizer.quantizer import TokenPyramid, code_counts, perplexity, used_share, vq_losses
from varestorer.training.task import Batch, Task, train_only, weighted_sum
from varestorer.utils.images import to_network
from varestorer.utils.seeds import numpy_generator


@dataclass(frozen=True)
class TokenizerWeights:
    """Weights of the parts of the loss.

    Attributes:
        l1: absolute error of the image in [-1, 1].
        mse: squared error of it.
        perceptual: of the perceptual loss.
        commitment: squared distance of the features from the codes they became.
        entropy: of (mean entropy of each soft bit - entropy of each bit's mean): decided, evenly used bits.
        vq: of the loss that draws a learned codebook and the features together at every scale (VAR), see `vq_losses`;
            it has the commitment in it.
    """

    l1: float = 0.0
    mse: float = 1.0
    perceptual: float = 0.1
    commitment: float = 0.25
    entropy: float = 0.0
    vq: float = 0.0


class TokenizerTask(Task):
    """Reconstruction through the multi-scale bits, gradients straight through.

    Args:
        system: holds the tokenizer.
        weights: arguments of `TokenizerWeights`.
        perceptual: see `losses.perceptual.perceptual_loss`.
        continuous_steps: first steps without quantization; the network learns to reconstruct before it has to spend
            its features on bits.
        adversarial: arguments of `losses.adversarial.Adversarial`.
        scale_drop: share of steps that decode the sum of the first scales alone, of a random number of them.
        log_each_bit: report the usage of every bit, not of the scales alone.
        seed: of the discriminator's first weights.
    """

    shows_lq = False

    def __init__(
        self,
        system: System,
        weights: dict[str, float] | None = None,
        perceptual: str = "ms_ssim",
        continuous_steps: int = 0,
        adversarial: dict[str, float | int] | None = None,
        scale_drop: float = 0.0,
        log_each_bit: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.system = system
        self.weights = TokenizerWeights(**(weights or {}))
        self.perceptual = perceptual_loss(perceptual)
        self.continuous_steps = continuous_steps
        options = Adversarial(**(adversarial or {}))  # type: ignore[arg-type]
        self.adversary = Adversary(options, seed) if options.weight else None
        self.log_each_bit = log_each_bit
        self.scale_drop, self.seed = scale_drop, seed
        trained = [system.tokenizer] if self.adversary is None else [system.tokenizer, self.adversary]
        train_only(self, nn.ModuleList(trained).parameters())

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        tokenizer = self.system.tokenizer
        target = to_network(batch["hq"])
        with self.watch("encode"):
            features = tokenizer.features(target)
        with self.watch("quantize"):
            pyramid = tokenizer.quantizer(features.detach(), self.system.schedule)
            is_continuous = self.training and step <= self.continuous_steps
            total = pyramid.cumulative[self._num_scales(step) - 1]
            codes = features if is_continuous else features + (total - features).detach()
        with self.watch("decode"):
            image = tokenizer.decode(codes)
        with self.watch("losses"):
            parts = {
                "l1": l1_loss(image, target),
                "mse": mse_loss(image, target),
                "perceptual": self.perceptual(image, target),
                "commitment": mse_loss(features, pyramid.codes),
            }
            if self.weights.entropy or not tokenizer.config.vocabulary:
                decided, used = tokenizer.quantizer.codebook.entropy_terms(features)
                parts["entropy"] = decided - used
            if tokenizer.config.vocabulary:
                parts["vq"] = vq_losses(features, pyramid.cumulative).mean()
            loss = weighted_sum(self.weights, parts)
        if self.adversary is not None and self.training:
            with self.watch("adversary"):
                reconstruction = weighted_sum(self.weights, {name: parts[name] for name in ("l1", "mse", "perceptual")})
                parts |= self.adversary(image, target, reconstruction, tokenizer.decoder.conv_out.weight, step)
            loss = loss + parts["adversarial"]
        return {"loss": loss, **parts, **self._usage(pyramid)}

    def _num_scales(self, step: int) -> int:
        """How many scales are decoded in this step."""
        whole = len(self.system.schedule)
        if not (self.training and self.scale_drop):
            return whole
        draws = numpy_generator(self.seed, "scale drop", step)
        return int(draws.integers(1, whole + 1)) if draws.random() < self.scale_drop else whole

    def _usage(self, pyramid: TokenPyramid) -> dict[str, Tensor]:
        """`bit_usage`; of each scale `usage_<scale>`, and if asked for of each bit `bit_<number>`.

        Of a codebook `code_usage`, the share of its codes that the batch uses, `perplexity`, and the share by scale.
        """
        if vocabulary := self.system.tokenizer.config.vocabulary:
            counts_KV = code_counts(pyramid.indices, vocabulary)
            shares_K, together_1V = used_share(counts_KV), counts_KV.sum(dim=0, keepdim=True)
            named = {f"usage_{k}": share for k, share in enumerate(shares_K)}
            return {"code_usage": used_share(together_1V)[0], "perplexity": perplexity(together_1V)[0], **named}
        usage_KZ = bit_usage(pyramid.indices)
        named = {f"usage_{k}": usage for k, usage in enumerate(usage_KZ.mean(dim=1))}
        if self.log_each_bit:
            named |= {f"bit_{z}": usage for z, usage in enumerate(usage_KZ.mean(dim=0))}
        return {"bit_usage": usage_KZ.mean(), **named}

    def restored(self, batch: Batch) -> dict[str, Tensor]:
        """HQ, reconstructed through the bits."""
        return {"tokenizer": self.system.decode(self.system.encode(batch["hq"]).codes)}


def bit_usage(bits_per_scale: Sequence[Tensor]) -> Tensor:
    """How evenly each bit of each scale is used: the entropy of its mean over the batch, (K, Z), from 0 to 1.

    A scale of few tokens needs a large batch to show it: one sample's only token uses each bit in one way.
    """
    ones_KZ = torch.stack([bits.float().mean(dim=(0, 2, 3)) for bits in bits_per_scale]).clamp(1e-6, 1 - 1e-6)
    return -(ones_KZ * ones_KZ.log2() + (1 - ones_KZ) * (1 - ones_KZ).log2())
