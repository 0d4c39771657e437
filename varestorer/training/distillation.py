"""Stage 3: one-step distillation (paper, section 3: L = 0.1 L_KL + 0.25 L_perc + 0.5 L_MSE)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varestorer.losses.build import perceptual_loss
from varestorer.losses.distillation import distribution_matching_loss
from varestorer.losses.pixel import mse_loss
from varestorer.systems.parts import load_teacher
from varestorer.systems.varestorer import VARestorer
from varestorer.training.task import Batch, Task, train_only
from varestorer.training.text import prompts_of
from varestorer.transformer.adapters import adapter_parameters
from varestorer.transformer.sampling import straight_through_bits
from varestorer.utils.errors import UserError
from varestorer.utils.images import to_network
from varestorer.utils.seeds import uniform_per_sample


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

    Teacher and student are the same network with its adapters off and on, unless a separate teacher is named; only the
    adapters train.

    Args:
        system: tokenizer, transformer with adapters.
        weights: arguments of `DistillationWeights`; L_KL and L_perc are not computed where theirs is 0.
        kl: arguments of `KLOptions`.
        perceptual: see `losses.build.perceptual_loss`.
        straight_through: arguments of `StraightThrough`.
        teacher: file or run of a separate teacher, at the cost of a second network; None: the system's own.
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
        teacher: str | None = None,
        condition_drop: float = 0.1,
        checkpoint_activations: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        adapters = adapter_parameters(system.transformer)
        if not adapters:
            raise UserError("distillation trains the adapters, but there are none; set model.student.lora_rank above 0")
        self.system = system
        self.weights = DistillationWeights(**(weights or {}))
        self.kl = KLOptions(**(kl or {}))  # type: ignore[arg-type]
        wanted = self.weights.perceptual > 0
        self.perceptual = perceptual_loss(perceptual, system.tokenizer.encoder.features) if wanted else None
        self.straight_through = StraightThrough(**(straight_through or {}))  # type: ignore[arg-type]
        self.teacher = None if teacher is None else load_teacher(system, teacher)
        self.condition_drop = condition_drop
        self.seed = seed
        system.transformer.checkpoint_activations = checkpoint_activations
        train_only(self, adapters.values())

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        system = self.system
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
            parts |= self._image_losses(student, batch)
        loss = torch.stack([getattr(self.weights, name) * value for name, value in parts.items()]).sum()
        return {"loss": loss, **parts}

    def _image_losses(self, student_BLZ2: Tensor, batch: Batch) -> dict[str, Tensor]:
        """L_perc and L_MSE on the decoded image, both in [-1, 1]; gradients go through the bits."""
        uniform = None
        if self.straight_through.gumbel:
            shape = tuple(student_BLZ2.shape[1:])
            uniform = uniform_per_sample(shape, self.seed, batch["key"], "gumbel", student_BLZ2.device)
        bits = straight_through_bits(student_BLZ2, uniform, self.straight_through.tau)
        image = self.system.tokenizer.decode(self.system.codes(bits))
        target = to_network(batch["hq"])
        losses = {"mse": mse_loss(image, target)}
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(image, target)
        return losses

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """The student in one step, without noise."""
        restored = self.system.restore_batch(batch["lq"]).images_B3HW
        return {"LQ": batch["lq"], "student": restored, "HQ": batch["hq"]}
