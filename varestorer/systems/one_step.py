"""One step for networks that read a prefix: VARestorer's distillation with VARSR or H-VAR as the teacher.

Neither paper has it. The student is the teacher's network with adapters. It sees the degraded image twice, as the
prefix and, as VARestorer's does (section 3.2), as tokens of all scales, each of which attends to all others.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from varestorer.systems.base import Request, RestoredBatch, System
from varestorer.tokenizer import TokenizerConfig, TokenPyramid
from varestorer.transformer import Context, PreparedCondition, TransformerConfig, VARTransformer
from varestorer.transformer.adapters import adapters_off, attach_adapters, target_pattern
from varestorer.transformer.generation import Prefix
from varestorer.transformer.layout import BlockCausal
from varestorer.utils.errors import UserError


@dataclass(frozen=True)
class OneStepConfig:
    """The student of a network that reads a prefix.

    Attributes:
        lora_rank: of the adapters that are the student; 0: there is none, and the network restores as its paper says.
        lora_targets: layers of the blocks that carry them, see `adapters.target_pattern`.
        keep_codes: added to the logits of the degraded image's own codes.
        merged: the adapters are folded into the base weights, so that no teacher is left.
    """

    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ("self_attention", "ffn")
    keep_codes: float = 0.0
    merged: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        target_pattern(self.lora_targets)
        if self.lora_rank < 0 or self.keep_codes < 0:
            raise UserError("model.student.lora_rank and model.student.keep_codes must be 0 or more")

    @property
    def has_teacher(self) -> bool:
        """Whether there are adapters to turn off."""
        return self.lora_rank > 0 and not self.merged


@dataclass(frozen=True)
class Conditioned:
    """What the student sees of the degraded image: its tokens, and those in front of all scales.

    The teacher reads these, too.
    """

    pyramid: TokenPyramid
    prefix: Prefix


class OneStepSystem(System):
    """A system whose network may have become one-step; without a student it restores as its paper, `title`, says."""

    title: ClassVar[str]
    student_config: OneStepConfig

    @abstractmethod
    def see(self, lq_B3tt: Tensor) -> Prefix:
        """The prefix of degraded squares in [0, 1]."""

    # ---- networks

    def make_transformer(self, tokenizer: TokenizerConfig, given: Mapping[str, Any], **derived: Any) -> VARTransformer:
        """The network, with adapters where there is a student; what follows from the other parts need not be given."""
        derived |= {"latent_width": tokenizer.latent_width, "vocabulary": tokenizer.vocabulary}
        derived |= {"hidden_width": 4 * given.get("width", TransformerConfig.width), "num_levels": len(self.schedule)}
        transformer = VARTransformer(TransformerConfig(**(derived | dict(given))))
        if self.student_config.has_teacher:
            attach_adapters(transformer, self.student_config.lora_rank, True, self.student_config.lora_targets)
        return transformer

    # ---- what distillation asks for

    @torch.no_grad()
    def condition(self, lq_B3tt: Tensor) -> Conditioned:
        """What the student sees of degraded squares in [0, 1]."""
        return Conditioned(self.encode(lq_B3tt), self.see(lq_B3tt))

    def pair_tokens(self, hq_B3HW: Tensor, lq_B3HW: Tensor) -> tuple[TokenPyramid, Conditioned]:
        """What the teacher and the student see of photographs and their degraded images, both in [0, 1]."""
        with torch.no_grad():
            return self.encode(hq_B3HW), self.condition(lq_B3HW)

    def teacher_logits(
        self, pyramid: TokenPyramid, context: Context, teacher: VARTransformer | None, condition: Conditioned
    ) -> Tensor:
        """p_T(r_k | r_<k, prefix): logits (B, L, V) of all scales, given the photograph's coarser ones; adapters off.

        The context is of the condition, which is of the degraded image; the teacher is a network of its own, or None
        for the system's.
        """
        with adapters_off(self.transformer):
            network, inputs = teacher or self.transformer, pyramid.inputs()
            return self.all_scales(network, inputs, context, condition.prefix, is_causal=True)

    def student_logits(self, condition: Conditioned, context: Context | PreparedCondition) -> Tensor:
        """p_S(r_k | r_LQ, prefix): logits (B, L, V) of all scales in one pass; every token sees every other."""
        inputs = condition.pyramid.own_inputs()
        logits = self.all_scales(self.transformer, inputs, context, condition.prefix, is_causal=False)
        if margin := self.student_config.keep_codes:
            logits = logits + self.transformer.head.leaning(condition.pyramid.labels(), margin)
        return logits

    def all_scales(
        self, network: VARTransformer, inputs_BLZ: Tensor, context: Any, prefix: Prefix, is_causal: bool
    ) -> Tensor:
        """Logits (B, L, V) of all scales behind a prefix; every token sees every other, or the coarser scales alone."""
        layout = network.layout(self.schedule, inputs_BLZ.device, prefix.size)
        mask = BlockCausal.of(layout) if is_causal else None
        asked = slice(len(layout) - self.schedule.num_tokens, None)
        return network(inputs_BLZ, context, layout, mask, asked=asked, prefix_BPC=prefix.tokens_BPC)

    def residual(self, condition: Conditioned) -> None:
        """Nothing of the student's input is kept beside its codes."""

    def student_image(self, codes_BZhw: Tensor, residual: None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of the student's codes."""
        return self.tokenizer.decode(codes_BZhw)

    @torch.inference_mode()
    def restore_batch(self, lq_B3HW: Tensor, steps: str | None = None) -> RestoredBatch:
        """Restore squares of side `tile`, in [0, 1]; what is drawn is drawn with seed 0."""
        return self.restore_squares(lq_B3HW, [*range(len(lq_B3HW))], self.accept(Request(steps=steps), False))

    # ---- restoring

    @property
    def tiles(self) -> tuple[int, ...]:
        """The trained side alone: learned rows of the prefix, and target sizes, belong to it."""
        return (self.tile,)

    def check_codebook(self) -> None:
        """Refuse a tokenizer of bits (UserError)."""
        if not self.tokenizer.config.vocabulary:
            raise UserError(
                f"{self.title} predicts entries of a codebook: set model.tokenizer.vocabulary to their number"
            )

    def accept(self, request: Request, uncertainty: bool) -> Request:
        if request.prompt is not None:
            raise UserError(f"{self.title} restores without words: leave prompt= out")
        self.is_one_step(request)
        return request

    @property
    def ways(self) -> list[str]:
        return ["one", "multi"] if self.student_config.has_teacher else ["one"]

    def is_one_step(self, request: Request) -> bool:
        """Whether the student answers, not the network as its paper says; UserError for steps that it has not."""
        steps, student = request.steps, self.student_config
        if steps is None or (steps == "one" and student.lora_rank):
            return student.lora_rank > 0
        if steps == "multi" and student.has_teacher:
            return False
        if steps == "multi" and student.lora_rank:
            raise UserError("steps=multi needs the teacher, and the adapters of this model are merged; leave it out")
        raise UserError(
            f"this model predicts its {len(self.schedule)} scales one after the other: leave steps= out, got "
            f"steps={steps}; students of dmd_varsr and dmd_hvar have steps=one and steps=multi"
        )

    def in_one_step(
        self, lq_B3tt: Tensor, context: Context | PreparedCondition, uniforms: Sequence[Tensor] | None
    ) -> tuple[list[Tensor], Tensor]:
        """Chosen codes of each scale as maps, and the logits (B, L, V) they come from; squares are in [0, 1].

        Noise of each scale is as of `System.uniforms`; None takes the likeliest codes.
        """
        logits = self.student_logits(self.condition(lq_B3tt), context)
        return self.select(logits, uniforms), logits
