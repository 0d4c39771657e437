"""Jobs of many processes, and sharding: weights, gradients, EMA and optimizer state spread over them (FSDP2).

Each process keeps its shard of every tensor; a block's weights are all-gathered just before they are used. What is
saved is unsharded, so a checkpoint can be read by any number of processes, sharded or not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from varestorer.training.task import Task
from varestorer.transformer.blocks import Block, BlockContext
from varestorer.transformer.conditions import Context
from varestorer.utils.errors import UsageError


def in_cluster_job() -> bool:
    """Whether submitit started this process, as Hydra's Slurm launcher does."""
    return "SUBMITIT_EXECUTOR" in os.environ


def join_cluster_job() -> None:
    """Tell torch of the job's other processes, as torchrun does; for processes that submitit started."""
    if in_cluster_job() and "RANK" not in os.environ:
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)


def shard(task: Task, device: torch.device, bf16: bool = False) -> None:
    """Spread a task over all processes, in place: each transformer block by itself, then all else that trains.

    Frozen weights outside of the blocks (tokenizer, perceptual loss) are replicated in every process. Has to come
    before the optimizer and the EMA are made, as the parameters become other objects.

    Args:
        task: on its device, the same weights in every process.
        device: of the task.
        bf16: all-gather the blocks' weights in bfloat16, half the traffic; shards and the reduction of
            gradients stay float32, and so does everything outside of the blocks. Wants bfloat16 autocast.
    Raises:
        UsageError: there is only one process.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise UsageError(
            "trainer.sharding=fsdp2 wants several processes: accelerate launch --num_processes N scripts/train.py ..."
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    in_blocks = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    held_by_blocks: set[nn.Parameter] = set()
    for block in [module for module in task.modules() if isinstance(module, Block)]:
        fully_shard(block, mesh=mesh, mp_policy=in_blocks)
        _prepare_unsharded(block)
        held_by_blocks |= set(block.parameters())
    frozen = {parameter for parameter in task.parameters() if not parameter.requires_grad}
    elsewhere = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(task, mesh=mesh, mp_policy=elsewhere, ignored_params=frozen - held_by_blocks)


def _prepare_unsharded(block: Block) -> None:
    """All-gather a sharded block's weights for `prepare` too, when that is called before its forward pass."""
    prepare = block.prepare

    def prepare_unsharded(context: Context) -> BlockContext:
        if not isinstance(block.self_attention.v_bias, DTensor):  # the forward pass is going on
            return prepare(context)
        assert isinstance(block, FSDPModule)
        block.unshard()
        try:
            return prepare(context)
        finally:
            block.reshard()

    block.prepare = prepare_unsharded  # type: ignore[method-assign]


@contextmanager
def no_gradient_sync(task: nn.Module) -> Iterator[None]:
    """Leave out the reduction of a sharded task's gradients (in all but the last micro-batch of a step)."""
    assert isinstance(task, FSDPModule), "shard the task first"
    task.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        task.set_requires_gradient_sync(True)


@contextmanager
def unsharded(task: nn.Module) -> Iterator[None]:
    """All-gather a sharded task's weights outside of the blocks, to use parts of it without calling it.

    All processes have to enter, and to use the same parts. Does nothing to a task that is not sharded.
    """
    if not isinstance(task, FSDPModule):
        yield
        return
    task.reshard()  # what is gathered are the weights of this moment
    task.unshard()
    try:
        yield
    finally:
        task.reshard()


def unsharded_tensor(tensor: Tensor) -> Tensor:
    """A tensor in full (all-gather): all processes have to call this for sharded ones."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def all_gathered(tensors: Mapping[str, Tensor], wanted: bool) -> dict[str, Tensor]:
    """Tensors in full, one all-gather after the other; all processes have to call this, by the same names.

    Sharded ones are on the CPU, others as they are; processes that do not want them get none.
    """
    gathered: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = unsharded_tensor(tensor.detach())
        if wanted:
            gathered[name] = full.cpu() if isinstance(tensor, DTensor) else tensor
    return gathered


def sharded_like(full: Tensor, tensor: Tensor) -> Tensor:
    """A full tensor that every process has, sharded as `tensor` is; as it is if that is not sharded."""
    if not isinstance(tensor, DTensor):
        return full
    on_device = full.to(tensor.device)
    return distribute_tensor(on_device, tensor.device_mesh, tensor.placements, src_data_rank=None)
