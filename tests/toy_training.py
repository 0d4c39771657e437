"""A system, a task and a dataset of a few numbers, to train the loop itself on.

A plain module rather than fixtures: configs of the tests name these classes as `_target_`.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from varestorer.data.loader import collate
from varestorer.training.config import TrainerConfig
from varestorer.training.fit import fit, make_accelerator
from varestorer.training.run import Run
from varestorer.training.task import Batch, Task, train_only
from varestorer.utils.seeds import torch_generator

# accelerate collects garbage after each stage, which takes a second over all that is imported
gc.freeze()
atexit.register(gc.unfreeze)


class ToySystem(nn.Module):
    """Two parts, of which a task trains one."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 1)
        self.second = nn.Conv2d(width, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(image)))


class ToyTask(Task):
    """Trains one part to reproduce HQ; uses dropout, so that the global generator matters."""

    def __init__(
        self,
        system: ToySystem,
        part: str = "second",
        dropout: float = 0.25,
        fail_at: int = 0,
        nan_at: int | Sequence[int] = (),
        signal_at: int = 0,
    ) -> None:
        super().__init__()
        self.system = system
        self.dropout = nn.Dropout(dropout)
        self.fail_at = fail_at
        self.nan_at = [nan_at] if isinstance(nan_at, int) else list(nan_at)
        self.signal_at = signal_at
        train_only(self, getattr(system, part).parameters())

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        if step == self.fail_at != 0 or os.environ.get("TOY_FAILS_AT") == f"{self.name}/{step}":
            raise KilledError
        if step == self.signal_at != 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        error = self.dropout(self.system(batch["lq"]) - batch["hq"])
        mse = error.square().mean()
        other = error.abs().mean()
        if step in self.nan_at:
            other = other * torch.nan
        return {"loss": mse + 0.1 * other, "mse": mse, "l1": other}

    def restored(self, batch: Batch) -> dict[str, Tensor]:
        torch.rand(3)  # must not reach the training's generator
        return {"output": self.system(batch["lq"]).clamp(0, 1)}


class KilledError(Exception):
    """What a toy task dies of when it is told to."""


class ToyPairs(Dataset):
    """Random pictures of 4x4 pixels, a function of the sample number."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __len__(self) -> int:
        return 10

    def __getitem__(self, n: int) -> dict:
        hq = torch.rand(3, 4, 4, generator=torch_generator(self.seed, n))
        return {"hq": hq, "lq": (hq * 4).round() / 4, "name": f"picture_{n}.png", "key": n}


ADAMW = partial(torch.optim.AdamW, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)


def config(**changes) -> TrainerConfig:
    values = {"max_steps": 8, "batch_size": 4, "num_workers": 0, "checkpoint_every": 3, "sample_every": 0}
    return TrainerConfig(**{**values, "warmup_steps": 2, "ema_decay": 0.9, **changes})


def train(folder: Path, cfg: TrainerConfig, preview: bool = False, **task_options) -> ToySystem:
    """One stage of a run in `folder`, from the same start every time."""
    torch.manual_seed(5)
    system = ToySystem()
    task = ToyTask(system, **task_options)
    task.name = "toy"
    batch = collate([ToyPairs(9)[n] for n in range(2)]) if preview else None
    fit(task, ToyPairs(), cfg, ADAMW, Run(folder, make_accelerator("cpu"), seed=1), preview=batch)
    return system


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
