"""How much GPU memory a stage of training needs, by calculation: nothing is allocated.

The networks live on the meta device, where tensors have shapes but no numbers. One micro-batch goes forward and
backward there, as it would on CUDA, while every tensor's life is followed. Not counted: what CUDA takes for itself
(about half a gigabyte), cuDNN's working memory, and gaps between tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from varestorer.training.optimisers import OptimizerFactory, build_optimizer
from varestorer.training.speed import TrainStep
from varestorer.training.task import Task
from varestorer.transformer.blocks import Block
from varestorer.utils.device import num_bytes

BLOCKS, BACKWARD, ELSEWHERE = "transformer blocks", "backward pass", "losses and the rest"
LABELS = {
    "restorer": "restorer",
    "encoder": "VAE encoder",
    "text": "text path",
    "decoder": "VAE decoder",
    "perceptual": "perceptual loss",
}
"""Modules, beside the blocks, whose activations are told apart: by their name in the task."""


@dataclass(frozen=True)
class MemoryRow:
    """One line of the report.

    Attributes:
        kind: weights, gradients, optimiser, averages, activations, or peak.
        part: what of it.
        bytes: of memory.
    """

    kind: str
    part: str
    bytes: int


def memory_report(
    task: Task, optimizer: OptimizerFactory, micro_batch: int, side: int, bf16: bool = True
) -> list[MemoryRow]:
    """What a training step holds at its peak, part by part, on one process.

    Args:
        task: on the meta device, its frozen weights in the precision they will be kept in (`precision.keep_base_in`).
        optimizer: as for `fit`.
        micro_batch: images that go through the networks at once.
        side: of the images, pixels.
        bf16: as under bfloat16 autocast; else in float32.
    Returns:
        rows whose sum is the peak, and last the peak itself. Activations are those that are alive at the peak, by the
        part that made them.
    """
    parameters = list(task.trainable_parameters().values())
    rows = [MemoryRow("weights", part, size) for part, size in weights_by_part(task).items()]
    rows.append(MemoryRow("gradients", "of what trains", num_bytes(parameters)))
    rows.append(MemoryRow("optimiser", "state", optimizer_bytes(task, optimizer)))
    averaged = sum(parameter.numel() for parameter in task.averaged_parameters().values())
    rows.append(MemoryRow("averages", "float32", averaged * torch.float32.itemsize))
    activations = step_memory(task, micro_batch, side, bf16).at_peak
    rows += [MemoryRow("activations", part, size) for part, size in activations.items() if size]
    return [*rows, MemoryRow("peak", "all", sum(row.bytes for row in rows))]


def weights_by_part(task: Task) -> dict[str, int]:
    """Bytes of parameters and buffers: adapters, the blocks, and every other network that the task holds."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    for name, tensor in [*task.named_parameters(), *task.named_buffers()]:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            part = _part_of(name)
            found[part] = found.get(part, 0) + num_bytes([tensor])
    return found


def optimizer_bytes(task: Task, factory: OptimizerFactory) -> int:
    """Bytes of the optimiser's state after a step."""
    optimizer = build_optimizer(task, factory)
    for parameter in task.trainable_parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return num_bytes(tensors)


@dataclass(frozen=True)
class StepMemory:
    """Activations of a micro-batch, bytes.

    Attributes:
        kept: alive between the forward and the backward pass, by the part that made them.
        at_peak: alive when most is alive.
    """

    kept: dict[str, int]
    at_peak: dict[str, int]


def step_memory(task: Task, micro_batch: int, side: int, bf16: bool) -> StepMemory:
    """Send a micro-batch forward and backward through a task on the meta device."""
    for parameter in task.trainable_parameters().values():
        parameter.grad = torch.zeros_like(parameter)  # there from the micro-batch before
    images = torch.empty(micro_batch, 3, side, side, device="meta")
    names = [str(number) for number in range(micro_batch)]
    batch = {"hq": images, "lq": torch.empty_like(images), "name": names, "key": list(range(micro_batch))}
    tracker = _Tracker([*task.parameters(), *task.buffers()])
    with tracker, _as_on_cuda(bf16), _labels(task, tracker):
        losses = task(batch, 1)
        kept = dict(tracker.live)
        losses["loss"].backward()
    for parameter in task.parameters():
        parameter.grad = None
    return StepMemory(kept, dict(tracker.at_peak))


def measured_peak(task: Task, optimizer: OptimizerFactory, micro_batch: int, side: int) -> int:
    """Bytes that a task takes at most on a GPU in two steps of two micro-batches, bfloat16 autocast.

    What else the process holds there is left out.

    Args:
        task: on the GPU, with any weights; it may be changed.
        optimizer: as for `fit`.
        micro_batch: images that go through the networks at once.
        side: of the images, pixels.
    """
    device = next(task.parameters()).device
    others = torch.cuda.memory_allocated(device) - sum(weights_by_part(task).values())
    torch.cuda.reset_peak_memory_stats(device)
    step = TrainStep(task, optimizer, micro_batch, side)
    for _ in range(2):
        step.gradients(bf16=True)
        step.run(bf16=True)
    return int(torch.cuda.max_memory_allocated(device)) - others


