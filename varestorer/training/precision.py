"""The precision in which frozen weights are kept while a stage trains."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from varestorer.training.task import Task
from varestorer.transformer.blocks import Block


def keep_base_in(task: Task, dtype: torch.dtype) -> None:
    """Keep the frozen matrices of the transformer's blocks in a precision; vectors and what trains stay float32.

    Under bfloat16 autocast, which rounds every matrix before its product, bfloat16 halves the memory of the base and
    changes no loss and no gradient. Without autocast the blocks cannot be used then.

    Args:
        task: on any device, not sharded yet.
        dtype: float32 gives what bfloat16 left, rounded.
    """
    for layer in frozen_matrices(task):
        layer.weight.data = layer.weight.data.to(dtype)


def frozen_matrices(task: Task) -> Iterator[nn.Linear]:
    """Linear layers inside the blocks whose weights do not train, of the student and of a separate teacher."""
    blocks = (module for module in task.modules() if isinstance(module, Block))
    layers = (layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear))
    return (layer for layer in layers if not layer.weight.requires_grad)
