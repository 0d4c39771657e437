"""H-VAR's two stages: the tokenizer learns its hierarchy of sizes, then the transformer restores and prefers.

Shapes: `B` batch, `H W` pixels, `L` tokens of all scales, `K` scales, `Z` latent width, `h w` latent positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varestorer.losses.perceptual import perceptual_loss
from varestorer.losses.pixel import l1_loss, mse_loss
from varestorer.losses.tokens import log_likelihood, preference_loss
from varestorer.systems.hvar import HVAR
from varestorer.tokenizer.quantizer import code_counts, perplexity, used_share
from varestorer.training.task import Batch, Task, train_only, weighted_sum
from varestorer.transformer.generation import Prefix
from varestorer.utils.errors import UserError
from varestorer.utils.images import from_network, to_network
from varestorer.utils.seeds import uniform_per_sample


@dataclass(frozen=True)
class HierarchyWeights:
    """Weights of the parts of the tokenizer's loss; the defaults are H-VAR's.

    Attributes:
        l1: absolute error of the images in [-1, 1].
        mse: squared error of them.
        perceptual: of the perceptual loss.
        codebook: squared distance of the codes from the residuals that they stand for; moves the codes alone.
        commitment: squared distance of the features from the codes they became; moves the encoder, if it trains.
    """

    l1: float = 0.0
    mse: float = 1.0
    perceptual: float = 5.0
    codebook: float = 1.0
    commitment: float = 0.0


class NestedTask(Task):
    """What both stages share: pictures of all sizes, each scored against HQ of its size; `psnr_64` is of 64 pixels."""

    system: HVAR

    def at_all_sizes(self, indices: list[Tensor]) -> dict[str, Tensor]:
        """Images of the tokens, smallest first, by their size."""
        return {f"{x.shape[-1]} pixels": x for x in self.system.decode_sides(indices, self.system.sides)}

    def compared(self, batch: Batch, restored: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """The largest has the plain names."""
        hq = self.system.tokenizer.reduced(to_network(batch["hq"]), self.system.nested)
        pairs = [(x, from_network(target)) for x, target in zip(restored.values(), hq, strict=True)]
        return {"" if x.shape == batch["hq"].shape else f"_{x.shape[-1]}": (x, target) for x, target in pairs}


class HVARTokenizerTask(NestedTask):
    """Reconstruction at every target size, each from the tokens up to it; some samples pass without quantization.

    Args:
        system: holds the tokenizer.
        weights: arguments of `HierarchyWeights`. Losses of images are means over the sizes.
        perceptual: see `losses.perceptual.perceptual_loss`.
        skip: share of samples that are decoded from the features themselves (HART), drawn once for all sizes.
        trained: parts that train: "vocabulary", "phi", "decoder" (with the convolution before it) and "encoder" (with
            the one behind it). The paper keeps the encoder, which also makes the prefix. With a frozen decoder a
            skipped sample trains nothing.
        seed: of the skips.
    Raises:
        UserError: an unknown part, or a share that is none.
    """

    shows_lq = False

    def __init__(
        self,
        system: HVAR,
        weights: dict[str, float] | None = None,
        perceptual: str = "lpips-vgg",
        skip: float = 0.5,
        trained: Sequence[str] = ("vocabulary", "phi", "decoder"),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.system = system
        self.weights = HierarchyWeights(**(weights or {}))
        self.perceptual = perceptual_loss(perceptual) if self.weights.perceptual else None
        self.skip = skip
        self.seed = seed
        if not 0 <= skip <= 1:
            raise UserError(f"the tokenizer's skip must be from 0 to 1, got {skip}")
        tokenizer = system.tokenizer
        parts: dict[str, list[nn.Module | None]] = {
            "vocabulary": [tokenizer.quantizer.codebook],
            "phi": [tokenizer.quantizer.phi],
            "decoder": [tokenizer.post_quant_conv, tokenizer.decoder],
            "encoder": [tokenizer.encoder, tokenizer.quant_conv],
        }
        if not trained or not set(trained) <= parts.keys():
            raise UserError(f"the tokenizer's trained parts must be of {', '.join(parts)}, got {list(trained)}")
        self.trains_encoder = "encoder" in trained
        modules = [module for part in trained for module in parts[part] if module is not None]
        train_only(self, [p for module in modules for p in module.parameters()])

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        tokenizer, schedule = self.system.tokenizer, self.system.schedule
        images = tokenizer.reduced(to_network(batch["hq"]), schedule)
        with self.watch("encode"), torch.set_grad_enabled(self.trains_encoder and torch.is_grad_enabled()):
            features = [tokenizer.features(image) for image in images]
        with self.watch("quantize"):
            pyramid = tokenizer.quantizer([x.detach() for x in features], schedule)
            sums = [codes for k, codes in enumerate(pyramid.cumulative) if schedule.ends_target(k)]
            # the gradient goes to the codes, and straight through to an encoder that trains
            quantized = [codes + (x - x.detach()) for codes, x in zip(sums, features, strict=True)]
        is_skipped_B = self._skipped(batch["key"], step)[:, None, None, None]
        losses: list[dict[str, Tensor]] = []
        for latents, x, image in zip(quantized, features, images, strict=True):
            with self.watch("decode"):
                decoded = tokenizer.decode(torch.where(is_skipped_B, x, latents))
            with self.watch("losses"):
                losses.append(self._compare(decoded, image))
        parts = {name: torch.stack([found[name] for found in losses]).mean() for name in losses[0]}
        parts["codebook"] = tokenizer.quantizer.codebook_losses(features, pyramid, schedule).mean()
        pairs = zip(features, sums, strict=True)
        parts["commitment"] = torch.stack([mse_loss(x, codes.detach()) for x, codes in pairs]).mean()
        loss = weighted_sum(self.weights, parts)
        by_size = {f"mse_{image.shape[-1]}": found["mse"].detach() for image, found in zip(images, losses, strict=True)}
        return {"loss": loss, **parts, **by_size, **self._usage(pyramid.indices)}

    def _skipped(self, keys: Tensor, step: int) -> Tensor:
        """Which samples are not quantized, (B,) bool; none outside training."""
        draws_B = uniform_per_sample((), self.seed, keys, f"skip/{step}", self.system.device)
        return draws_B < (self.skip if self.training else 0.0)

    def _compare(self, decoded_B3HW: Tensor, image_B3HW: Tensor) -> dict[str, Tensor]:
        losses = {"l1": l1_loss(decoded_B3HW, image_B3HW), "mse": mse_loss(decoded_B3HW, image_B3HW)}
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(decoded_B3HW, image_B3HW)
        return losses

    def _usage(self, indices: Sequence[Tensor]) -> dict[str, Tensor]:
        """Of each scale the share of codes that the batch uses, and how many evenly used ones that is worth."""
        counts_KV = code_counts(indices, self.system.tokenizer.config.vocabulary)
        named = {f"usage_{k}": share for k, share in enumerate(used_share(counts_KV))}
        return named | {f"perplexity_{k}": worth for k, worth in enumerate(perplexity(counts_KV))}

    def restored(self, batch: Batch) -> dict[str, Tensor]:
        """HQ, reconstructed at every size."""
        return self.at_all_sizes([*self.system.encode(batch["hq"]).indices])


class HVARTask(NestedTask):
    """Teacher-forced cross entropy of the photograph's tokens, and preference of them over the degraded image's own.

    Both sequences are read in one batch behind the same prefix, and the gradient goes through both.

    Args:
        system: the tokenizer (frozen) and the transformer.
        preference: weight of the preference loss; 0 leaves it out, and the second sequence with it.
        beta: of the preference: small ones leave it almost constant, large ones make it unstable.
        likelihood: "mean" or "sum" over the tokens, see `losses.tokens.log_likelihood`.
        checkpoint_activations: compute the blocks again in the backward pass, for less memory.
    """

    def __init__(
        self,
        system: HVAR,
        preference: float = 1.0,
        beta: float = 0.2,
        likelihood: str = "mean",
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.system = system
        self.preference = preference
        self.beta = beta
        self.likelihood = likelihood
        system.transformer.checkpoint_activations = checkpoint_activations
        train_only(self, system.transformer.parameters())

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        system, head = self.system, self.system.transformer.head
        images = [batch["hq"], batch["lq"]] if self.preference else [batch["hq"]]
        with self.watch("tokens"), torch.no_grad():
            pyramid = system.encode(torch.cat(images))
            inputs, labels = pyramid.inputs(), pyramid.labels()
        with self.watch("transformer forward"):
            prefix = system.prefix_of(batch["lq"])
            prefix = Prefix(prefix.tokens_BPC.repeat(len(images), 1, 1), prefix.size)
            logits = system.logits(inputs, prefix).chunk(len(images))
        with self.watch("losses"):
            labels_hq, *labels_lq = labels.chunk(len(images))
            loss_BL = head.cross_entropy(logits[0], labels_hq)
            accuracy_BL = head.accuracy(logits[0].detach(), labels_hq)
            parts = {"cross_entropy": loss_BL.mean(), "accuracy": accuracy_BL.mean()}
            loss = parts["cross_entropy"]
            if labels_lq:
                chosen, rejected = (
                    log_likelihood(head, x, tokens, self.likelihood)
                    for x, tokens in zip(logits, (labels_hq, labels_lq[0]), strict=True)
                )
                parts["preference"] = preference_loss(chosen, rejected, self.beta).mean()
                parts["margin"] = (chosen - rejected).detach().mean()
                parts["equal_tokens"] = (labels_hq == labels_lq[0]).float().mean()
                loss = loss + self.preference * parts["preference"]
        for k, tokens in enumerate(system.schedule.slices):
            parts[f"cross_entropy_{k}"] = loss_BL.detach()[:, tokens].mean()
        return {"loss": loss, **parts}

    def restored(self, batch: Batch) -> dict[str, Tensor]:
        """The degraded image restored to all sizes in one pass."""
        return self.at_all_sizes(self.system.generate(batch["lq"]).indices)
