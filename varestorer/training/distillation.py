"""Stage 3: one-step distillation (paper, section 3: L = 0.1 L_KL + 0.25 L_perc + 0.5 L_MSE)."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from varestorer.conditioning.pyramid import Condition
from varestorer.losses.build import perceptual_loss
from varestorer.losses.distillation import distribution_matching_loss
from varestorer.losses.perceptual import EncoderFeatureLoss
from varestorer.losses.pixel import mse_loss
from varestorer.systems.parts import load_teacher
from varestorer.systems.varestorer import VARestorer
from varestorer.tokenizer import TokenPyramid
from varestorer.training.crops import random_crops
from varestorer.training.encoder import pair_tokens, trained_condition
from varestorer.training.task import Batch, Task, train_only
from varestorer.training.text import prompts_of
from varestorer.transformer import VARTransformer
from varestorer.transformer.adapters import adapter_parameters, use_adapters
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
    """How bits become an image with gradients, and what of it the image losses see.

    Attributes:
        tau: temperature of the softmax that gives the gradient.
        gumbel: add Gumbel noise, as sampling will; False takes the likelier bits, as argmax will.
        crop: side in pixels of a random square of each image; only its codes are decoded, for less memory (at its edges
            the decoder sees nothing of what lies beyond). None: the whole image.
        shrink: compare images of 1/shrink of the size, each pixel the mean of a square.
        image_slices: decode and compare the images of a micro-batch one by one, and again in the backward pass: the
            memory of one image for any number, at the cost of decoding twice.
    """

    tau: float = 0.5
    gumbel: bool = True
    crop: int | None = None
    shrink: int = 1
    image_slices: bool = False


class DistillationTask(Task):
    """The student matches the teacher's bits, and its decoded image the photograph.

    Teacher and student are the same network with its adapters off and on, and only the adapters train; or, at the cost
    of a second network, the whole student trains against a separate teacher. With either, the tokenizer's encoder may
    train too, straight through the bits of the degraded image; photographs go on being tokenised by the encoder as the
    stage begins, of which a frozen copy is kept.

    Args:
        system: tokenizer, transformer with adapters.
        weights: arguments of `DistillationWeights`; L_KL and L_perc are not computed where theirs is 0.
        kl: arguments of `KLOptions`.
        perceptual: see `losses.build.perceptual_loss`.
        straight_through: arguments of `StraightThrough`.
        trained: "adapters", or "all" of the student's transformer (full fine-tuning); [adapters, encoder] or
            [all, encoder] adds the tokenizer's encoder.
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
        straight_through: dict[str, float | bool | int | None] | None = None,
        trained: str | Sequence[str] = "adapters",
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
        parts = {trained} if isinstance(trained, str) else set(trained)
        self.start_encoder = deepcopy(system.tokenizer.encoder) if "encoder" in parts else None
        wanted = self.weights.perceptual > 0
        encoder = self.start_encoder or system.tokenizer.encoder
        self.perceptual = perceptual_loss(perceptual, encoder.features) if wanted else None
        self.straight_through = StraightThrough(**(straight_through or {}))  # type: ignore[arg-type]
        self.teacher = separate_teacher(system, teacher)
        self.tiles = [system.at_tile(side) for side in tiles or []] or [system]
        self.condition_drop = condition_drop
        self.seed = seed
        check_image_options(self.straight_through, self.tiles)
        system.transformer.checkpoint_activations = checkpoint_activations
        train_only(self, self._chosen(parts))

    def _chosen(self, parts: set[str]) -> list[nn.Parameter]:
        adapters = adapter_parameters(self.system.transformer)
        encoder = list(self.system.tokenizer.encoder.parameters()) if "encoder" in parts else []
        network = parts - {"encoder"}
        if network == {"adapters"} and adapters:
            return [*adapters.values(), *encoder]
        if network == {"all"} and self.teacher is not None and not adapters:
            return [*self.system.transformer.parameters(), *encoder]
        raise UserError(
            "distillation trains either adapters (trained=adapters, model.student.lora_rank above 0), or all of the "
            "student (trained=all, lora_rank=0, teacher=start), and the encoder if it is listed too; got "
            f"trained={sorted(parts)}, {len(adapters)} adapters and "
            f"{'no ' if self.teacher is None else ''}separate teacher"
        )

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        system = self._system(step)
        batch = batch | {name: batch[name][..., : system.tile, : system.tile] for name in ("hq", "lq")}
        noise = self._noise(system, batch)  # while the device has no work yet that the copy would wait for
        text = prompts_of(batch, system, self.condition_drop if self.training else 0.0, self.seed)
        with self.watch("text"):
            context = system.transformer.context(text)
        with self.watch("tokens"):
            photograph, condition, features = self._tokens(system, batch)
        with self.watch("teacher forward"), torch.no_grad():
            asked = context if self.teacher is None else text
            teacher = None if photograph is None else system.teacher_logits(photograph, asked, self.teacher)
        with self.watch("student forward"):
            student = system.student_logits(condition, context)
        parts = {}
        if teacher is not None:
            with self.watch("KL"):
                parts["kl"] = distribution_matching_loss(
                    teacher, student, system.schedule, system.transformer.head, self.kl.direction, self.kl.temperature, self.kl.reduction
                )
        if self.weights.perceptual or self.weights.mse:
            with self.watch("image losses"):
                codes = system.codes(system.transformer.head.straight_through(student, noise, self.straight_through.tau))
                parts |= self._image_losses(codes, system.residual(condition), batch, step, features)
        loss = torch.stack([getattr(self.weights, name) * value for name, value in parts.items()]).sum()
        return {"loss": loss, **parts}

    def _system(self, step: int) -> VARestorer:
        """The system at the tile of this step; at its own in eval mode."""
        number = derive_seed(self.seed, "tile", step) % len(self.tiles)
        return self.tiles[number] if self.training else self.system

    def _noise(self, system: VARestorer, batch: Batch) -> Tensor | None:
        """Uniform numbers (B, L, Z, 2) for Gumbel noise on the student's logits; None for no noise."""
        if not (self.straight_through.gumbel and self.training and (self.weights.perceptual or self.weights.mse)):
            return None
        shape = (system.schedule.num_tokens, *system.transformer.head.symbol_shape())
        return uniform_per_sample(shape, self.seed, batch["key"], "gumbel", system.device)

    def _tokens(
        self, system: VARestorer, batch: Batch
    ) -> tuple[TokenPyramid | None, Condition, Sequence[Tensor] | None]:
        """The photographs' tokens, by the encoder as the stage began; the student's input; maps of the photographs.

        The student's input has gradients if the encoder trains. There are no tokens of photographs if nobody is asked
        about them, and no maps (see `PairTokens`) unless the perceptual loss compares these.
        """
        if self.start_encoder is not None:
            photograph = self._photograph(system, batch["hq"]) if self.weights.kl else None
            return photograph, trained_condition(system, batch["lq"]), None
        if not self.weights.kl:
            return None, system.condition(batch["lq"]), None
        tokens = pair_tokens(system, batch["hq"], batch["lq"])
        options = self.straight_through
        compared_whole = not (options.crop and self.training) and options.shrink == 1 and not options.image_slices
        shared = compared_whole and isinstance(self.perceptual, EncoderFeatureLoss)
        return tokens.photograph, tokens.condition, tokens.features_BChw if shared else None

    def _photograph(self, system: VARestorer, hq_B3HW: Tensor) -> TokenPyramid:
        """Tokens of the photographs where the encoder trains: by the one that the stage began with."""
        assert self.start_encoder is not None
        return system.tokenizer.quantizer(self.start_encoder(to_network(hq_B3HW)), system.schedule)

    def _image_losses(
        self,
        codes_BZhw: Tensor,
        residual_B3HW: Tensor | None,
        batch: Batch,
        step: int,
        features_BChw: Sequence[Tensor] | None,
    ) -> dict[str, Tensor]:
        """L_perc and L_MSE on the student's image, both in [-1, 1]; gradients go through the codes."""
        options, codes, target = self.straight_through, codes_BZhw, to_network(batch["hq"])
        if options.crop is not None and self.training:
            place_B2 = uniform_per_sample((2,), self.seed, batch["key"], f"image crop/{step}")
            codes, target = random_crops(codes, target, options.crop, place_B2)
        if not options.image_slices:
            return self._compare(codes, residual_B3HW, target, features_BChw)
        residuals = [None] * len(codes) if residual_B3HW is None else residual_B3HW.split(1)
        slices = zip(codes.split(1), residuals, target.split(1), strict=True)
        each = [torch.utils.checkpoint.checkpoint(self._compare, *one, use_reentrant=False) for one in slices]
        return {name: torch.stack([losses[name] for losses in each]).mean() for name in each[0]}

    def _compare(
        self,
        codes_BZhw: Tensor,
        residual_B3HW: Tensor | None,
        target_B3HW: Tensor,
        features_BChw: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The image losses of decoded codes, means over the images; `features_BChw` are known maps of the target."""
        target, shrink = target_B3HW, self.straight_through.shrink
        image = self.system.student_image(codes_BZhw, residual_B3HW)
        if shrink > 1:
            image, target = F.avg_pool2d(image, shrink), F.avg_pool2d(target, shrink)
        losses = {"mse": mse_loss(image, target)}
        if isinstance(self.perceptual, EncoderFeatureLoss):
            losses["perceptual"] = self.perceptual(image, target, features_BChw)
        elif self.perceptual is not None:
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


def check_image_options(options: StraightThrough, systems: Sequence[VARestorer]) -> None:
    """Refuse crops and sizes of the compared image that do not fit the squares.

    Raises:
        UserError: names the key, what it was and what it has to be.
    """
    stride, smallest = systems[0].tokenizer.stride, min(system.tile for system in systems)
    crop, shrink = options.crop, options.shrink
    if crop is not None and systems[0].student_config.keep_residual:
        raise UserError(
            "straight_through.crop decodes parts of images, and the residual is of whole ones; leave out the crop, or "
            "set model.student.keep_residual=false"
        )
    if crop is not None and not (0 < crop <= smallest and crop % stride == 0):
        wanted = f"a multiple of {stride} pixels, at most the tile's {smallest}"
        raise UserError(f"straight_through.crop must be {wanted}, got {crop}")
    if shrink < 1 or (smallest if crop is None else crop) % shrink:
        raise UserError(f"straight_through.shrink must divide the side of what is compared, got {shrink}")
