"""Options of training as dataclasses; importing this module registers them as Hydra schemas.

A key that is not here, or a value of the wrong type, fails when the config is composed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from varestorer.utils.errors import UsageError

if TYPE_CHECKING:
    import torch


HOLD_START = 0.005  # of the peak learning rate, where the warm-up of hold_linear begins
HOLD_SHARE = 0.3  # of the steps after it that are taken at the peak


class Precision(StrEnum):
    """Number format of the forward and backward pass; parameters and optimiser stay float32."""

    auto = "auto"  # bf16 on CUDA, fp32 elsewhere
    fp32 = "fp32"
    bf16 = "bf16"


class Schedule(StrEnum):
    """Shape of the learning rate after warm-up."""

    cosine = "cosine"
    constant = "constant"
    hold_linear = "hold_linear"


class Sharding(StrEnum):
    """How many processes share the weights that train."""

    none = "none"  # each process holds all of them
    fsdp2 = "fsdp2"  # each holds its part


class Best(StrEnum):
    """Which value of a metric is better."""

    auto = "auto"
    min = "min"
    max = "max"


class Resume(StrEnum):
    """What to do about an earlier run."""

    none = "none"
    auto = "auto"


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


@dataclass
class TrainerConfig:
    """How one stage is trained.

    Attributes:
        max_steps: optimiser steps of the stage.
        batch_size: samples per optimiser step over all processes and micro-batches together.
        accumulate: micro-batches per optimiser step (less memory, same result).
        num_workers: data processes per training process; 0 loads in the training process.
        precision: auto, fp32 or bf16.
        base_precision: of frozen matrices in the transformer's blocks; auto is that of the passes. bf16 halves their
            memory and changes nothing in passes of bf16, but they stay rounded for what comes after the stage.
        sharding: none, or fsdp2, which spreads weights, averages and optimiser state over the processes (for networks
            that one GPU cannot train; one stage per run, without a report).
        clip_norm: largest gradient norm; null for no clipping.
        ema_decay: of the averaged weights; it warms up as (1 + step) / (10 + step).
        warmup_steps: of linear warm-up of the learning rate.
        schedule: cosine, constant, or hold_linear (VAR's "lin0": warm-up from 0.005 of the peak, 30 % of the other
            steps at the peak, then a line down).
        final_lr_ratio: learning rate at the end of the cosine or the line, as a part of the peak.
        checkpoint_every: steps between checkpoints; one is always written at the end.
        keep_last: newest checkpoints of a stage that are kept.
        keep_best: a key of `metrics.jsonl`, such as loss or val/mse, or one of the `scores`, such as musiq (val/musiq);
            the checkpoint with the best mean of it over the last `checkpoint_every` steps is kept too, and named in the
            stage's file `best`. null: newest ones only.
        keep_best_mode: whether min or max is best; auto: max for a score that is better when it is higher, else min.
        sample_every: steps between preview pictures; 0 for one at the end only.
        validate_every: steps between validations, also at the end: the losses of all `heldout` pairs with the averaged
            weights, as val/loss, val/mse, ..., the `scores` of what the stage makes of them free-running, as val/psnr,
            val/musiq, ..., and pictures of it; 0 for none.
        skip_nonfinite: so many steps in a row may have a loss or gradient that is not finite; they do not touch the
            weights and are marked `skipped` in `metrics.jsonl`. One more stops the run; 0 stops at the first.
    """

    max_steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    num_workers: int = 2
    precision: Precision = Precision.auto
    base_precision: Precision = Precision.fp32
    sharding: Sharding = Sharding.none
    clip_norm: float | None = 1.0
    ema_decay: float = 0.999
    warmup_steps: int = 0
    schedule: Schedule = Schedule.cosine
    final_lr_ratio: float = 0.0
    checkpoint_every: int = 500
    keep_last: int = 2
    keep_best: str | None = None
    keep_best_mode: Best = Best.auto
    sample_every: int = 500
    validate_every: int = 0
    skip_nonfinite: int = 0

    def __post_init__(self) -> None:
        """Refuse values no run could mean.

        Raises:
            UsageError: names the key, what it was and what it has to be.
        """
        for key in ("max_steps", "batch_size", "accumulate", "checkpoint_every", "keep_last"):
            _require(getattr(self, key) >= 1, key, "1 or more", getattr(self, key))
        for key in ("num_workers", "warmup_steps", "sample_every", "validate_every", "skip_nonfinite"):
            _require(getattr(self, key) >= 0, key, "0 or more", getattr(self, key))
        _require(0 <= self.ema_decay < 1, "ema_decay", "in [0, 1)", self.ema_decay)
        _require(0 <= self.final_lr_ratio <= 1, "final_lr_ratio", "in [0, 1]", self.final_lr_ratio)
        if self.clip_norm is not None:
            _require(self.clip_norm > 0, "clip_norm", "above 0, or null for no clipping", self.clip_norm)
        multiple = f"a multiple of trainer.accumulate={self.accumulate}"
        _require(self.batch_size % self.accumulate == 0, "batch_size", multiple, self.batch_size)

    def micro_batch(self, num_processes: int) -> int:
        """Samples that one process sends through the networks at once.

        Raises:
            UsageError: `batch_size` is no multiple of processes times `accumulate`.
        """
        parts = num_processes * self.accumulate
        if self.batch_size % parts:
            raise UsageError(
                f"trainer.batch_size={self.batch_size} has to be a multiple of processes x accumulate = "
                f"{num_processes} x {self.accumulate}"
            )
        return self.batch_size // parts

    def uses_bf16(self, device: torch.device) -> bool:
        """Whether forward and backward passes on this device run in bfloat16 (autocast)."""
        auto = self.precision is Precision.auto and device.type == "cuda"
        return auto or self.precision is Precision.bf16

    def keeps_base_in_bf16(self, device: torch.device) -> bool:
        """Whether frozen matrices are kept in bfloat16 on this device.

        Raises:
            UsageError: they should be, but the passes are in float32.
        """
        if self.base_precision is Precision.bf16 and not self.uses_bf16(device):
            raise UsageError("trainer.base_precision=bf16 wants trainer.precision=bf16, or auto for both")
        return self.base_precision is not Precision.fp32 and self.uses_bf16(device)

    def learning_rate_factor(self, step: int) -> float:
        """Part of the peak learning rate used by optimiser step `step` (from 1): a pure function.

        Linear warm-up reaches 1 at `warmup_steps`; the cosine then falls and would be at `final_lr_ratio` in the
        step after `max_steps`, so that the last step still moves.
        """
        if self.schedule is Schedule.hold_linear:
            return self._hold_linear(step - 1)
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.schedule is Schedule.constant:
            return 1.0
        taken = max(0, step - 1 - self.warmup_steps)
        progress = min(1.0, taken / max(1, self.max_steps - self.warmup_steps))
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.final_lr_ratio + (1.0 - self.final_lr_ratio) * cosine

    def _hold_linear(self, taken: int) -> float:
        """After so many steps."""
        if taken < self.warmup_steps:
            return HOLD_START + (1 - HOLD_START) * taken / self.warmup_steps
        progress = (taken - self.warmup_steps) / max(1, self.max_steps - 1 - self.warmup_steps)
        left = min(1.0, (1 - progress) / (1 - HOLD_SHARE))
        return self.final_lr_ratio + (1.0 - self.final_lr_ratio) * left


@dataclass
class AdamWConfig:
    """`torch.optim.AdamW`, to be called with the parameter groups (decoupled weight decay)."""

    _target_: str = "torch.optim.AdamW"
    _partial_: bool = True
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.01
    eps: float = 1e-8


@dataclass
class StageConfig:
    """One stage: its task, and what it changes of the run's trainer, optimizer and data."""

    task: Any = MISSING
    trainer: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainConfig:
    """All of `configs/train.yaml`; groups hold their own keys."""

    experiment_name: str | None = None
    seed: int = 0
    device: Device = Device.auto
    run_dir: str | None = None
    resume: Resume = Resume.none
    resume_other_data: bool = False
    model: Any = None
    data: Any = None
    heldout: Any = None
    degradation: Any = None
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optimizer: Any = None
    logger: Any = None
    weights_dir: str = "weights"
    stages: dict[str, StageConfig] = field(default_factory=dict)
    scores: list[str] = field(default_factory=list)
    report: Any = None


def trainer_config(node: DictConfig) -> TrainerConfig:
    """A composed `trainer` node as a checked dataclass.

    Raises:
        UsageError: an unknown key, or a value no run could mean.
        omegaconf.errors.OmegaConfBaseException: a wrong type.
    """
    known = [option.name for option in fields(TrainerConfig)]
    for key in node:
        if key not in known:
            raise UsageError(f"trainer has no key {key!r}; it has {', '.join(known)}")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainerConfig), node))
    if not isinstance(config, TrainerConfig):
        raise TypeError(f"trainer should be a {TrainerConfig.__name__}, got {type(config).__name__}")
    return config


def _require(good: bool, key: str, wanted: str, got: object) -> None:
    if not good:
        raise UsageError(f"trainer.{key} has to be {wanted}, got {got}")


_store = ConfigStore.instance()
_store.store(name="train_schema", node=TrainConfig)
_store.store(group="trainer", name="trainer_schema", node=TrainerConfig)
_store.store(group="optimizer", name="adamw_schema", node=AdamWConfig)
