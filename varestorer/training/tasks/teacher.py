"""Stage 2: the scale-causal teacher learns to predict each scale's bits from the coarser ones (Infinity).

And the same without distillation, from a prefix of degraded tokens (VARestorer, table 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from varestorer.losses.tokens import token_weights
from varestorer.systems.varestorer import VARestorer
from varestorer.tokenizer import TokenPyramid
from varestorer.tokenizer.quantizer import Corruption
from varestorer.training.task import Batch, Task, train_only
from varestorer.transformer import ClassLabels, TextFeatures
from varestorer.transformer.adapters import adapter_parameters
from varestorer.transformer.model import dropped_paths
from varestorer.utils.errors import UserError
from varestorer.utils.images import to_network
from varestorer.utils.seeds import uniform_per_sample


class TeacherTask(Task):
    """Teacher-forced cross entropy on bits, with bitwise self-correction.

    Args:
        system: holds tokenizer (frozen) and transformer; its adapters stay off and untrained.
        flip_strength: each scale of each sample flips its bits with a probability drawn from 0 to this; later scales
            then learn to mend the errors (Infinity, section 3.4: 0.3).
        condition_drop: share of prompts replaced by the learned null text.
        drop_path: probability with which a sample leaves out each branch of the last block, growing linearly from 0 in
            the first (Infinity: 0.1 from scratch).
        reweight_by_scale: weigh scales by sqrt(A_K / A_k), so that coarse ones count.
        checkpoint_activations: compute the blocks again in the backward pass, for less memory.
        seed: of flips and drops.
    Raises:
        UserError: a probability that is none.
    """

    def __init__(
        self,
        system: VARestorer,
        flip_strength: float = 0.3,
        condition_drop: float = 0.1,
        drop_path: float = 0.0,
        reweight_by_scale: bool = True,
        checkpoint_activations: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.system = system
        self.weights_L: Tensor
        self.flip_strength = flip_strength
        self.condition_drop = condition_drop
        self.drop_path = drop_path
        for name in ("flip_strength", "condition_drop", "drop_path"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"the teacher's {name} must be from 0 to 1, got {getattr(self, name)}")
        self.seed = seed
        system.transformer.checkpoint_activations = checkpoint_activations
        self.register_buffer("weights_L", token_weights(system.schedule, reweight_by_scale), persistent=False)
        adapters = {id(p) for p in adapter_parameters(system.transformer).values()}
        train_only(self, [p for p in system.transformer.parameters() if id(p) not in adapters])

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        system, keys = self.system, batch["key"]
        # drawn while the device has no work yet that the copies would wait for
        corrupt = self._flips(keys) if self.training else None
        factors = self.branch_factors(keys, step)
        text = prompts_of(batch, system, self.condition_drop if self.training else 0.0, self.seed)
        with self.watch("tokens"), torch.no_grad():
            pyramid = system.tokenizer.encode(to_network(batch["hq"]), system.schedule, corrupt)
        with self.watch("transformer forward"), dropped_paths(system.transformer, factors):
            logits = self.logits(pyramid, text, batch)
        with self.watch("cross entropy"):
            return self._losses(logits, pyramid.labels())

    def _losses(self, logits_BLZ2: Tensor, bits_BLZ: Tensor) -> dict[str, Tensor]:
        """Total, cross entropy (nats per bit) and accuracy of all tokens, and both of each scale."""
        head = self.system.transformer.head
        loss_BL = head.cross_entropy(logits_BLZ2, bits_BLZ)
        accuracy_BL = head.accuracy(logits_BLZ2.detach(), bits_BLZ)
        total = (loss_BL * self.weights_L).sum(dim=1).mean()
        loss_L, accuracy_L = loss_BL.detach().mean(dim=0), accuracy_BL.mean(dim=0)
        losses = {"loss": total, "cross_entropy": loss_L.mean(), "accuracy": accuracy_L.mean()}
        for k, tokens in enumerate(self.system.schedule.slices):
            losses[f"cross_entropy_{k}"] = loss_L[tokens].mean()
            losses[f"accuracy_{k}"] = accuracy_L[tokens].mean()
        return losses

    def logits(self, pyramid: TokenPyramid, text: TextFeatures | ClassLabels, batch: Batch) -> Tensor:
        """Logits (B, L, Z, 2) of every scale, given the true coarser ones."""
        return self.system.teacher_logits(pyramid, text)

    def _flips(self, keys: Tensor) -> Corruption:
        """Bit flips whose strength and place depend on sample and scale alone."""
        latent_width, device = self.system.tokenizer.config.latent_width, self.system.device
        draws_k = [
            uniform_per_sample((latent_width * count + 1,), self.seed, keys, f"flip/{number}", device)
            for number, count in enumerate(self.system.schedule.num_tokens_per_scale)
        ]

        def corrupt(scale_number: int, bits: Tensor) -> Tensor:
            draws = draws_k[scale_number]
            strength = draws[:, 0].view(-1, 1, 1, 1) * self.flip_strength
            return self.system.tokenizer.quantizer.codebook.flip(bits, draws[:, 1:].view(bits.shape), strength)

        return corrupt

    def restored(self, batch: Batch) -> dict[str, Tensor]:
        """The teacher going on from the coarse scales of the degraded image."""
        return {"multi-step": self.system.restore_batch(batch["lq"], steps="multi").images_B3HW}


def prompts_of(batch: Batch, system: VARestorer, condition_drop: float, seed: int) -> TextFeatures | ClassLabels:
    """Features of the batch's prompts, some replaced by the null text; the null text where there are no prompts.

    A dropped prompt becomes the null text of its length; a sample without a prompt gets all of the null text, as in
    restoring without a prompt.

    Args:
        batch: its optional entry "text" is a list of (T, E) features on any device, or None, one per sample.
        system: holds the learned null text.
        condition_drop: share of prompts that are dropped; which ones depends on seed and sample alone.
        seed: of the drops.
    Raises:
        UserError: features of another width than the model's.
    """
    keys = batch["key"]
    if system.transformer.config.num_classes:  # qualities instead of words, and what is restored to is good
        return ClassLabels(torch.zeros(len(keys), dtype=torch.int64, device=system.device))
    if "text" not in batch:
        return system.null_text(len(keys))
    null_TE = system.transformer.condition.null_features
    draws = uniform_per_sample((), seed, keys, "condition drop").tolist()
    chosen: list[Tensor] = []
    for text_TE, draw in zip(batch["text"], draws, strict=True):
        if text_TE is None:
            chosen.append(null_TE)
            continue
        if text_TE.shape[-1] != null_TE.shape[-1]:
            raise UserError(
                f"data.text holds features of width {text_TE.shape[-1]}, but the model wants {null_TE.shape[-1]}; make "
                "the folder again with the text encoder of this model (scripts/precompute_text.py text_encoder=...)"
            )
        # the null text gets a gradient, if only of zero, in every process: they wait for each other's
        prompt_TE = text_TE.to(null_TE) + 0 * null_TE.sum()
        chosen.append(null_TE[: len(text_TE)] if draw < condition_drop else prompt_TE)
    return TextFeatures.from_list(chosen)


class PrefixTask(TeacherTask):
    """Bit cross entropy on the photograph, the degraded image in front; only the adapters train.

    The system has `student.conditioning: prefix`; of a share `prefix_drop` of samples the prefix is hidden, so that
    guidance has something to compare with.
    """

    def __init__(self, system: VARestorer, prefix_drop: float = 0.1, **options: float | bool) -> None:
        if system.student_config.conditioning != "prefix":
            raise UserError("this stage trains the prefix; set model.student.conditioning=prefix")
        super().__init__(system, **options)  # type: ignore[arg-type]
        self.prefix_drop = prefix_drop
        train_only(self, adapter_parameters(system.transformer).values())

    def logits(self, pyramid: TokenPyramid, text: TextFeatures | ClassLabels, batch: Batch) -> Tensor:
        with torch.no_grad():
            lq_pyramid = self.system.condition(batch["lq"]).pyramid
        if not self.training:
            return self.system.prefix_logits(pyramid, lq_pyramid, text)
        draws = uniform_per_sample((), self.seed, batch["key"], "prefix drop", batch["lq"].device)
        return self.system.prefix_logits(pyramid, lq_pyramid, text, draws < self.prefix_drop)

    def restored(self, batch: Batch) -> dict[str, Tensor]:
        """The degraded image restored scale by scale."""
        return {"multi-step": self.system.restore_batch(batch["lq"]).images_B3HW}
