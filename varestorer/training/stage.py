"""One stage while it trains: its steps, and what is checked, measured and saved around them."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from varestorer.training.checkpoint import Checkpointer, Score, Trained
from varestorer.training.config import TrainerConfig
from varestorer.training.optim import (
    Ema,
    OptimizerFactory,
    build_optimizer,
    clip_gradients,
    gradient_norm,
    nonfinite_gradients,
)
from varestorer.training.parallel import no_gradient_sync, shard, unsharded
from varestorer.training.run import NONFINITE, Run
from varestorer.training.scores import ImageScores
from varestorer.training.stopping import StoppedError
from varestorer.training.task import Batch, Task, keep_base_in, to_device
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.seeds import seed_everything
from varestorer.weights.runs import tensors_sha256

LOG = logging.getLogger(__name__)
VALIDATION = "val/"  # in front of keys that are of held-out pairs
NAMES_SHOWN = 16  # file names of a bad batch in its error message
# dense bfloat16 operations per second, from the makers' data sheets; the first name that fits counts
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


@dataclass(frozen=True)
class Gradients:
    """What one optimizer step is about to use, the same in every process but for the names.

    Attributes:
        losses: `loss` and its parts.
        norm: of the gradients, before clipping.
        names: files of this process's samples.
        keys: their sample numbers.
        stop: some process was asked to stop.
    """

    losses: dict[str, float]
    norm: float
    names: list[str]
    keys: list[int]
    stop: bool


@dataclass
class Stage:
    """A task on its device, wrapped for all processes, with its optimizer and averages."""

    task: Task
    model: nn.Module  # the task, or DDP around it
    cfg: TrainerConfig
    run: Run
    trained: Trained
    checkpointer: Checkpointer
    meter: Meter
    scores: ImageScores
    keys: tuple[str, ...] = ()  # of the last line of metrics
    pictured: int = 0  # last step with pictures

    @classmethod
    def start(
        cls,
        task: Task,
        cfg: TrainerConfig,
        factory: OptimizerFactory,
        run: Run,
        data: Mapping[str, str] | None = None,
        scores: ImageScores | None = None,
    ) -> Stage:
        """Prepare a task and, if the run has a checkpoint of its stage, go on from that; `data`: see `Checkpointer`."""
        accelerator = run.accelerator
        seed_everything(run.seed, "stage", task.name, accelerator.process_index)
        frozen = tensors_sha256(task.frozen_state())
        if cfg.keeps_base_in_bf16(accelerator.device):
            keep_base_in(task, torch.bfloat16)
        task.to(accelerator.device).train()
        model: nn.Module = task
        if cfg.sharding == "fsdp2":
            shard(task, accelerator.device, bf16=cfg.uses_bf16(accelerator.device))
            optimizer = build_optimizer(task, factory)
        else:
            model, wrapped = accelerator.prepare(task, build_optimizer(task, factory))
            optimizer = wrapped.optimizer
        parameters = task.trainable_parameters()
        trained = Trained(parameters, optimizer, Ema(task.averaged_parameters(), cfg.ema_decay))
        index = run.stage_index(task.name)
        checkpointer = Checkpointer(
            run.run_dir, task.name, index, accelerator, frozen, cfg.keep_last, data, run.accept_other_data
        )
        checkpointer.restore(trained)
        run.rewind(task.name, trained.step)
        meter = Meter(accelerator.device, cfg.batch_size, cfg.accumulate)
        return cls(task, model, cfg, run, trained, checkpointer, meter, scores or ImageScores())

    def backward(self, batches: Iterator[Mapping[str, Any]], step: int) -> Gradients:
        """Gradients of one optimizer step, clipped; losses are means over micro-batches and processes."""
        accelerator, count = self.run.accelerator, self.cfg.accumulate
        totals: dict[str, Tensor] = {}
        names: list[str] = []
        keys: list[int] = []
        self.meter.begin()
        for micro in range(count):
            batch = next(batches)
            names.extend(batch["name"])
            keys.extend(batch["key"].tolist())
            # gradients are averaged over processes in the backward pass; once per step is enough
            waits = contextlib.nullcontext() if micro == count - 1 else self._no_sync()
            with waits, self.meter.micro_batch():
                with self._autocast():
                    losses = self.model(self._to_device(batch), step)
                accelerator.backward(losses["loss"] / count)
            for key, value in losses.items():
                totals[key] = totals.get(key, 0.0) + value.detach().float() / count
        asked = torch.full((), float(bool(self.run.stop.received)), device=accelerator.device)
        means_P = accelerator.reduce(torch.stack([*totals.values(), asked]), reduction="mean")
        total_norm = gradient_norm(self.trained.parameters)
        # the only time in a step that the host waits for the device
        *means, stop, norm = torch.cat([means_P, total_norm.to(means_P)[None]]).tolist()
        if self.cfg.clip_norm is not None and math.isfinite(norm):
            clip_gradients(self.trained.parameters, total_norm, self.cfg.clip_norm)
        return Gradients(dict(zip(totals, means, strict=True)), norm, names, keys, stop > 0)

    def update(self, gradients: Gradients, step: int) -> None:
        """Take the optimizer step, unless something is not finite.

        Raises:
            UserError: something is not finite, for more than `cfg.skip_nonfinite` steps in a row.
        """
        trained = self.trained
        problem = self._nonfinite(gradients)
        trained.skipped = 0 if problem is None else trained.skipped + 1
        if problem is None:
            trained.optimizer.step()
            trained.ema.update(step)
        else:
            self._skip_or_stop(problem, gradients, step)
        trained.optimizer.zero_grad(set_to_none=True)
        trained.step, trained.samples = step, trained.samples + self.cfg.batch_size

    def log(self, gradients: Gradients, lr: float, validation: Sequence[Mapping[str, Any]]) -> None:
        """Note a step that was taken, with a validation if it is due and there are batches for it.

        Raises:
            UsageError: `cfg.keep_best` is none of the numbers.
        """
        values = dict(gradients.losses)
        if validation and self.cfg.validate_every and self.due(self.cfg.validate_every):
            values |= self._validate(validation)
        speed = self.meter.end()
        step, skipped = self.trained.step, bool(self.trained.skipped)
        self.run.log(self.task.name, step, values, lr, gradients.norm, skipped=skipped, speed=speed)
        self.keys = (*values, "grad_norm")
        self._check_keep_best()

    def due(self, every: int) -> bool:
        """Whether something is to be done after this step: every so many (0: never), and at the end of the stage."""
        step = self.trained.step
        return step == self.cfg.max_steps or (every > 0 and step % every == 0)

    def save_preview(self, batch: Mapping[str, Any]) -> None:
        """Save pictures made with the averaged weights, unless a validation of this step did."""
        if self.pictured != self.trained.step:
            with self._at_rest():
                on_device = self._to_device(batch)
                self._save_pictures(on_device, self.task.restored(on_device))

    def save(self) -> Path:
        """Write a checkpoint; returns its folder."""
        cfg, trained, score = self.cfg, self.trained, None
        if cfg.keep_best is not None:
            since = trained.step - cfg.checkpoint_every
            key, mode = self._best_key(cfg.keep_best), cfg.keep_best_mode
            if mode == "auto":
                metric = self.scores.metrics.get(self.scores.name_of(key.removeprefix(VALIDATION)) or "")
                mode = "min" if metric is None or metric.lower_is_better else "max"
            score = Score(key, str(mode), self.run.mean_since(self.task.name, since, key))
        self.run.sync_metrics()
        keys = ("max_steps", "warmup_steps", "schedule", "final_lr_ratio", "batch_size")
        schedule = {key: getattr(cfg, key) for key in keys}
        schedule["peak_lr"] = [group["peak_lr"] for group in trained.optimizer.param_groups]
        folder = self.checkpointer.save(trained, schedule, score)
        self.run.log_checkpoint(self.task.name, trained.step, folder)
        return folder

    def finish(self) -> None:
        """Leave the averaged weights, and a base of float32, in the task."""
        self.trained.ema.copy_to_parameters()
        if self.cfg.sharding == "none" and self.cfg.keeps_base_in_bf16(self.run.accelerator.device):
            keep_base_in(self.task, torch.float32)

    def stop(self, folder: Path | None) -> NoReturn:
        """End the run after a signal; `folder` is the checkpoint that was saved, if there was something to save.

        Raises:
            StoppedError: always.
        """
        names = " and ".join(dict.fromkeys(number.name for number in self.run.stop.received)) or "another process"
        place = f"step {self.trained.step} of stage {self.task.name}"
        saved = "nothing new to save" if folder is None else f"saved {folder}"
        raise StoppedError(f"stopped by {names} after {place}: {saved}")

    def _best_key(self, wanted: str) -> str:
        """The key of `metrics.jsonl` that `keep_best` names: `musiq` is `val/musiq`."""
        is_score = wanted not in self.keys and self.scores.name_of(wanted) is not None
        return f"{VALIDATION}{wanted}" if is_score else wanted

    def _check_keep_best(self) -> None:
        cfg, known = self.cfg, self.keys
        key = None if cfg.keep_best is None else self._best_key(cfg.keep_best)
        if key is None or key in known:
            return
        # what is validated comes later, and a score that cannot run here was warned of
        validated = any(name.startswith(VALIDATION) for name in known)
        score = self.scores.name_of(key.removeprefix(VALIDATION))
        awaited = not validated or (score is not None and score not in self.scores.metrics)
        if not (cfg.validate_every and key.startswith(VALIDATION) and awaited):
            raise UsageError(
                f"stage {self.task.name} has no trainer.keep_best={cfg.keep_best}; it has {', '.join(known)}"
                + ("" if cfg.validate_every else ", and val/loss, scores and the like with trainer.validate_every=N")
            )

    def _validate(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Means over held-out batches, with the averaged weights, as `val/<part>`: of the losses with the true coarser
        codes, and of the scores of pictures restored without them. Shows those of the first batch.
        """
        totals: dict[str, float] = {}
        count = sum(len(batch["name"]) for batch in batches)
        with self._at_rest():
            for number, batch in enumerate(batches):
                on_device = self._to_device(batch)
                restored = self.task.restored(on_device)
                if number == 0:
                    self._save_pictures(on_device, restored)
                scores = self.scores(self.task.compared(on_device, restored))
                for name, value in (self.task(on_device, 0) | scores).items():
                    key = f"{VALIDATION}{name}"
                    totals[key] = totals.get(key, 0.0) + float(value) * len(batch["name"]) / count
        return totals

    def _save_pictures(self, batch: Batch, restored: Mapping[str, Tensor]) -> None:
        self.run.save_samples(self.task.name, self.trained.step, self.task.preview(batch, restored))
        self.pictured = self.trained.step

    def _nonfinite(self, gradients: Gradients) -> str | None:
        """What is not finite, in words."""
        losses = gradients.losses
        if not math.isfinite(losses["loss"]):
            parts = [key for key, value in losses.items() if key != "loss" and not math.isfinite(value)]
            values = ", ".join(f"{key}={value:.4g}" for key, value in losses.items())
            return f"loss part {', '.join(parts or ['loss'])} is not finite ({values})"
        if not math.isfinite(gradients.norm):
            bad = nonfinite_gradients(self.trained.parameters) or ["all together (overflow of the norm)"]
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            return f"gradient of {bad[0]}{more} is not finite, though the loss is"
        return None

    def _skip_or_stop(self, problem: str, gradients: Gradients, step: int) -> None:
        # every process comes here: what was added up over them is finite in none of them
        names, keys = gather_object(gradients.names), gather_object(gradients.keys)
        self.run.log_nonfinite(self.task.name, step, problem, names, keys)
        problem = f"step {step} of stage {self.task.name}: {problem}"
        if self.trained.skipped <= self.cfg.skip_nonfinite:
            LOG.warning("%s; left out (%d in a row)", problem, self.trained.skipped)
            return
        files = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
        raise UserError(
            f"{problem}; stopped before the optimizer step. Files of the batch: {files} (all of them in "
            f"{self.run.run_dir / NONFINITE}). Look at these, lower optimizer.lr, use trainer.precision=fp32, or leave "
            "out a few such steps with trainer.skip_nonfinite=N"
        )

    @contextlib.contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Averaged weights, no dropout, no gradients, and the generators as they were afterwards."""
        device = self.run.accelerator.device
        forked = [device] if device.type == "cuda" else []
        self.task.eval()
        averaged = self.trained.ema.in_place()
        with torch.random.fork_rng(forked), averaged, unsharded(self.task), torch.no_grad(), self._autocast():
            yield
        self.task.train()

    def _no_sync(self) -> contextlib.AbstractContextManager[Any]:
        if self.cfg.sharding == "fsdp2":
            return no_gradient_sync(self.task)
        return self.run.accelerator.no_sync(self.model)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        device = self.run.accelerator.device
        enabled = self.cfg.uses_bf16(device)
        return torch.autocast(device.type, dtype=torch.bfloat16) if enabled else contextlib.nullcontext()

    def _to_device(self, batch: Mapping[str, Any]) -> Batch:
        return to_device(batch, self.run.accelerator.device)


class Meter:
    """Measures the steps of one stage in this process.

    Model FLOPs utilization (MFU) is given on devices of `PEAK_FLOPS`: the operations of the first micro-batch's forward
    and backward pass as torch counts them (matrix products, convolutions, attention; activations computed again count
    again), over the time they take and the device's bfloat16 peak, whatever the precision. Images per second stand for
    tokens per second too: every image of a stage has the same number of tokens.
    """

    def __init__(self, device: torch.device, samples: int, micro_batches: int) -> None:
        """Of an optimizer step: `samples` over all processes, `micro_batches` of this one."""
        self._device = device
        self._samples = samples
        self._micro_batches = micro_batches
        self._peak = _peak_flops(device)
        self._flops: int | None = None  # of a micro-batch
        self._began = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._began = time.perf_counter()

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Count the operations of a forward and backward pass, once, where they are of use; that step is slower."""
        if self._peak is None or self._flops is not None:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self._flops = counter.get_total_flops()

    def end(self) -> dict[str, float]:
        """A step ends, once its numbers are known: `images_per_second`, `memory_gb` and, where known, `mfu`.

        `memory_gb` is the most that the device's tensors, or on the CPU this process, took so far (10^9 bytes).
        """
        seconds = time.perf_counter() - self._began
        values = {"images_per_second": self._samples / seconds, "memory_gb": peak_memory(self._device) / 1e9}
        if self._peak is not None and self._flops is not None:
            values["mfu"] = self._flops * self._micro_batches / seconds / self._peak
        return values


def _peak_flops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Bytes that tensors on a GPU took at most, or this process on a CPU (0 where the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest
