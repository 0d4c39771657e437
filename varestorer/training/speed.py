"""How long a training step takes, part by part, and how much of a device's rate it uses; variants take turns.

Model FLOPs are what the losses and their gradients need: the operations that torch counts (products of matrices,
convolutions, attention) in a step that computes nothing twice. What checkpointing computes again takes time but adds
no model FLOPs, so it shows in the share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from varestorer.training.distillation import DistillationTask
from varestorer.training.ema import Ema
from varestorer.training.optimisers import OptimizerFactory, build_optimizer, clip_gradients, gradient_norm
from varestorer.training.precision import keep_base_in
from varestorer.training.task import Batch, Task
from varestorer.transformer import VARTransformer
from varestorer.transformer.blocks import Block
from varestorer.utils.errors import UsageError
from varestorer.utils.seeds import torch_generator
from varestorer.utils.timing import Clock, Mark, Timing

BACKWARD, OPTIMISER, REST = "backward", "optimiser", "the rest"
WORDS = ("eager", "bf16", "checkpoint", "compile", "slices")


@dataclass(frozen=True)
class StepVariant:
    """How a step is taken; the default is in float32, with all activations kept.

    Attributes:
        bf16: under bfloat16 autocast.
        checkpoint: compute the blocks again in the backward pass.
        compile: the blocks through torch.compile.
        slices: decode and compare images one by one (`distillation.StraightThrough.image_slices`).
    """

    bf16: bool = False
    checkpoint: bool = False
    compile: bool = False
    slices: bool = False

    @classmethod
    def parse(cls, text: str) -> StepVariant:
        """A variant by its name: "eager", or some of `WORDS` joined by "+".

        Raises:
            UsageError: an unknown word.
        """
        variant = cls()
        for word in text.split("+"):
            if word not in WORDS:
                raise UsageError(f"a variant of what=train_step joins some of {', '.join(WORDS)} by +, got {text!r}")
            if word != "eager":
                variant = replace(variant, **{word: True})
        return variant


class TrainStep:
    """Optimiser steps of a task on one made-up batch, taken as `stage.Stage` takes them.

    Args:
        task: on its device, with any weights; it is changed.
        optimizer: as for `fit`.
        batch_size: images of a step.
        side: of the images, pixels.
        bf16_base: keep the frozen matrices of the blocks in bfloat16 while a variant computes in it.
    """

    def __init__(
        self, task: Task, optimizer: OptimizerFactory, batch_size: int, side: int, bf16_base: bool = False
    ) -> None:
        self.task = task.train()
        self.device = next(task.parameters()).device
        self.parameters = task.trainable_parameters()
        self.optimizer = build_optimizer(task, optimizer)
        self.averages = Ema(task.averaged_parameters(), 0.99)
        self.batch = made_up_batch(batch_size, side, self.device)
        self.bf16_base = bf16_base
        self._number = 0

    @contextmanager
    def prepared(self, variant: StepVariant) -> Iterator[None]:
        """Make the task take steps of a variant inside of the block.

        Raises:
            UsageError: slices of a task that decodes no straight-through bits.
        """
        task = self.task
        if isinstance(task, DistillationTask):
            task.straight_through = replace(task.straight_through, image_slices=variant.slices)
        elif variant.slices:
            raise UsageError(f"variants with slices are of distillation; {type(task).__name__} has none")
        for module in task.modules():
            if isinstance(module, VARTransformer):
                module.checkpoint_activations = variant.checkpoint
            if variant.compile and isinstance(module, Block) and module._compiled_call_impl is None:
                module.compile()
        if self.bf16_base:
            keep_base_in(task, torch.bfloat16 if variant.bf16 else torch.float32)
        with torch.compiler.set_stance("default" if variant.compile else "force_eager"):
            yield

    def run(self, bf16: bool) -> None:
        """Take one step, as the task is now."""
        self._number += 1
        self.gradients(bf16)
        with self.task.watch(OPTIMISER):
            clip_gradients(self.parameters, gradient_norm(self.parameters), 1.0)
            self.optimizer.step()
            self.averages.update(self._number)
            self.optimizer.zero_grad(set_to_none=True)

    def gradients(self, bf16: bool) -> None:
        """Add the gradients of the batch to those that are there."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = self.task(self.batch, max(1, self._number))["loss"]
        with self.task.watch(BACKWARD):
            loss.backward()


