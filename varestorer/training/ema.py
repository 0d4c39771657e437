"""Exponential moving average of the weights that train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from varestorer.training.parallel import sharded_like


class Ema:
    """Averaged float32 copy of some parameters, kept on their device and sharded as they are.

    `average <- d * average + (1 - d) * weight` with `d = min(decay, (1 + step) / (10 + step))`, so that the
    first steps do not remember the initial weights for long (the warm-up of TensorFlow's moving average).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        """Start at the parameters' present values.

        Args:
            parameters: by the name they have in checkpoints.
            decay: largest decay, in [0, 1).
        """
        self._parameters = dict(parameters)
        self._decay = decay
        self.averages = {name: _float_copy(p) for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step `step` (from 1)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        weights = [parameter.detach().float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), weights, 1.0 - decay)

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Take over saved averages (whole ones); the names must be exactly the parameters' names.

        Raises:
            KeyError: a name is missing.
        """
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


def _float_copy(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to(torch.float32, copy=True)
