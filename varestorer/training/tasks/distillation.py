"""Stage 3: one-step distillation (paper, section 3: L = 0.1 L_KL + 0.25 L_perc + 0.5 L_MSE).

Shapes: `B` batch, `L` tokens, `Z` bits per token, `H W` pixels, `h w` latent positions.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from varestorer.losses.perceptual import perceptual_loss
from varestorer.losses.pixel import mse_loss
from varestorer.losses.tokens import distribution_matching_loss
from varestorer.systems.varestorer import VARestorer
from varestorer.training.task import Batch, Task, train_only, weighted_sum
from varestorer.training.tasks.teacher import prompts_of
from varestorer.transformer import VARTransformer
from varestorer.transformer.adapters import adapter_parameters, use_adapters
from varestorer.utils.errors import UserError
from varestorer.utils.images import to_network
from varestorer.utils.seeds import derive_seed, uniform_per_sample
from varestorer.weights.load import load_teacher


@dataclass(frozen=True)
class DistillationWeights:
    """Weights of the parts of the loss; the defaults are the paper's."""

    kl: float = 0.1
    perceptual: float = 0.25
    mse: float = 0.5


@dataclass(frozen=True)
class KLOptions:
    """How the distributions are matched, see `losses.tokens.distribution_matching_loss`."""

    direction: str = "forward"
    temperature: float = 1.0
    reduction: str = "scale"


@dataclass(frozen=True)
class StraightThrough:
    """How bits become an image with gradients.

    Attributes:
        tau: temperature of the softmax that gives the gradient.
        gumbel: add Gumbel noise, as sampling will; False takes the likelier bits, as argmax will.
        image_slices: decode and compare the images of a micro-batch one by one, and again in the backward pass: the
            memory of one image for any number, at the cost of decoding twice.
    """

    tau: float = 0.5
    gumbel: bool = True
    image_slices: bool = False


class DistillationTask(Task):
    """The student matches the teacher's bits, and its decoded image the photograph.

    Teacher and student are the same network with its adapters off and on, and only the adapters train; or, at the cost
    of a second network, the whole student trains against a separate teacher.

    Args:
        system: with adapters in its transformer: a `VARestorer`, or a `VARSR` that is to become one-step.
        weights: arguments of `DistillationWeights`; L_KL and L_perc are not computed where theirs is 0.
        kl: arguments of `KLOptions`.
        perceptual: see `losses.perceptual.perceptual_loss`.
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
        self.perceptual = perceptual_loss(perceptual) if self.weights.perceptual > 0 else None
        self.straight_through = StraightThrough(**(straight_through or {}))  # type: ignore[arg-type]
        self.teacher = separate_teacher(system, teacher)
        self.tiles = [system.at_tile(side) for side in tiles or []] or [system]
        self.condition_drop = condition_drop
        self.seed = seed
        system.transformer.checkpoint_activations = checkpoint_activations
        train_only(self, student_parameters(system, trained, self.teacher))

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        system = self.tiles[derive_seed(self.seed, "tile", step) % len(self.tiles)] if self.training else self.system
        hq, lq = (batch[name][..., : system.tile, : system.tile] for name in ("hq", "lq"))
        noise = self._noise(system, batch["key"])  # while the device has no work yet that the copy would wait for
        text = prompts_of(batch, system, self.condition_drop if self.training else 0.0, self.seed)
        with self.watch("text"):
            context = system.transformer.context(text)
        with self.watch("tokens"):
            r_hq, condition = system.pair_tokens(hq, lq) if self.weights.kl else (None, system.condition(lq))
        with self.watch("teacher forward"), torch.no_grad():
            asked = context if self.teacher is None else text
            teacher = None if r_hq is None else system.teacher_logits(r_hq, asked, self.teacher, condition)
        with self.watch("student forward"):
            student = system.student_logits(condition, context)
        parts, head = {}, system.transformer.head
        if teacher is not None:
            with self.watch("KL"):
                parts["kl"] = distribution_matching_loss(teacher, student, system.schedule, head, **vars(self.kl))
        if self.weights.perceptual or self.weights.mse:
            with self.watch("image losses"):
                codes = system.codes(head.straight_through(student, noise, self.straight_through.tau))
                parts |= self._image_losses(codes, system.residual(condition), to_network(hq))
        # 0.1 L_KL + 0.25 L_perc + 0.5 L_MSE
        return {"loss": weighted_sum(self.weights, parts), **parts}

    def _noise(self, system: VARestorer, keys: Tensor) -> Tensor | None:
        """Uniform numbers of the logits' shape for Gumbel noise on the student's logits; None for no noise."""
        if not (self.straight_through.gumbel and self.training and (self.weights.perceptual or self.weights.mse)):
            return None
        shape = (system.schedule.num_tokens, *system.transformer.head.symbol_shape())
        return uniform_per_sample(shape, self.seed, keys, "gumbel", system.device)

    def _image_losses(self, codes_BZhw: Tensor, residual_B3HW: Tensor | None, hq_B3HW: Tensor) -> dict[str, Tensor]:
        """L_MSE and L_perc of the student's image, both in [-1, 1]; gradients go through the codes."""
        if not self.straight_through.image_slices:
            return self._compare(codes_BZhw, residual_B3HW, hq_B3HW)
        residuals = [None] * len(codes_BZhw) if residual_B3HW is None else residual_B3HW.split(1)
        slices = zip(codes_BZhw.split(1), residuals, hq_B3HW.split(1), strict=True)
        each = [torch.utils.checkpoint.checkpoint(self._compare, *one, use_reentrant=False) for one in slices]
        return {name: torch.stack([losses[name] for losses in each]).mean() for name in each[0]}

    def _compare(self, codes_BZhw: Tensor, residual_B3HW: Tensor | None, hq_B3HW: Tensor) -> dict[str, Tensor]:
        image = self.system.student_image(codes_BZhw, residual_B3HW)
        losses = {"mse": mse_loss(image, hq_B3HW)}
        return losses if self.perceptual is None else losses | {"perceptual": self.perceptual(image, hq_B3HW)}

    def restored(self, batch: Batch) -> dict[str, Tensor]:
        """The student in one step, without noise."""
        return {"student": self.system.restore_batch(batch["lq"]).images_B3HW}


def student_parameters(system: VARestorer, trained: str, teacher: VARTransformer | None) -> list[nn.Parameter]:
    """The parameters that `DistillationTask(trained=...)` names."""
    adapters = adapter_parameters(system.transformer)
    if trained == "adapters" and adapters:
        return [*adapters.values()]
    if trained == "all" and teacher is not None and not adapters:
        return [*system.transformer.parameters()]
    raise UserError(
        "distillation trains either adapters (trained=adapters, model.student.lora_rank above 0), or all of the "
        f"student (trained=all, lora_rank=0, teacher=start); got trained={trained}, {len(adapters)} adapters and "
        f"{'no ' if teacher is None else ''}separate teacher"
    )


def separate_teacher(system: VARestorer, teacher: str | None) -> VARTransformer | None:
    """The network that `DistillationTask(teacher=...)` names; None for the system's own."""
    if teacher == "start":
        copied = deepcopy(system.transformer)
        use_adapters(copied, False)
        return copied
    return None if teacher is None else load_teacher(system, teacher)