def made_up_batch(batch_size: int, side: int, device: torch.device) -> Batch:
    """Noise as images, without prompts."""
    images = torch.rand(2, batch_size, 3, side, side, generator=torch_generator(0, "made-up batch"))
    hq, lq = images.to(device)
    return {"hq": hq, "lq": lq, "name": [str(n) for n in range(batch_size)], "key": torch.arange(batch_size)}


@dataclass
class StepSpeed:
    """What a variant's steps take.

    Attributes:
        variant: which.
        batch: images of a step.
        whole: seconds of a step.
        parts: seconds by part, in the order of a step; what no part holds is `REST`.
        flops: model FLOPs of a step by part.
        peak_bytes: most that a step took beyond what is there between steps; None where it cannot be told.
    """

    variant: StepVariant
    batch: int
    whole: Timing = field(default_factory=Timing)
    parts: dict[str, Timing] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    peak_bytes: int | None = None

    @property
    def images_per_second(self) -> float:
        """At the median."""
        return self.batch / self.whole.median

    @property
    def rate(self) -> float:
        """Model FLOPs a second, at the median."""
        return sum(self.flops.values()) / self.whole.median


PeakMemory = Callable[[Callable[[], object], torch.device], int | None]


def measure_steps(
    step: TrainStep, variants: Mapping[str, StepVariant], repeats: int, warmup: int, peak: PeakMemory
) -> dict[str, StepSpeed]:
    """Time variants in turns (A B A B), after counting operations and memory of each.

    Args:
        step: of the task.
        variants: by name.
        repeats: timed steps of each, at least one.
        warmup: steps of each before, at least one.
        peak: tells the peak memory of a piece of work on a device.
    """
    speeds = {name: StepSpeed(variant, len(step.batch["name"])) for name, variant in variants.items()}
    for speed in speeds.values():
        speed.flops = counted(step, speed.variant)
        with step.prepared(speed.variant):
            for _ in range(max(1, warmup)):
                step.run(speed.variant.bf16)
            speed.peak_bytes = peak(lambda bf16=speed.variant.bf16: step.run(bf16), step.device)  # type: ignore[misc]
    for _ in range(max(1, repeats)):
        for speed in speeds.values():
            with step.prepared(speed.variant):
                _time(step, speed)
    return speeds


def counted(step: TrainStep, variant: StepVariant) -> dict[str, int]:
    """Model FLOPs of a step by part: nothing is computed twice for it."""
    once = replace(variant, checkpoint=False, slices=False, compile=False)
    with step.prepared(once), FlopCounterMode(display=False) as counter:
        watch = _Watch(counter.get_total_flops)
        with _watched(step.task, watch):
            step.run(once.bf16)
        total = counter.get_total_flops()
    flops = watch.sums(lambda start, end: end - start)
    return {**flops, REST: total - sum(flops.values())}


def _time(step: TrainStep, speed: StepSpeed) -> None:
    """Add one step's times to a variant's."""
    clock = Clock(step.device)
    watch = _Watch(clock.mark)
    clock.synchronize()
    start = clock.mark()
    with _watched(step.task, watch):
        step.run(speed.variant.bf16)
    whole = clock.between(start, clock.mark())
    seconds = watch.sums(clock.between)
    speed.whole.seconds.append(whole)
    for name, value in {**seconds, REST: whole - sum(seconds.values())}.items():
        speed.parts.setdefault(name, Timing()).seconds.append(value)


class _Watch:
    """Reads an instrument when a part of a step begins and when it ends.

    Args:
        read: the instrument.
    """

    def __init__(self, read: Callable[[], Mark]) -> None:
        self._read = read
        self._readings: list[tuple[str, Mark, Mark]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._read()
        yield
        self._readings.append((name, start, self._read()))

    def sums(self, between: Callable[[Mark, Mark], Any]) -> dict[str, Any]:
        """What the parts took, in the order in which they ended first."""
        found: dict[str, Any] = {}
        for name, start, end in self._readings:
            found[name] = found.get(name, 0) + between(start, end)
        return found


@contextmanager
def _watched(task: nn.Module, watch: _Watch) -> Iterator[None]:
    """Let a watch see the parts of a task's steps."""
    task.watch = watch  # type: ignore[assignment]
    try:
        yield
    finally:
        del task.watch
