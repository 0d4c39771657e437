"""Options of training, declared once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from varestorer.utils.errors import UsageError
from varestorer.utils.schema import DEVICES, CommandOptions, check, option

if TYPE_CHECKING:
    import torch  # not at run time: `train --help` answers without it


HOLD_START = 0.005  # of the peak learning rate, where the warm-up of hold_linear begins
HOLD_SHARE = 0.3  # of the steps after it that are taken at the peak


@dataclass
class TrainerConfig:
    """How one stage is trained."""

    max_steps: int = option(
        1000,
        "optimizer steps of a stage; given on the command line it counts for every stage",
        least=1,
        title="the trainer (stages.NAME.trainer.max_steps=N changes one stage)",
    )
    batch_size: int = option(8, "samples per optimizer step over all processes and micro-batches together", least=1)
    accumulate: int = option(1, "micro-batches per optimizer step (less memory, same result)", least=1)
    num_workers: int = option(2, "data processes per training process; 0 loads in the training process", least=0)
    precision: str = option(
        "auto",
        "auto | fp32 | bf16: of forward and backward passes; parameters and optimizer stay float32; auto: bf16 on "
        "CUDA, fp32 elsewhere",
        choices=("auto", "fp32", "bf16"),
    )
    base_precision: str = option(
        "fp32",
        "auto | fp32 | bf16: of frozen matrices in the transformer's blocks; auto is that of the passes. bf16 halves "
        "their memory and changes nothing in passes of bf16, but they stay rounded for what comes after the stage",
        choices=("auto", "fp32", "bf16"),
    )
    sharding: str = option(
        "none",
        "fsdp2 spreads weights, averages and optimizer state over the processes, for networks that one GPU cannot "
        "train; one stage per run, without a report",
        choices=("none", "fsdp2"),
    )
    clip_norm: float | None = option(1.0, "largest gradient norm; null: no clipping", above=0)
    ema_decay: float = option(
        0.999, "of the averaged weights (EMA); it warms up as (1 + step) / (10 + step)", least=0, below=1
    )
    warmup_steps: int = option(0, "of linear warm-up of the learning rate", least=0)
    schedule: str = option(
        "cosine",
        'cosine | constant | hold_linear: the learning rate after warm-up; hold_linear is VAR\'s "lin0": warm-up from '
        "0.005 of the peak, 30 % of the other steps at the peak, then a line down",
        choices=("cosine", "constant", "hold_linear"),
    )
    final_lr_ratio: float = option(
        0.0, "learning rate at the end of the cosine or the line, as a part of the peak", least=0, most=1
    )
    checkpoint_every: int = option(500, "steps between checkpoints; one is always written at the end", least=1)
    keep_last: int = option(2, "newest checkpoints of a stage that are kept", least=1)
    keep_best: str | None = option(
        None,
        "a key of metrics.jsonl, such as loss or val/mse, or one of the scores, such as musiq (val/musiq): the "
        "checkpoint with the best mean of it over the last checkpoint_every steps is kept too, and named in the "
        "stage's file `best`",
        "KEY",
    )
    keep_best_mode: str = option(
        "auto",
        "auto | min | max: which is best; auto: max for a score that is better when it is higher, else min",
        choices=("auto", "min", "max"),
    )
    sample_every: int = option(500, "steps between preview pictures; 0: one at the end only", least=0)
    validate_every: int = option(
        0,
        "steps between validations, also at the end: the losses of all heldout pairs with the averaged weights "
        "(val/loss, ...), the scores of what the stage makes of them free-running (val/psnr, ...), and pictures; 0: "
        "none",
        least=0,
    )
    skip_nonfinite: int = option(
        0,
        "so many steps in a row may have a loss or gradient that is not finite: they do not touch the weights and are "
        "marked `skipped` in metrics.jsonl. One more stops the run; 0 stops at the first",
        least=0,
    )

    def __post_init__(self) -> None:
        """Refuse values no run could mean.

        Raises:
            UsageError: names the key, what it was and what it has to be.
        """
        check(self, prefix="trainer.")
        if self.batch_size % self.accumulate:
            raise UsageError(
                f"trainer.batch_size must be a multiple of trainer.accumulate={self.accumulate}, got {self.batch_size}"
            )

    def micro_batch(self, num_processes: int) -> int:
        """Samples that one process sends through at once; UsageError if `batch_size` does not divide so."""
        parts = num_processes * self.accumulate
        if self.batch_size % parts:
            raise UsageError(
                f"trainer.batch_size={self.batch_size} has to be a multiple of processes x accumulate = "
                f"{num_processes} x {self.accumulate}"
            )
        return self.batch_size // parts

    def uses_bf16(self, device: torch.device) -> bool:
        """Whether forward and backward passes on this device run in bfloat16 (autocast)."""
        auto = self.precision == "auto" and device.type == "cuda"
        return auto or self.precision == "bf16"

    def keeps_base_in_bf16(self, device: torch.device) -> bool:
        """Whether frozen matrices are bfloat16 here; UsageError if they should be in passes of float32."""
        if self.base_precision == "bf16" and not self.uses_bf16(device):
            raise UsageError("trainer.base_precision=bf16 wants trainer.precision=bf16, or auto for both")
        return self.base_precision != "fp32" and self.uses_bf16(device)

    def learning_rate_factor(self, step: int) -> float:
        """Part of the peak learning rate used by optimizer step `step` (from 1): a pure function.

        Linear warm-up reaches 1 at `warmup_steps`; the cosine then falls and would be at `final_lr_ratio` in the
        step after `max_steps`, so that the last step still moves.
        """
        if self.schedule == "hold_linear":
            return self._hold_linear(step - 1)
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.schedule == "constant":
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
    """`torch.optim.AdamW`, to be called with the parameter groups; biases and norms do not decay."""

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
class TrainConfig(CommandOptions):
    """Of `train`; groups (model, data, degradation, logger) hold keys of their own."""

    INTRO: ClassVar[str] = """
