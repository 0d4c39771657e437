"""The one training loop, for every stage, on Accelerate: one process and many are the same code."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Any

from accelerate import Accelerator
from torch.utils.data import Dataset
from tqdm import tqdm

from varestorer.data import build_loader
from varestorer.data.loader import WORKERS_KEY
from varestorer.data.store import contents_of
from varestorer.data.workers import StopWaitingError, deaths_explained
from varestorer.training.config import TrainerConfig
from varestorer.training.optim import OptimizerFactory, set_learning_rate
from varestorer.training.run import Run
from varestorer.training.scores import ImageScores
from varestorer.training.stage import Stage
from varestorer.training.stopping import held_back, leave_signals_to_parent
from varestorer.training.task import Task
from varestorer.utils.device import pick_device
from varestorer.utils.errors import UsageError


def fit(
    task: Task,
    dataset: Dataset,
    cfg: TrainerConfig,
    optimizer: OptimizerFactory,
    run: Run,
    *,
    preview: Mapping[str, Any] | None = None,
    validation: Sequence[Mapping[str, Any]] = (),
    scores: ImageScores | None = None,
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
        validation: held-out batches for `cfg.validate_every`; the first one's pictures are shown.
        scores: metrics of their pictures.
    Raises:
        UserError: a loss or gradient is not finite (before it can reach the weights), or a file problem.
        UsageError: the batch size does not divide by the number of processes times `cfg.accumulate`, or
            `cfg.keep_best` names no metric.
        StoppedError: a signal came (`run.stop`) and a checkpoint was saved.
    """
    stage = Stage.start(task, cfg, optimizer, run, contents_of(dataset) if run.is_main else None, scores)
    trained = stage.trained
    if trained.step < cfg.max_steps:
        bar = _progress(task.name, trained.step, cfg.max_steps, run.is_main)
        first = trained.step
        with deaths_explained(WORKERS_KEY), bar, closing(_batches(dataset, cfg, trained.samples, run)) as batches:
            for step in range(first + 1, cfg.max_steps + 1):
                lr = set_learning_rate(trained.optimizer, cfg.learning_rate_factor(step))
                try:
                    gradients = stage.backward(batches, step)
                except StopWaitingError:
                    stage.stop(stage.save() if trained.step > first else None)
                stage.update(gradients, step)
                stage.log(gradients, lr, validation)
                bar.set_postfix(loss=f"{gradients.losses['loss']:.4g}", refresh=False)
                bar.update()
                if preview is not None and stage.due(cfg.sample_every):
                    stage.save_preview(preview)
                if gradients.stop:
                    stage.stop(stage.save())
                if stage.due(cfg.checkpoint_every):
                    stage.save()
    stage.finish()
    run.accelerator.free_memory()


def make_accelerator(device: str = "auto") -> Accelerator:
    """Accelerate's handle on this process and the others.

    Mixed precision is left out of it: `fit` does its own autocast, because stages may differ in it.

    Raises:
        UserError: the device is not there.
        UsageError: a launcher's own FSDP, which would wrap other parts than `parallel.shard` and save them otherwise.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        raise UsageError("shard by trainer.sharding=fsdp2, and launch without FSDP in accelerate's own config")

    return Accelerator(cpu=pick_device(device).type == "cpu", mixed_precision="no")


def _batches(dataset: Dataset, cfg: TrainerConfig, start: int, run: Run) -> Generator[Mapping[str, Any], None, None]:
    """Micro-batches of this process, from global sample `start` on; closing it ends the data workers.

    Raises:
        StopWaitingError: a signal came, and no batch comes; between two steps, where a checkpoint can be saved.
    """
    accelerator = run.accelerator
    loader = build_loader(
        dataset,
        cfg.micro_batch(accelerator.num_processes),
        start_sample=start,
        num_workers=cfg.num_workers,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        prepare_worker=leave_signals_to_parent,
    )
    given = 0
    # the other processes of a run would wait for this one; and a step that was begun has drawn numbers already
    is_alone = accelerator.num_processes == 1
    loader.wants_stop = lambda: bool(run.stop.received) and is_alone and given % cfg.accumulate == 0
    with held_back():
        batches = iter(loader)  # starts the workers
    for batch in batches:
        given += 1
        yield batch


def _progress(stage: str, done: int, total: int, shown: bool) -> tqdm:
    """Bar with the loss and the time left; into a log file it writes a line every ten seconds."""
    every = 0.5 if sys.stderr.isatty() else 10.0
    return tqdm(
        desc=stage, initial=done, total=total, unit="step", disable=not shown, mininterval=every, maxinterval=every
    )
