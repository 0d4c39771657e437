"""A few steps of full fine-tuning, sharded over the processes or in one: what the test of sharding runs."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from varestorer.systems.varestorer import VARestorer
from varestorer.training.optim import (
    Ema,
    build_optimizer,
    clip_gradients,
    gradient_norm,
    load_optimizer_tensors,
    nonfinite_gradients,
    optimizer_tensors,
)
from varestorer.training.parallel import all_gathered, no_gradient_sync, shard, sharded_like, unsharded
from varestorer.training.tasks.distillation import DistillationTask
from varestorer.utils.seeds import torch_generator

ACCUMULATE = 2
SAMPLES = 4  # of a step
SIZES: dict[str, Any] = {
    "schedule": {"sides": [1, 2, 4]},
    "tokenizer": {"channels": 32, "multipliers": [1], "latent_width": 8, "patch_size": 4},
    "transformer": {
        "width": 32,
        "depth": 2,
        "num_heads": 2,
        "latent_width": 8,
        "text_width": 16,
        "text_length": 3,
        "num_levels": 4,
        "gamma_init": 1.0,
    },
    "student": {"lora_rank": 0},
}


class Training:
    """A task, its optimizer and its averages, in one of `world` processes."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world
        torch.manual_seed(0)
        options = {"perceptual": "ms_ssim", "trained": "all", "teacher": "start", "checkpoint_activations": True}
        self.task = DistillationTask(VARestorer(**SIZES), **options).train()  # type: ignore[arg-type]
        if world > 1:
            shard(self.task, torch.device("cpu"))
        # a large eps, so that Adam does not turn the rounding of gradients near zero into steps
        self.optimizer = build_optimizer(self.task, partial(torch.optim.AdamW, lr=1e-2, eps=1e-3))
        self.parameters = self.task.trainable_parameters()
        self.ema = Ema(self.task.averaged_parameters(), 0.9)

    def step(self, number: int) -> dict[str, float]:
        """Take an optimizer step; mean loss over all samples, and gradient norm."""
        keys = range(SAMPLES * number + self.rank, SAMPLES * (number + 1), self.world)
        size = len(keys) // ACCUMULATE
        total = torch.zeros(())
        for micro in range(ACCUMULATE):
            later = self.world > 1 and micro < ACCUMULATE - 1
            with no_gradient_sync(self.task) if later else contextlib.nullcontext():
                loss = self.task(batch_of(list(keys)[micro * size : (micro + 1) * size]), number)["loss"]
                (loss / ACCUMULATE).backward()
            total += loss.detach() / ACCUMULATE
        if self.world > 1:
            dist.all_reduce(total)
            total /= self.world
        total_norm = gradient_norm(self.parameters)
        clip_gradients(self.parameters, total_norm, 0.01)
        assert not nonfinite_gradients(self.parameters)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(number + 1)
        return {"loss": float(total), "norm": float(total_norm)}

    def saved(self) -> dict[str, dict[str, torch.Tensor]]:
        """What a checkpoint holds, whole; nothing in all processes but the first."""
        states = optimizer_tensors(self.optimizer, self.parameters)
        files = {"model": self.parameters, "ema": self.ema.averages, "optimizer": states}
        found = {name: all_gathered(tensors, self.rank == 0) for name, tensors in files.items()}
        return {
            name: {key: value.detach().clone() for key, value in tensors.items()} for name, tensors in found.items()
        }

    def load(self, saved: dict[str, dict[str, torch.Tensor]]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(sharded_like(saved["model"][name], parameter))
        self.ema.load(saved["ema"])
        load_optimizer_tensors(self.optimizer, self.parameters, saved["optimizer"])

    def picture(self) -> torch.Tensor:
        self.task.eval()
        with self.ema.in_place(), unsharded(self.task), torch.no_grad():
            image = self.task.restored(batch_of([99]))["student"].clone()
        self.task.train()
        return image


def batch_of(keys: list[int]) -> dict[str, Any]:
    images = {part: torch.stack([picture_of(part, key) for key in keys]) for part in ("hq", "lq")}
    return {**images, "name": [str(key) for key in keys], "key": torch.tensor(keys)}


def picture_of(part: str, key: int) -> torch.Tensor:
    return torch.rand(3, 16, 16, generator=torch_generator(0, part, key))


def run(training: Training) -> dict[str, Any]:
    """Two steps, a picture, a third step; then the third again, from what was saved after the second."""
    steps = [training.step(number) for number in range(2)]
    picture, saved = training.picture(), training.saved()
    steps.append(training.step(2))
    last = training.saved()
    if training.world > 1:
        shared: list[Any] = [saved]
        dist.broadcast_object_list(shared)
        saved = shared[0]
    again = Training(training.rank, training.world)
    again.load(saved)
    repeated = again.step(2)
    return {"steps": steps, "picture": picture, "last": last, "repeated": repeated, "again": again.saved()}


def work(rank: int, world: int, folder: str) -> None:
    """One of the processes; the first writes what it found to `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found = run(Training(rank, world))
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()