class _Tracker(TorchDispatchMode):
    """Follows the memory of the tensors that operations make, by the label that is set when they are made.

    Attributes:
        label: of what is made now.
        live: bytes alive now, by label.
        at_peak: the same, when the sum was largest.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.label = ELSEWHERE
        self.live: dict[str, int] = {}
        self.at_peak: dict[str, int] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._total = self._most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.is_meta:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size, label = storage._cdata, storage.nbytes(), self.label
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._remove, key, size, label)
        self._total += size
        self.live[label] = self.live.get(label, 0) + size
        if self._total > self._most:
            self._most, self.at_peak = self._total, dict(self.live)

    def _remove(self, key: int, size: int, label: str) -> None:
        self._known.discard(key)
        self._total -= size
        self.live[label] -= size


@contextmanager
def _labels(task: Task, tracker: _Tracker) -> Iterator[None]:
    """Label what each part of a task makes with its name; what comes after its forward pass: the backward pass."""
    hooks = []

    def enter(label: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            module._label_before, tracker.label = tracker.label, label  # type: ignore[assignment]

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        tracker.label = module._label_before  # type: ignore[assignment]

    def begin_backward(module: nn.Module, args: Any, output: Any) -> None:
        tracker.label = BACKWARD

    for name, module in task.named_modules():
        label = BLOCKS if isinstance(module, Block) else LABELS.get(name.rpartition(".")[2])
        if label is not None:
            hooks.append(module.register_forward_pre_hook(enter(label)))
            hooks.append(module.register_forward_hook(leave))
    hooks.append(task.register_forward_hook(begin_backward))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _part_of(name: str) -> str:
    """Part of the report that a parameter belongs to."""
    first, *rest = name.removeprefix("system.").split(".")
    if ".lora_" in name:
        return "adapters"
    if first == "tokenizer":
        return f"VAE {rest[0]}"
    if first == "transformer":
        return BLOCKS if rest[0] == "blocks" else "transformer, the rest"
    return {"teacher": "separate teacher", "perceptual": "perceptual loss"}.get(first, first)


LOWERED = {
    F.linear,
    F.conv2d,
    F.scaled_dot_product_attention,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.bmm,
}
RAISED = {F.layer_norm, F.group_norm, F.softmax, F.log_softmax, Tensor.softmax, Tensor.log_softmax, F.mse_loss}
RAISED |= {F.l1_loss, Tensor.exp, torch.exp, Tensor.log, torch.log, Tensor.pow, torch.pow, Tensor.rsqrt, torch.rsqrt}


class _CudaArithmetic(TorchFunctionMode):
    """What meta tensors lack: bfloat16 autocast, and attention without the L x L matrix.

    Attributes:
        bf16: whether autocast is on.
    """

    def __init__(self, bf16: bool) -> None:
        super().__init__()
        self.bf16 = bf16

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.bf16 and (func in LOWERED or func in RAISED):
            dtype = torch.bfloat16 if func in LOWERED else torch.float32
            args = tuple(_cast(value, dtype) for value in args)
            kwargs = {key: _cast(value, dtype) for key, value in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            return _flash_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """Scaled dot product attention that keeps what the fused kernels keep; masks change nothing in that."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=options.get("scale"))[0]


@contextmanager
def _as_on_cuda(bf16: bool) -> Iterator[None]:
    """Arithmetic of CUDA, under bfloat16 autocast if asked for.

    `torch.autocast` knows no meta device, so it switches the imitation; what the backward pass computes again would be
    without the mode, so it enters it again.
    """
    mode, original, checkpoint = _CudaArithmetic(bf16), torch.autocast, torch.utils.checkpoint.checkpoint

    @contextmanager
    def switched(enabled: bool) -> Iterator[None]:
        before, mode.bf16 = mode.bf16, enabled
        try:
            yield
        finally:
            mode.bf16 = before

    def autocast(device_type: str, *args: Any, **options: Any) -> AbstractContextManager[Any]:
        if device_type == "meta":
            return switched(options.get("enabled", True))
        return original(device_type, *args, **options)

    def imitating(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        def imitated(*inner: Any) -> Any:
            with mode:
                return function(*inner)

        return checkpoint(imitated, *args, **options)

    patched = patch.object(torch.utils.checkpoint, "checkpoint", imitating)
    with patch.object(torch, "autocast", autocast), patched, mode:
        yield