Train a network, in one stage or several.

usage: python scripts/train.py +experiment=NAME [key=value ...]

  python scripts/train.py +experiment=quickstart                     minutes on a CPU, no downloads
  python scripts/train.py +experiment=quickstart_scratch trainer.max_steps=2   two steps of every stage
  python scripts/train.py +experiment=dmd_div2k data.root=DIV2K      the paper's distillation on DIV2K
  python scripts/train.py +experiment=quickstart resume=auto         go on with the newest unfinished run
"""
    NOTES: ClassVar[str] = """
Any other key of the config can be set too: add --cfg job to see them all. -m runs several values in turn
(seed=0,1,2). Several GPUs: accelerate launch scripts/train.py +experiment=NAME.

The folder gets config.yaml, metrics.jsonl, samples/*.png and checkpoints/; ckpt=FOLDER uses its weights in
eval.py and restore.py, ckpt=FOLDER/checkpoints/STAGE/best the best ones.

A run that was killed goes on with resume=auto as if nothing had happened. The model, the stages' tasks, their data and
batch size, and the seed must be the run's own, and so must the files (their names, order and sizes) unless
resume_other_data=true; a change of anything else is logged. SIGTERM, SIGUSR1 and SIGUSR2 (a time limit or preemption
of Slurm) save a checkpoint after the step that is being taken, or before it where no data come; the same signal a
second time, a second or more later, ends the run at once.

Exit status: 0 well, 1 failed, 2 wrong command, 143, 138 or 140 after SIGTERM, SIGUSR1 or SIGUSR2 (128 + the signal):
start the same command again with resume=auto. (torchrun and accelerate launch pass the signal on and end with 1.)
"""
    GROUPS: ClassVar[tuple[str, ...]] = ("experiment", "system", "model")

    experiment_name: str | None = option(None, "default: that of the experiment", "NAME", title="the run")
    run_dir: str | None = option(None, "where to write (default: outputs/<experiment>/<time>)", "FOLDER")
    resume: str = option(
        "none",
        "none | auto: auto goes on with run_dir, else with the newest unfinished run of the experiment",
        choices=("none", "auto"),
    )
    resume_other_data: bool = option(
        False, "true: go on though photographs, shards or texts changed since the checkpoint"
    )
    device: str = option("auto", DEVICES)
    seed: int = option(0, "of weights, data and everything else that is drawn")
    weights_dir: str = option(
        "weights", "of published files, which experiments of paper scale name: a folder, or hub to fetch them"
    )

    model: Any = option(
        None,
        "sizes alone; system=varestorer|varsr|hvar chooses the class and its default sizes",
        "NAME",
        title="what is trained",
    )
    stages: dict[str, StageConfig] = option(
        {}, "in order, each with its task, and its own trainer, optimizer and data where they differ", "{NAME:...}"
    )
    optimizer: Any = option(None, "optimizer.lr=1e-4 is the peak learning rate, for every stage", "adamw")
    report: Any = option(
        None, "written at the end: a _target_ that is called with run_dir, system, config and device", "null"
    )
    data: Any = option(
        None,
        "photographs: embedded, folder (data.root=FOLDER), pairs, shards, mixture or quality",
        "NAME",
        title="data",
    )
    degradation: Any = option(None, "how their bad images are made", "realesrgan")
    heldout: Any = option(
        {
            "_target_": "varestorer.data.heldout_pairs",
            "root": None,  # the held-out embedded photographs: enough to look at; figures want more
            "crop": "${data.crop}",
            "degradation": "${degradation}",
            "seed": "${seed}",
            "limit": 4,
        },
        "pairs of preview pictures and validations, never trained on: heldout.root=FOLDER (default: two photographs of "
        "scikit-learn), heldout.limit=4; null: the training data",
        "null",
    )
    scores: list[str] = option(
        ["psnr", "lpips", "musiq", "clipiqa"],
        "metrics of pyiqa of the held-out pictures at trainer.validate_every: val/psnr, ...",
        "[NAME,...]",
    )
    logger: Any = option(
        None,
        "curves beside metrics.jsonl (default: wandb, offline without WANDB_API_KEY); several: [wandb,tensorboard]; "
        "logger.wandb.artifacts=true sends checkpoints too",
        "wandb|tensorboard|trackio|none",
    )
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    defaults: list[Any] = field(
        default_factory=lambda: [
            "_self_",
            {"system": "varestorer"},
            {"model": "${system}"},
            {"data": "embedded"},
            {"degradation": "realesrgan"},
            {"optimizer": "adamw"},
            {"logger": "wandb"},
        ]
    )


ConfigStore.instance().store(group="optimizer", name="adamw", node=AdamWConfig)
