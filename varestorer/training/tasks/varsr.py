"""VARSR's transformer and refiner: codes given the true coarser ones, and what the last codes leave over.

One task serves both stages: restoration, where the class is the quality of the source, and class to image, without a
prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varestorer.systems.base import Request
from varestorer.systems.varsr import GOOD, VARSR
from varestorer.tokenizer import TokenPyramid
from varestorer.tokenizer.quantizer import to_map, to_tokens
from varestorer.training.task import Batch, Task, train_only, weighted_sum
from varestorer.transformer import ClassLabels
from varestorer.transformer.model import dropped_paths
from varestorer.transformer.refiner import TrainingDraws
from varestorer.utils.errors import UserError
from varestorer.utils.images import to_network
from varestorer.utils.seeds import uniform_per_sample

REFINER = "refiner."


@dataclass(frozen=True)
class VARSRWeights:
    """Weights of the parts of the loss: cross entropy of the codes, and the refiner's diffusion loss."""

    cross_entropy: float = 1.0
    diffusion: float = 2.0


class VARSRTask(Task):
    """Teacher-forced cross entropy of the codes and the diffusion loss of the refiner, whose gradient goes on into the
    transformer.

    A batch may have `label` (B,), the class of each picture; without it all are good (0). Bad pictures (the last
    class) are restored to themselves. Everything but the tokenizer trains.

    Args:
        system: with a frozen tokenizer.
        weights: arguments of `VARSRWeights`; a weight of 0 leaves the refiner out.
        drop_path: probability with which a sample leaves out each branch of the last block, growing linearly from 0 in
            the first (published: 0.1).
        class_drop: share of classes replaced by the last one, which stands for none (class to image alone).
        checkpoint_activations: compute the blocks again in the backward pass, for less memory.
        seed: of what is drawn.
    Raises:
        UserError: a probability that is none, or dropped classes where they are qualities.
    """

    def __init__(
        self,
        system: VARSR,
        weights: dict[str, float] | None = None,
        drop_path: float = 0.1,
        class_drop: float = 0.0,
        checkpoint_activations: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.system = system
        self.weights = VARSRWeights(**(weights or {}))
        self.drop_path, self.class_drop, self.seed = drop_path, class_drop, seed
        for name in ("drop_path", "class_drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if class_drop and system.prefix_encoder is not None:
            raise UserError("class_drop is for models of classes: here the last class stands for bad quality")
        self.shows_lq = system.prefix_encoder is not None
        system.transformer.checkpoint_activations = checkpoint_activations
        has_refiner = system.refiner is not None and self.weights.diffusion > 0
        parts: list[nn.Module | None] = [system.transformer, system.prefix_encoder]
        parts += [system.refiner, system.refiner_norm] if has_refiner else []
        train_only(self, nn.ModuleList(part for part in parts if part is not None).parameters())
        self.has_refiner = has_refiner

    def no_decay(self, name: str, parameter: nn.Parameter) -> bool:
        """The refiner is not decayed either, as published."""
        return super().no_decay(name, parameter) or name.startswith(REFINER)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        draws = None
        if self.has_refiner:
            shape = self.system.schedule.num_tokens_per_scale[-1], self.system.tokenizer.config.latent_width
            draws = TrainingDraws.keyed(shape, self.seed, batch["key"], f"refiner/{step}", self.system.device)
        factors = self.branch_factors(batch["key"], step)
        labels_B = self._labels(batch, step)
        with self.watch("tokens"), torch.no_grad():
            pyramid = self.system.encode(batch["hq"])
        with dropped_paths(self.system.transformer, factors):
            return self.losses(pyramid, labels_B, batch["lq"], draws)

    def losses(
        self, pyramid: TokenPyramid, labels_B: Tensor, lq_B3tt: Tensor, draws: TrainingDraws | None
    ) -> dict[str, Tensor]:
        """Losses and accuracies of tokens whose coarser ones are given.

        Args:
            pyramid: codes of the pictures, and what the last ones leave over.
            labels_B: classes.
            lq_B3tt: degraded squares in [0, 1]; of no use without a prefix.
            draws: of the refiner; None leaves it out.
        """
        system, last = self.system, self.system.schedule.slices[-1]
        labels_BL = pyramid.labels()
        context = system.transformer.context(ClassLabels(labels_B))
        with self.watch("transformer forward"):
            hidden = system.forced_hidden(pyramid.inputs(), context, to_network(lq_B3tt))
            logits = system.transformer.predict(hidden, context)
        head = system.transformer.head
        with self.watch("cross entropy"):
            cross_entropy_BL = head.cross_entropy(logits, labels_BL)
            accuracy_BL = head.accuracy(logits.detach(), labels_BL)
        parts = {"cross_entropy": cross_entropy_BL.mean()}
        if draws is not None and system.refiner is not None:
            with self.watch("refiner"):
                chosen = to_map(head.select(logits[:, last].detach()), system.schedule.latent_size)
                z, codes = system.refiner_condition(hidden[:, last], chosen)
                parts["diffusion"] = system.refiner.loss(z, to_tokens(pyramid.residual) - codes, draws).total.mean()
        loss = weighted_sum(self.weights, parts)
        shown = {"accuracy": accuracy_BL.mean(), "cross_entropy_last": cross_entropy_BL[:, last].detach().mean()}
        return {"loss": loss, **parts, **shown, "accuracy_last": accuracy_BL[:, last].mean()}

    def _labels(self, batch: Batch, step: int) -> Tensor:
        device = self.system.device
        labels_B = torch.as_tensor(batch.get("label", [GOOD] * len(batch["hq"])), device=device)
        null = self.system.transformer.config.num_classes - 1
        if int(labels_B.max()) > null or int(labels_B.min()) < 0:
            raise UserError(f"labels of the data must be from 0 to {null}, got {labels_B.tolist()}")
        if not (self.training and self.class_drop):
            return labels_B
        draws = uniform_per_sample((), self.seed, batch["key"], f"class drop/{step}", device)
        return torch.where(draws < self.class_drop, null, labels_B)

    def restored(self, batch: Batch) -> dict[str, Tensor]:
        """Restored freely; or pictures of the batch's classes."""
        if not self.shows_lq:
            return {"of its class": self.system.make(self._labels(batch, 0).tolist(), self.seed).images_B3HW}
        request = self.system.accept(Request(seed=self.seed), uncertainty=False)
        numbers = [int(key) for key in batch["key"]]
        return {"restored": self.system.restore_squares(batch["lq"], numbers, request).images_B3HW}

    def compared(self, batch: Batch, restored: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """A picture of a class need not be that of the batch."""
        return super().compared(batch, restored) if self.shows_lq else {}
