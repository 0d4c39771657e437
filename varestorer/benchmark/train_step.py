"""`benchmark what=train_step`: how long a training step takes, part by part, by variants in turns; and what feeds it.

Model FLOPs are what the losses and their gradients need: the operations that torch counts (products of matrices,
convolutions, attention) in a step that computes nothing twice. What checkpointing computes again takes time but adds
no model FLOPs, so it shows in the share of the rate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from varestorer.benchmark.counting import Count, count
from varestorer.benchmark.measure import Measured, Work
from varestorer.benchmark.networks import words_of
from varestorer.benchmark.report import Report, Run
from varestorer.benchmark.roofline import Rates
from varestorer.data.datasets import PhotoCrops
from varestorer.data.degradation import Degradation
from varestorer.training.optim import Ema, OptimizerFactory, build_optimizer, clip_gradients, gradient_norm
from varestorer.training.task import Batch, Task, keep_base_in
from varestorer.training.tasks.distillation import DistillationTask
from varestorer.transformer import VARTransformer
from varestorer.transformer.blocks import Block
from varestorer.utils.errors import UsageError
from varestorer.utils.seeds import torch_generator
from varestorer.utils.watch import watch

BACKWARD, OPTIMIZER = "backward", "optimizer"
VARIANTS = {"cuda": ("bf16", "bf16+checkpoint", "bf16+compile"), "cpu": ("eager", "bf16", "checkpoint")}
"""What is compared on a device where nothing is said."""
Words = frozenset[str]
PAIRS, WARM_UP = 64, 4  # that are timed; before them files are read and memory is taken


def run(report: Report, make: Callable[[int], TrainStep], device: torch.device, options: Any, folder: Path) -> bool:
    """Measure, print and write; see `restore.run`. `make` gives steps of a number of images, on the device."""
    names = options.variants or VARIANTS.get(device.type, VARIANTS["cpu"])
    chosen = {name: words_of("train_step", name) for name in names}
    rates = Rates.of(device, [precision(words) for words in chosen.values()])
    report.show_rates(rates)
    steps: dict[int, TrainStep] = {}

    def works_of(batch: int) -> dict[str, Work]:
        steps.clear()  # the networks of one size of batch at a time
        steps[batch] = make(batch)
        return {name: steps[batch].work(words) for name, words in chosen.items()}

    def run_of(name: str, batch: int, measured: Measured) -> Run:
        return Run(name, batch, precision(chosen[name]), measured, steps[batch].counts(chosen[name]))

    runs = report.compare(works_of, run_of, rates, device, options)
    report.write(folder, runs, rates, {})
    return len(runs) == len(chosen) * len(options.batch)


def precision(words: Words) -> str:
    """Of a variant's products."""
    return "bf16" if "bf16" in words else "fp32"


class TrainStep:
    """Optimizer steps of a task, which is changed, on one made-up batch, taken as `stage.Stage` takes them.

    With `bf16_base` the frozen matrices of the blocks are in bfloat16 while a variant computes in it.
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
    def prepared(self, words: Words) -> Iterator[None]:
        """Make the task take steps of a variant inside of the block.

        Of its words "bf16" is for autocast, "checkpoint" computes the blocks again in the backward pass, "compile"
        sends them through torch.compile, "slices" decodes and compares images one by one
        (`distillation.StraightThrough.image_slices`), and "eager" says nothing. UsageError: slices of a task that
        decodes no straight-through bits.
        """
        task = self.task
        if isinstance(task, DistillationTask):
            task.straight_through = replace(task.straight_through, image_slices="slices" in words)
        elif "slices" in words:
            raise UsageError(f"variants with slices are of distillation; {type(task).__name__} has none")
        for module in task.modules():
            if isinstance(module, VARTransformer):
                module.checkpoint_activations = "checkpoint" in words
            if "compile" in words and isinstance(module, Block) and module._compiled_call_impl is None:
                module.compile()
        if self.bf16_base:
            keep_base_in(task, torch.bfloat16 if "bf16" in words else torch.float32)
        with torch.compiler.set_stance("default" if "compile" in words else "force_eager"):
            yield

    def work(self, words: Words) -> Work:
        """A step of a variant."""

        def work() -> None:
            with self.prepared(words):
                self.run("bf16" in words)

        return work

    def run(self, bf16: bool) -> None:
        """Take one step, as the task is now."""
        self._number += 1
        self.gradients(bf16)
        with watch(OPTIMIZER):
            clip_gradients(self.parameters, gradient_norm(self.parameters), 1.0)
            self.optimizer.step()
            self.averages.update(self._number)
            self.optimizer.zero_grad(set_to_none=True)

    def gradients(self, bf16: bool) -> None:
        """Add the gradients of the batch to those that are there."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = self.task(self.batch, max(1, self._number))["loss"]
        with watch(BACKWARD):
            loss.backward()

    def counts(self, words: Words) -> dict[str, Count]:
        """Model FLOPs and least bytes of a variant's step: nothing is computed twice for it."""
        return count(self.work(words - {"checkpoint", "slices", "compile"}))


def made_up_batch(batch_size: int, side: int, device: torch.device) -> Batch:
    """Noise as images, without prompts."""
    images = torch.rand(2, batch_size, 3, side, side, generator=torch_generator(0, "made-up batch"))
    hq, lq = images.to(device)
    return {"hq": hq, "lq": lq, "name": [str(n) for n in range(batch_size)], "key": torch.arange(batch_size)}


def pairs_per_second(root: str | None = None, crop: int = 512, num_pairs: int = PAIRS) -> float:
    """Training pairs, `crop` pixels wide, that one core makes in a second of its time, with the published degradation.

    Photographs (of a folder; None: the embedded ones) are decoded once and then cached, as in a small data set; with a
    folder that does not fit the cache decoding is part of what is measured. What else the machine does is not counted,
    nor is waiting for files. UserError: no photographs.
    """
    data = PhotoCrops(root, crop, Degradation(), seed=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for n in range(WARM_UP):
            data[n]
        start = time.process_time()
        for n in range(WARM_UP, WARM_UP + num_pairs):
            data[n]
        return num_pairs / (time.process_time() - start)
    finally:
        torch.set_num_threads(threads)


def loader_report(rate: float, crop: int, pairs: int, seconds: float) -> str:
    """What `benchmark what=loader` prints, given the pairs of side `crop` that one core makes in a second.

    It is held against optimizer steps of `pairs` pairs in `seconds`.
    """
    wanted = pairs / seconds
    return (
        f"pairs of {crop} x {crop}, a second and core: {rate:.1f}\n"
        f"to feed steps of {pairs} pairs in {seconds:g} s ({wanted:.1f} pairs a second): "
        f"{math.ceil(wanted / rate)} cores"
    )
