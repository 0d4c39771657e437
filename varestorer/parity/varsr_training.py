"""Golden tensors of VARSR's training: gradients, drop path, schedule, optimizer steps of the task itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from varestorer.parity.golden import Check, Group, image
from varestorer.training.config import TrainerConfig
from varestorer.training.optim import build_optimizer, clip_gradients, gradient_norm, set_learning_rate
from varestorer.training.tasks.varsr import VARSRTask
from varestorer.transformer.model import branch_factors, dropped_paths
from varestorer.transformer.refiner import TrainingDraws
from varestorer.utils.images import from_network
from varestorer.weights.published.varsr import published_varsr_name

LOSS, GRADIENT, STEPPED, SCHEDULE = 1e-5, 1e-4, 2e-4, 1e-12


class Training(Group):
    """The task of a group's networks, with recorded draws."""

    def __init__(self, group: Group) -> None:
        super().__init__(group.golden, group.stem, group.io)
        self.json = group.golden.json(group.stem)
        self.task = VARSRTask(group.golden.system(group.stem))
        self.lq = from_network(image(self.io["lr_u8"]))
        with torch.no_grad():
            self.pyramid = self.task.system.encode(from_network(image(self.io["hr_u8"])))

    def losses(self, number: int) -> dict[str, Tensor]:
        """Losses with the recorded draws of a step."""
        draws = TrainingDraws(self.io[f"train_t_{number}"], self.io[f"train_noise_{number}"])
        return self.task.losses(self.pyramid, self.io["label"], self.lq, draws)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Gradients of a loss by published names; zero where it does not reach."""
        self.task.zero_grad()
        loss.backward()
        named = self.parameters().items()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What trains, by published names."""
        found = self.task.trainable_parameters().items()
        return {published_varsr_name(name.removeprefix("transformer.")): p for name, p in found}


@torch.enable_grad()
def compare_training(group: Group) -> Iterator[Check]:
    """The tensors of a group of training."""
    training = Training(group)
    yield from _gradients(training)
    yield from _drop_path(training)
    yield from _schedule(training)
    yield from _steps(training)


def _gradients(training: Training) -> Iterator[Check]:
    """Losses, and the gradients of both together and of each alone."""
    training.task.eval()
    losses = training.losses(0)
    parts = {"ce": losses["cross_entropy"], "diff": losses["diffusion"], "total": losses["loss"]}
    for name, value in parts.items():
        yield from training.near(f"loss/{name}", value, LOSS * 10, True)
    gradients = training.gradients(losses["loss"])
    for name, gradient in gradients.items():
        yield from training.near(f"grad/{name}", gradient, GRADIENT, True)
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    yield from training.near("grad_norm", norm, GRADIENT, True)
    for name, part in (("ce", "cross_entropy"), ("diff", "diffusion")):
        alone = training.gradients(training.losses(0)[part])
        norms = torch.stack([alone[name].norm() for name in training.json["parameter_order"]])
        yield from training.near(f"grad_{name}_norm", norms, GRADIENT, True)


@torch.no_grad()
def _drop_path(training: Training) -> Iterator[Check]:
    """Losses with recorded branches left out."""
    if "droppath/keep" not in training.io:
        return
    rates, keep = training.io["droppath/rates"], training.io["droppath/keep"]
    last = rates.max().item()
    depth = len(rates)
    ours = 1 - 1 / branch_factors(torch.full((1, depth, 3), 1 - 1e-7), last)[0, :, 0]
    yield from training.near("droppath/rates", ours, LOSS)
    # noise just below 1 keeps a branch, 0 drops it where its rate is above 0
    attention, ffn = (keep[:, branch].T.ne(0) for branch in (0, 1))
    noise = torch.stack([attention, torch.ones_like(attention), ffn], dim=2).float() * (1 - 1e-6)
    with dropped_paths(training.task.system.transformer, branch_factors(noise, last)):
        losses = training.losses(0)
    for name, part in (("ce", "cross_entropy"), ("diff", "diffusion")):
        yield from training.near(f"droppath/{name}", losses[part], LOSS * 10, True)


def _schedule(training: Training) -> Iterator[Check]:
    """Factors of the learning rate: `schedule/lin0_<epochs>_epochs_of_<steps>_iterations`."""
    for name in training.io:
        if name.startswith("schedule/lin0_"):
            words = name.split("_")
            config = _trainer(training.json["optimizer"], int(words[1]), int(words[4]))
            factors = [config.learning_rate_factor(step) for step in range(1, config.max_steps + 1)]
            yield from training.near(name, torch.tensor(factors, dtype=torch.float64), SCHEDULE)


def _trainer(options: dict[str, Any], epochs: int, steps_per_epoch: int) -> TrainerConfig:
    return TrainerConfig(
        max_steps=epochs * steps_per_epoch,
        warmup_steps=round(options["warmup_epochs"] * steps_per_epoch),
        schedule="hold_linear",
        final_lr_ratio=options["end"],
        clip_norm=options["clip_norm"],
    )


def _steps(training: Training) -> Iterator[Check]:
    """Three optimizer steps."""
    options, task = training.json["optimizer"], training.task
    config = _trainer(options, options["epochs"], options["iterations_per_epoch"])
    kinds = {name: options[name] for name in ("lr", "eps", "weight_decay")}
    optimizer = build_optimizer(task, partial(torch.optim.AdamW, betas=tuple(options["betas"]), **kinds))
    parameters, found = task.trainable_parameters(), defaultdict[str, list[Tensor]](list)
    for number in range(len(training.io["steps/grad_norm"])):
        set_learning_rate(optimizer, config.learning_rate_factor(number + 1))
        task.zero_grad()
        losses = training.losses(number)
        losses["loss"].backward()
        norm = gradient_norm(parameters)
        assert config.clip_norm is not None
        clip_gradients(parameters, norm, config.clip_norm)
        decayed, others = optimizer.param_groups
        rates = [others["lr"], decayed["lr"], others["weight_decay"], decayed["weight_decay"]]
        found["groups"].append(torch.tensor(rates))
        found["loss"].append(torch.stack([losses[name].detach() for name in ("loss", "cross_entropy", "diffusion")]))
        found["norm"].append(norm)
        optimizer.step()
    yield from training.near("steps/loss_total_ce_diff", torch.stack(found["loss"]), STEPPED, True)
    yield from training.near("steps/grad_norm", torch.stack(found["norm"]), STEPPED, True)
    yield from training.near("steps/lr_wd_of_groups", torch.stack(found["groups"]), 1e-7)
    for name, parameter in training.parameters().items():
        yield from training.near(f"steps/after/{name}", parameter, STEPPED)
