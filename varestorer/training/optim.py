"""Optimizers: parameter groups, learning rate, gradient norm, state by parameter name; and the EMA of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from varestorer.training.parallel import sharded_like, unsharded_tensor
from varestorer.training.task import Task
from varestorer.utils.errors import UserError

OptimizerFactory = Callable[[list[dict[str, Any]]], Optimizer]
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
FUSED_ON = ("cpu", "cuda")
"""Optimizers, and devices, whose whole step is one kernel unless their options choose another way."""


def can_fuse(parameter: nn.Parameter) -> bool:
    """Whether a fused step may have a parameter.

    It goes through memory without a look at strides, and an optimizer's state comes out of a checkpoint contiguous: the
    kernels of convolutions, kept in channels_last, would meet the state of other elements after a resume.
    """
    return parameter.device.type in FUSED_ON and parameter.is_contiguous()


def build_optimizer(task: Task, factory: OptimizerFactory) -> Optimizer:
    """Make an optimizer over a task's trainable parameters, in two groups by the task's `no_decay`.

    The factory takes parameter groups: a Hydra `_partial_` such as `functools.partial(AdamW, lr=1e-4)`. UserError:
    nothing trains.
    """
    parameters = task.trainable_parameters()
    if not parameters:
        raise UserError(f"stage {task.name}: no parameter trains; its task has to leave some unfrozen")
    decayed = [p for name, p in parameters.items() if not task.no_decay(name, p)]
    others = [p for name, p in parameters.items() if task.no_decay(name, p)]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = factory([group for group in groups if group["params"]])
    fused = isinstance(optimizer, FUSED) and all(map(can_fuse, parameters.values()))
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
        if fused and group["foreach"] is None and group["fused"] is None:
            group["fused"] = True
    return optimizer


def set_learning_rate(optimizer: Optimizer, factor: float) -> float:
    """Set every group to `factor` times its peak; returns the first group's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


def gradient_norm(parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients together, a scalar on their device: reading it makes the host wait."""
    return unsharded_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None]))


def clip_gradients(parameters: Mapping[str, nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale the gradients, whose norm is given and finite, down to `max_norm`; the host does not wait."""
    torch.nn.utils.clip_grads_with_norm_(list(parameters.values()), max_norm, norm)


def nonfinite_gradients(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Names of the parameters whose gradient has a NaN or an infinity; all processes of a sharded task have to ask."""
    graded = ((name, unsharded_tensor(p.grad)) for name, p in parameters.items() if p.grad is not None)
    return [name for name, grad in graded if not bool(torch.isfinite(grad).all())]


def optimizer_tensors(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state as `"<state>/<parameter name>"`, such as `exp_avg/encoder.conv.weight`.

    Raises:
        UserError: the optimizer keeps something that is not a tensor.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(value):
                tensors[f"{key}/{name}"] = value
            elif value is not None:
                kind = type(optimizer).__name__
                raise UserError(f"{kind} keeps {key} as {type(value).__name__}; checkpoints hold tensors")
    return tensors


def load_optimizer_tensors(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave, made whole; learning rates and the like stay as configured."""
    states: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        key, name = path.split("/", 1)
        parameter = parameters[name]
        states.setdefault(name, {})[key] = (
            sharded_like(tensor, parameter) if tensor.shape == parameter.shape else tensor
        )
    packed = optimizer.state_dict()
    ours, theirs = (
        [x for group in g for x in group["params"]] for g in (optimizer.param_groups, packed["param_groups"])
    )
    numbers = dict(zip(map(id, ours), theirs, strict=True))
    packed["state"] = {numbers[id(parameters[name])]: state for name, state in states.items()}
    optimizer.load_state_dict(packed)


class Ema:
    """Averaged float32 copy of some parameters, kept on their device and sharded as they are.

    `average <- d * average + (1 - d) * weight` with `d = min(decay, (1 + step) / (10 + step))`, so that the
    first steps do not remember the initial weights for long (the warm-up of TensorFlow's moving average).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        """Start at the parameters' present values; the largest decay is in [0, 1)."""
        self._parameters = dict(parameters)
        self._decay = decay
        self.averages = {n: p.detach().to(torch.float32, copy=True) for n, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 1)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        weights = [parameter.detach().float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), weights, 1.0 - decay)

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Take over saved averages (whole ones); KeyError where a parameter's name is missing."""
        for name, average in self.averages.items():
            average.copy_(sharded_like(averages[name], average))

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Replace the weights by their averages."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.averages[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Lend the averages to the parameters for the length of a `with` block."""
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self.copy_to_parameters()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(kept[name])
