"""What makes a student of a teacher."""

from __future__ import annotations

from dataclasses import dataclass, fields

from varestorer.conditioning.pyramid import INPUTS
from varestorer.transformer.adapters import TARGETS, target_pattern
from varestorer.transformer.masks import MASKS
from varestorer.utils.errors import UserError


@dataclass(frozen=True)
class StudentConfig:
    """What makes the student of the teacher; the defaults are the traits of the released student.

    Attributes:
        lora_rank: of the adapters; 0 for none (the student is then the base network itself).
        lora_targets: layers of the blocks that carry them, see `adapters.target_pattern`.
        inputs: what the tokens of a scale start from: "next_scale", the degraded image's codes of the coarser scales
            (as the teacher's start from the photograph's), or "own_scale", those of its own scale with them.
        keep_bits: what the degraded image's own bits count in the logits: each margin starts from plus or minus this,
            and the network has to learn only what to change. 0: nothing, as in the paper.
        keep_residual: add to the decoded image what the tokenizer loses of the degraded one (cleaned), so that it costs
            nothing where bits are kept. False: the paper's.
        long_input: append the complete codes at the last scale to the input.
        long_positions: rotary rows of the appended tokens, "next_scale" or "own".
        cross_value_bias: whether block cross attention adds its value bias while the adapters are on.
        attention: "cross_scale": every token sees all, or "causal": its own and coarser scales (table 3).
        conditioning: "pyramid": one step from the degraded image's tokens, or "prefix": scale by scale, with the
            degraded image in front of all (table 3, without distillation; see `systems.prefix`), where `inputs`,
            `keep_bits`, `keep_residual`, `attention` and the long input say nothing.
        guidance: c of the prefix: c * with it + (1 - c) * without it.
        merged: the adapters are folded into the base weights, so that no teacher is left.
    """

    lora_rank: int = 32
    lora_targets: tuple[str, ...] = TARGETS
    inputs: str = "next_scale"
    keep_bits: float = 0.0
    keep_residual: bool = False
    long_input: bool = True
    long_positions: str = "next_scale"
    cross_value_bias: bool = False
    attention: str = "cross_scale"
    conditioning: str = "pyramid"
    guidance: float = 1.0
    merged: bool = False

    @property
    def unreleased(self) -> list[str]:
        """Traits that the released student has not, as `name=value`; the rank and what is merged are left aside."""
        released = StudentConfig(lora_rank=self.lora_rank, merged=self.merged)
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return [f"{name}={value}" for name, value in named if value != getattr(released, name)]

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        if self.keep_bits < 0:
            raise UserError(f"model.student.keep_bits must be 0 or more, got {self.keep_bits}")
        target_pattern(self.lora_targets)
        for name, choices in (("attention", MASKS), ("conditioning", ("pyramid", "prefix")), ("inputs", INPUTS)):
            if getattr(self, name) not in choices:
                raise UserError(f"model.student.{name} must be {' or '.join(choices)}, got {getattr(self, name)}")
