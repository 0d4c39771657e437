"""How fast variants of a system restore, as a whole and by stages, beside what the device could do at best.

The floor of a stage is the larger of two times: its operations at the device's rate of matrix products, and its least
bytes at the rate of its copies. Only products of matrices and convolutions count as operations, and only weights, input
and output as bytes, so a stage of norms and activations, or of many small launches, stands well above its floor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varestorer.evaluation.memory import held_memory, peak_memory
from varestorer.evaluation.speed.stages import (
    ON_HOST,
    Stage,
    least_bytes,
    restoring_stages,
    time_stages,
    weight_bytes,
)
from varestorer.evaluation.speed.subjects import Subject
from varestorer.systems.acceleration import tensors_of
from varestorer.systems.varestorer import VARestorer
from varestorer.utils.device import num_bytes
from varestorer.utils.errors import reason
from varestorer.utils.seeds import torch_generator
from varestorer.utils.timing import Clock, Timing, in_turns

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rates:
    """What a device does at best.

    Attributes:
        matrix: precision -> floating-point operations a second of products of matrices.
        copy: bytes a second, read and written ones together.
    """

    matrix: dict[str, float]
    copy: float


@dataclass(frozen=True)
class StageSpeed:
    """One stage of a batch.

    Attributes:
        name: of the stage.
        timing: seconds.
        counted: operations by torch's counter, adapters merged or not as they were; 0 where it sees none.
        formula: by `speed.operations`; None where there is no formula.
        least_bytes: None of work on the host.
    """

    name: str
    timing: Timing
    counted: int
    formula: int | None
    least_bytes: int | None

    def floor(self, matrix: float, copy: float) -> float | None:
        """Seconds at the given rates; None of work on the host."""
        if self.least_bytes is None:
            return None
        return max((self.formula or self.counted) / matrix, self.least_bytes / copy)


@dataclass(frozen=True)
class Speed:
    """A variant at a size of batch.

    Attributes:
        variant: its name.
        batch: images at once.
        precision: of the blocks, "fp32" or "bf16": every stage is held against its rate, though the VAE's encoder works
            in float32 whatever the blocks do.
        whole: seconds from pictures in the host's memory to pictures in it.
        stages: in order; none where the stages cannot be told apart, as in a CUDA graph.
        peak_bytes: weights and working memory; None where it cannot be told.
    """

    variant: str
    batch: int
    precision: str
    whole: Timing
    stages: tuple[StageSpeed, ...]
    peak_bytes: int | None


def measure_restoring(
    subjects: Mapping[str, Subject], batch: int, folder: Path, repeats: int, warmup: int, color: str = "adain"
) -> list[Speed]:
    """Time variants in turns at one size of batch, first as wholes, then by stages.

    Args:
        subjects: by the names of their variants, all on one device.
        batch: images at once.
        folder: for the files that are read and written.
        repeats: timed runs.
        warmup: runs before them.
        color: see `stages.restoring_stages`.
    Returns:
        In the order of `subjects`; a variant that fails, for want of memory or of a compiler's support, is left out
        with a warning.
    """
    device = next(iter(subjects.values())).system.device
    works, peaks, stages = {}, {}, {}
    for name, of_name in subjects.items():
        host_B3tt, text = _images(of_name.system, batch), of_name.text(batch)
        work = partial(_restore, of_name.system, host_B3tt, text)
        try:
            peaks[name] = _peak(work, of_name.system, text)
        except RuntimeError as error:  # out of memory, a kernel that cannot be compiled, a graph not recorded
            LOG.warning("%s at batch %d is not measured: %s", name, batch, reason(error))
            continue
        works[name] = work
        stages[name] = _stages(of_name.system, host_B3tt, text, folder, color)
    wholes = in_turns(works, repeats, warmup, device)
    parts = _time_stages_in_turns(stages, repeats, warmup, device)
    return [
        Speed(name, batch, subjects[name].precision, wholes[name], of_stages, peaks[name])
        for name in works
        for of_stages in [_stage_speeds(stages[name], parts[name], subjects[name], batch)]
    ]


def _restore(system: VARestorer, host_B3tt: Tensor, text: Any) -> Tensor:
    images_B3tt = host_B3tt.to(system.device, non_blocking=True)
    return system.restore_batch(images_B3tt, text=text).images_B3HW.cpu()


def _stages(system: VARestorer, host_B3tt: Tensor, text: Any, folder: Path, color: str) -> list[Stage]:
    if system.graphs is not None:
        return []
    return restoring_stages(system, host_B3tt.to(system.device), text, folder, color)


def _time_stages_in_turns(
    stages: Mapping[str, list[Stage]], repeats: int, warmup: int, device: torch.device
) -> dict[str, dict[str, Timing]]:
    clock = Clock(device)
    timings = {name: {stage.name: Timing() for stage in of_variant} for name, of_variant in stages.items()}
    for turn in range(warmup + max(1, repeats)):
        for name, of_variant in stages.items():
            taken = time_stages(of_variant, clock)
            if turn >= warmup:
                for stage, seconds in taken.items():
                    timings[name][stage].seconds.append(seconds)
    return timings


def _stage_speeds(
    stages: list[Stage], timings: Mapping[str, Timing], of_variant: Subject, batch: int
) -> tuple[StageSpeed, ...]:
    sizes = least_bytes(stages)
    return tuple(
        StageSpeed(
            name,
            timing,
            batch * of_variant.counted.get(name, 0),
            batch * of_variant.formula[name] if name in of_variant.formula else None,
            None if name in ON_HOST else sizes[name],
        )
        for name, timing in timings.items()
    )


def _peak(work: Callable[[], object], system: VARestorer, text: Any) -> int | None:
    """Weights and kept text, what the first run leaves behind (the memory of CUDA graphs), and what a run takes."""
    before = held_memory(system.device)
    work()
    left = held_memory(system.device) - before
    working = peak_memory(work, system.device)
    return None if working is None else weight_bytes([system]) + num_bytes(tensors_of(text)) + left + working


def _images(system: VARestorer, batch: int) -> Tensor:
    """Noise in [0, 1] in the host's memory, pinned where that helps."""
    side = system.tile
    images_B3tt = torch.rand(batch, 3, side, side, generator=torch_generator(0, "speed"))
    return images_B3tt.pin_memory() if system.device.type == "cuda" else images_B3tt
