"""Stage 2: the scale-causal teacher learns to predict each scale's bits from the coarser ones (Infinity)."""

from __future__ import annotations

import torch
from torch import Tensor

from varestorer.losses.tokens import token_weights
from varestorer.systems.varestorer import VARestorer
from varestorer.tokenizer import TokenPyramid
from varestorer.tokenizer.quantizer import Corruption
from varestorer.training.task import Batch, Task, train_only
from varestorer.training.text import prompts_of
from varestorer.transformer import ClassLabels, TextFeatures
from varestorer.transformer.adapters import adapter_parameters
from varestorer.transformer.drop_path import branch_factors, dropped_paths
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
        factors = self._branch_factors(keys, step)
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

    def _branch_factors(self, keys: Tensor, step: int) -> Tensor | None:
        """What drop path makes of each sample's branches in this step, (B, D, 3); None where it is off."""
        if not (self.training and self.drop_path):
            return None
        transformer = self.system.transformer
        shape = (transformer.config.depth, 3)
        draws = uniform_per_sample(shape, self.seed, keys, f"drop path/{step}", transformer.start.device)
        return branch_factors(draws, self.drop_path)

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
