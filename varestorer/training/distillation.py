"""Stage 3: one-step distillation (paper, section 3: L = 0.1 L_KL + 0.25 L_perc + 0.5 L_MSE)."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varestorer.losses.build import perceptual_loss
from varestorer.losses.distillation import distribution_matching_loss
from varestorer.losses.pixel import mse_loss
from varestorer.systems.parts import load_teacher
from varestorer.systems.varestorer import VARestorer
from varestorer.training.task import Batch, Task, train_only
from varestorer.training.text import prompts_of
from varestorer.transformer import VARTransformer
from varestorer.transformer.adapters import adapter_parameters, use_adapters
from varestorer.transformer.sampling import straight_through_bits
from varestorer.utils.errors import UserError
from varestorer.utils.images import to_network
from varestorer.utils.seeds import derive_seed, uniform_per_sample


@dataclass(frozen=True)
class DistillationWeights:
    """Weights of the parts of the loss; the defaults are the paper's."""

    kl: float = 0.1
    perceptual: float = 0.25
    mse: float = 0.5


@dataclass(frozen=True)
class KLOptions:
    """How the distributions are matched, see `losses.distillation.distribution_matching_loss`."""

    direction: str = "forward"
    temperature: float = 1.0
    reduction: str = "scale"


@dataclass(frozen=True)
class StraightThrough:
    """How bits become an image with gradients.

    Attributes:
        tau: temperature of the softmax that gives the gradient.
        gumbel: add Gumbel noise, as sampling will; False takes the likelier bits, as argmax will.
    """

    tau: float = 0.5
    gumbel: bool = True


class DistillationTask(Task):
    """The student matches the teacher's bits, and its decoded image the photograph.

    Teacher and student are the same network with its adapters off and on, and only the adapters train; or, at the cost
    of a second network, the whole student trains against a separate teacher.

    Args:
        system: tokenizer, transformer with adapters.
        weights: arguments of `DistillationWeights`; L_KL and L_perc are not computed where theirs is 0.
        kl: arguments of `KLOptions`.
        perceptual: see `losses.build.perceptual_loss`.
        straight_through: arguments of `StraightThrough`.
        trained: "adapters", or "all" of the student's transformer (full fine-tuning).
        teacher: file, bundle or run of a separate teacher, or "start": a copy of the network as the stage begins; None:
            the system's own.
        tiles: sides of squares (pixels, see `VARestorer.tiles`) of which each step takes one; None: the system's own.
        condition_drop: share of prompts replaced by the learned null text.
        checkpoint_activations: compute the blocks again in the backward pass, for less memory.
        seed: of noise and drops.
    """

    def __init__(
        self,
        system: VARestorer,
        weights: dict[str, float] | None = None,
        kl: dict[str, str | float] | None = None,
        perceptual: str = "lpips",
        straight_through: dict[str, float | bool] | None = None,
        trained: str = "adapters",
        teacher: str | None = None,
        tiles: list[int] | None = None,
        condition_drop: float = 0.1,
        checkpoint_activations: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.system = system
        self.weights = DistillationWeights(**(weights or {}))
        self.kl = KLOptions(**(kl or {}))  # type: ignore[arg-type]
        wanted = self.weights.perceptual > 0
        self.perceptual = perceptual_loss(perceptual, system.tokenizer.encoder.features) if wanted else None
        self.straight_through = StraightThrough(**(straight_through or {}))  # type: ignore[arg-type]
        self.teacher = separate_teacher(system, teacher)
        self.tiles = [system.at_tile(side) for side in tiles or []] or [system]
        self.condition_drop = condition_drop
        self.seed = seed
        system.transformer.checkpoint_activations = checkpoint_activations
        train_only(self, self._chosen(trained))

    def _chosen(self, trained: str) -> Iterable[nn.Parameter]:
        adapters = adapter_parameters(self.system.transformer)
        if trained == "adapters" and adapters:
            return adapters.values()
        if trained == "all" and self.teacher is not None and not adapters:
            return self.system.transformer.parameters()
        raise UserError(
            "distillation trains either adapters (trained=adapters, model.student.lora_rank above 0), or all of the "
            f"student (trained=all, lora_rank=0, teacher=start); got trained={trained}, {len(adapters)} adapters and "
            f"{'no ' if self.teacher is None else ''}separate teacher"
        )

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        system = self.tiles[derive_seed(self.seed, "tile", step) % len(self.tiles)]
        batch = batch | {name: batch[name][..., : system.tile, : system.tile] for name in ("hq", "lq")}
        text = prompts_of(batch, system, self.condition_drop, self.seed)
        context = system.transformer.text(text)
        with torch.no_grad():
            condition = system.condition(batch["lq"])
            asked = context if self.teacher is None else text
            pyramid = system.encode(batch["hq"]) if self.weights.kl else None
            teacher = None if pyramid is None else system.teacher_logits(pyramid, asked, self.teacher)
        student = system.student_logits(condition, context)
        parts = {}
        if teacher is not None:
            parts["kl"] = distribution_matching_loss(
                teacher, student, system.schedule, self.kl.direction, self.kl.temperature, self.kl.reduction
            )
        if self.weights.perceptual or self.weights.mse:
            parts |= self._image_losses(system, student, batch)
        loss = torch.stack([getattr(self.weights, name) * value for name, value in parts.items()]).sum()
        return {"loss": loss, **parts}

    def _image_losses(self, system: VARestorer, student_BLZ2: Tensor, batch: Batch) -> dict[str, Tensor]:
        """L_perc and L_MSE on the decoded image, both in [-1, 1]; gradients go through the bits."""
        uniform = None
        if self.straight_through.gumbel:
            shape = tuple(student_BLZ2.shape[1:])
            uniform = uniform_per_sample(shape, self.seed, batch["key"], "gumbel", student_BLZ2.device)
        bits = straight_through_bits(student_BLZ2, uniform, self.straight_through.tau)
        image = system.tokenizer.decode(system.codes(bits))
        target = to_network(batch["hq"])
        losses = {"mse": mse_loss(image, target)}
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(image, target)
        return losses

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The student in one step, without noise."""
        restored = self.system.restore_batch(batch["lq"]).images_B3HW
        return {"LQ": batch["lq"], "student": restored, "HQ": batch["hq"]}


def separate_teacher(system: VARestorer, teacher: str | None) -> VARTransformer | None:
    """The network that `DistillationTask(teacher=...)` names; None for the system's own."""
    if teacher == "start":
        copied = deepcopy(system.transformer)
        use_adapters(copied, False)
        return copied
    return None if teacher is None else load_teacher(system, teacher)
