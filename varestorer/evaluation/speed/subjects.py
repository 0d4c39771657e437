"""A variant of a system as the benchmark measures it: accelerated, and its operations counted before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from varestorer.conditioning.restorer import PUBLISHED_SIZES, Restorer
from varestorer.evaluation.cost import (
    DECODER,
    ENCODER,
    PUBLISHED_MULTIPLE,
    RESTORER,
    TRANSFORMER,
    flops_of,
    without_weights,
)
from varestorer.evaluation.speed.operations import (
    decoder_flops,
    encoder_flops,
    swinir_flops,
    text_flops,
    transformer_flops,
)
from varestorer.systems.acceleration import Acceleration
from varestorer.systems.varestorer import VARestorer
from varestorer.transformer.adapters import TARGETS


@dataclass(frozen=True)
class Subject:
    """A variant of a system.

    Attributes:
        system: accelerated.
        counted: operations of each stage for one image, by torch's counter.
        formula: the same by formula; a stage that no formula describes is left out.
        keeps_text: the text is encoded before, as where the prompt stays; else for every batch anew.
    """

    system: VARestorer
    counted: dict[str, int]
    formula: dict[str, int]
    keeps_text: bool

    @property
    def precision(self) -> str:
        """Of the blocks: "fp32" or "bf16"."""
        return "bf16" if self.system.transformer.blocks[0].modulation.dtype == torch.bfloat16 else "fp32"

    def text(self, batch: int) -> Any:
        """No prompt, for a batch."""
        return text_of(self.system, batch, self.keeps_text)


def text_of(system: VARestorer, batch: int, keeps_text: bool) -> Any:
    """No prompt, for a batch, as `restore_batch` takes it: its features, or what is kept of a prompt that stays."""
    if not keeps_text:
        return system.null_text(batch)
    with torch.inference_mode():
        return system.transformer.prepare(system.null_text(1))  # of one prompt, for batches of any size


def subject(system: VARestorer, acceleration: Acceleration) -> Subject:
    """Count what a system does, then accelerate it, in place.

    Raises:
        UserError: what this machine cannot do.
    """
    merge = acceleration.merge
    twin = without_weights(system)
    counted = flops_of(twin.merge_adapters() if merge else twin, text=text_of(twin, 1, merge))
    formula = formula_flops(twin, keeps_text=merge)
    return Subject(system.accelerate(acceleration), counted, formula, merge)


def formula_flops(system: VARestorer, keeps_text: bool) -> dict[str, int]:
    """Operations of each stage for one image, by formula."""
    student, sizes = system.student_config, system.transformer.config
    num_predicted = system.schedule.num_tokens
    num_tokens = num_predicted + student.long_input * system.schedule.num_tokens_per_scale[-1]
    rank = 0 if student.merged else student.lora_rank
    found = {
        ENCODER: encoder_flops(system.tokenizer.config, system.tile),
        # where a residual is kept, the input's own codes are decoded too
        DECODER: decoder_flops(system.tokenizer.config, system.tile) * (1 + system.student_config.keep_residual),
    }
    has_known_adapters = rank == 0 or set(student.lora_targets) == set(TARGETS)
    if has_known_adapters and student.attention == "cross_scale":
        whole = transformer_flops(sizes, num_tokens, sizes.text_length, num_predicted, rank)
        found[TRANSFORMER] = whole - keeps_text * text_flops(sizes, sizes.text_length, rank)
    if system.restorer is not None and _is_published(system.restorer):
        side = -(-system.tile // PUBLISHED_MULTIPLE) * PUBLISHED_MULTIPLE
        found[RESTORER] = swinir_flops(PUBLISHED_SIZES, side)
    return found


def _is_published(restorer: Restorer) -> bool:
    parameters = getattr(restorer.network, "hyperparameters", {})
    return all(parameters.get(name) == value for name, value in PUBLISHED_SIZES.items())
