"""The one training loop, for every stage, on Accelerate: one process and many are the same code."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from varestorer.data import build_loader
from varestorer.training.checkpoint import Checkpointer, Trained
from varestorer.training.config import Precision, TrainerConfig
from varestorer.training.ema import Ema
from varestorer.training.optimisers import (
    OptimizerFactory,
    build_optimizer,
    clip_gradients,
    nonfinite_gradients,
    set_learning_rate,
)
from varestorer.training.rng import seed_everything
from varestorer.training.run import Run
from varestorer.training.task import Batch, Task
from varestorer.utils.device import pick_device
from varestorer.utils.errors import UsageError, UserError
from varestorer.weights import storage

if TYPE_CHECKING:
    from accelerate import Accelerator

NAMES_SHOWN = 16  # file names of a bad batch in its error message


def fit(
    task: Task,
    dataset: Dataset,
    cfg: TrainerConfig,
    optimizer: OptimizerFactory,
    run: Run,
    *,
    preview: Mapping[str, Any] | None = None,
) -> None:
    """Train a task from scratch, or from the newest checkpoint of its stage in `run`, to `cfg.max_steps`.

    Leaves the averaged (EMA) weights in the task, ready for the next stage.

    Args:
        task: what to train; its `name` is the stage.
        dataset: map-style over the endless global sample number (see `varestorer.data`).
        cfg: how; `batch_size` counts over all processes and micro-batches.
        optimizer: takes parameter groups, such as `functools.partial(torch.optim.AdamW, lr=1e-4)`.
        run: where metrics, pictures and checkpoints go.
        preview: fixed held-out batch for the pictures; None for no pictures.
    Raises:
        UserError: a loss or gradient is not finite (before it can reach the weights), or a file problem.
        UsageError: the batch size does not divide by the number of processes times `cfg.accumulate`.
    """
    stage = _Stage.start(task, cfg, optimizer, run)
    trained, checkpointer = stage.trained, stage.checkpointer
    if trained.step < cfg.max_steps:
        batches = _batches(dataset, cfg, trained.samples, run.accelerator)
        with _progress(task.name, trained.step, cfg.max_steps, run.is_main) as bar:
            for step in range(trained.step + 1, cfg.max_steps + 1):
                lr = set_learning_rate(trained.optimizer, cfg.learning_rate_factor(step))
                losses, names = stage.backward(batches, step)
                stage.check_losses(losses, names, step)
                grad_norm = clip_gradients(trained.parameters, cfg.clip_norm)
                stage.check_gradients(grad_norm, names, step)
                trained.optimizer.step()
                trained.optimizer.zero_grad(set_to_none=True)
                trained.ema.update(step)
                trained.step, trained.samples = step, trained.samples + cfg.batch_size
                run.log(task.name, step, losses, lr, grad_norm)
                bar.set_postfix(loss=f"{losses['loss']:.4g}", refresh=False)
                bar.update()
                if preview is not None and _due(step, cfg.sample_every, cfg.max_steps):
                    stage.save_preview(preview)
                if _due(step, cfg.checkpoint_every, cfg.max_steps):
                    run.sync_metrics()
                    checkpointer.save(trained, _schedule_record(cfg, trained))
    trained.ema.copy_to_parameters()
    run.accelerator.free_memory()


def make_accelerator(device: str = "auto") -> Accelerator:
    """Accelerate's handle on this process and the others.

    Mixed precision is left out of it: `fit` does its own autocast, because stages may differ in it.

    Raises:
        UserError: the device is not there.
    """
    from accelerate import Accelerator

    return Accelerator(cpu=pick_device(device).type == "cpu", mixed_precision="no")


@dataclass
class _Stage:
    """A task on its device, wrapped for all processes, with its optimiser and averages."""

    task: Task
    model: nn.Module  # the task, or DDP around it
    cfg: TrainerConfig
    run: Run
    trained: Trained
    checkpointer: Checkpointer

    @classmethod
    def start(cls, task: Task, cfg: TrainerConfig, factory: OptimizerFactory, run: Run) -> _Stage:
        """Prepare a task and, if the run has a checkpoint of its stage, go on from that."""
        accelerator = run.accelerator
        seed_everything(run.seed, "stage", task.name, accelerator.process_index)
        task.to(accelerator.device).train()
        model, wrapped = accelerator.prepare(task, build_optimizer(task, factory))
        parameters = task.trainable_parameters()
        trained = Trained(parameters, wrapped.optimizer, Ema(parameters, cfg.ema_decay))
        frozen = storage.tensors_sha256(task.frozen_state())
        index = run.stage_index(task.name)
        checkpointer = Checkpointer(run.run_dir, task.name, index, accelerator, frozen, cfg.keep_last)
        checkpointer.restore(trained)
        run.rewind(task.name, trained.step)
        return cls(task, model, cfg, run, trained, checkpointer)

    def backward(self, batches: Iterator[Mapping[str, Any]], step: int) -> tuple[dict[str, float], list[str]]:
        """Gradients of one optimiser step.

        Returns:
            `loss` and parts as means over micro-batches and processes, and the file names of this process.
        """
        accelerator, count = self.run.accelerator, self.cfg.accumulate
        totals: dict[str, Tensor] = {}
        names: list[str] = []
        for micro in range(count):
            batch = _to_device(next(batches), accelerator.device)
            names.extend(batch["name"])
            last = micro == count - 1
            # DDP averages gradients over processes in the backward pass; once per step is enough
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                with self._autocast():
                    losses = self.model(batch, step)
                accelerator.backward(losses["loss"] / count)
            for key, value in losses.items():
                totals[key] = totals.get(key, 0.0) + value.detach().float() / count
        means = accelerator.reduce(torch.stack(list(totals.values())), reduction="mean").tolist()
        return dict(zip(totals, means, strict=True)), names

    def check_losses(self, losses: Mapping[str, float], names: list[str], step: int) -> None:
        """Stop before a loss that is not finite can reach the weights."""
        if not math.isfinite(losses["loss"]):
            parts = [key for key, value in losses.items() if key != "loss" and not math.isfinite(value)]
            bad = ", ".join(parts or ["loss"])
            values = ", ".join(f"{key}={value:.4g}" for key, value in losses.items())
            self._stop(f"loss part {bad} is not finite ({values})", names, step)

    def check_gradients(self, norm: float, names: list[str], step: int) -> None:
        """Stop before a gradient that is not finite can reach the weights."""
        if not math.isfinite(norm):
            bad = nonfinite_gradients(self.trained.parameters) or ["all together (overflow of the norm)"]
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            self._stop(f"gradient of {bad[0]}{more} is not finite, though the loss is", names, step)

    def save_preview(self, batch: Mapping[str, Any]) -> None:
        """Save pictures made with the averaged weights; training goes on as if nothing had happened."""
        if not self.run.is_main:
            return
        device = self.run.accelerator.device
        forked = [device] if device.type == "cuda" else []
        self.task.eval()
        with torch.random.fork_rng(forked), self.trained.ema.in_place(), torch.no_grad(), self._autocast():
            columns = self.task.preview(_to_device(batch, device))
        self.task.train()
        self.run.save_samples(self.task.name, self.trained.step, columns)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        device = self.run.accelerator.device.type
        auto = self.cfg.precision is Precision.auto and device == "cuda"
        if not auto and self.cfg.precision is not Precision.bf16:
            return contextlib.nullcontext()
        return torch.autocast(device, dtype=torch.bfloat16)

    def _stop(self, problem: str, names: list[str], step: int) -> None:
        files = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
        raise UserError(
            f"step {step} of stage {self.task.name}: {problem}; stopped before the optimiser step. "
            f"Files of the batch: {files}. Look at these, lower optimizer.lr, or use trainer.precision=fp32"
        )


def _batches(dataset: Dataset, cfg: TrainerConfig, start: int, accelerator: Accelerator) -> Iterator[Mapping[str, Any]]:
    """Micro-batches of this process, from global sample `start` on, without end."""
    parts = accelerator.num_processes * cfg.accumulate
    if cfg.batch_size % parts:
        raise UsageError(
            f"trainer.batch_size={cfg.batch_size} has to be a multiple of processes x accumulate = "
            f"{accelerator.num_processes} x {cfg.accumulate}"
        )
    loader = build_loader(
        dataset,
        cfg.batch_size // parts,
        start_sample=start,
        num_workers=cfg.num_workers,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    return iter(loader)


def _schedule_record(cfg: TrainerConfig, trained: Trained) -> dict[str, Any]:
    peak = [group["peak_lr"] for group in trained.optimizer.param_groups]
    keys = ("max_steps", "warmup_steps", "schedule", "final_lr_ratio", "batch_size")
    return {**{key: getattr(cfg, key) for key in keys}, "peak_lr": peak}


def _progress(stage: str, done: int, total: int, shown: bool) -> tqdm:
    """Bar with the loss and the time left; into a log file it writes a line every ten seconds."""
    every = 0.5 if sys.stderr.isatty() else 10.0
    return tqdm(
        desc=stage,
        initial=done,
        total=total,
        unit="step",
        disable=not shown,
        mininterval=every,
        maxinterval=every,
    )


def _to_device(batch: Mapping[str, Any], device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)
