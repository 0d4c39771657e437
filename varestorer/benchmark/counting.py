"""What work costs, counted while it is done: operations, the least bytes it must move, and memory, part by part.

Work on the meta device, where tensors have shapes but no numbers, is counted in seconds whatever its size. A
multiplication and an addition are two operations; what torch's counter does not know (norms, activations) is none.
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
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from varestorer.benchmark.measure import REST, Meter, Work
from varestorer.utils.watch import observed

ON_CPU: dict[Any, Any] = {  # which torch's counter does not know
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
    ),
}
LOWERED = {F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul, Tensor.matmul, Tensor.__matmul__}
LOWERED |= {torch.bmm}
RAISED = {F.layer_norm, F.group_norm, F.softmax, F.log_softmax, Tensor.softmax, Tensor.log_softmax, F.mse_loss}
RAISED |= {F.l1_loss, Tensor.exp, torch.exp, Tensor.log, torch.log, Tensor.pow, torch.pow, Tensor.rsqrt, torch.rsqrt}


@dataclass(frozen=True)
class Count:
    """What a part costs: operations, two for a multiplication with its addition, and the least bytes it must move.

    It must read what it did not make (weights, inputs), each once, and write what it makes that outlasts it.
    """

    flops: int
    bytes: int


def count(work: Work) -> dict[str, Count]:
    """Do the work and count its parts; nothing is said of the bytes of what lies outside all parts (`REST`)."""
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter, Ledger() as ledger:
        meter = Meter(counter.get_total_flops)
        with observed(meter, ledger.opened):
            work()
        flops = meter.sums(counter.get_total_flops())
    return {part: Count(int(value), 0 if part == REST else ledger.moved.get(part, 0)) for part, value in flops.items()}


class Ledger(TorchDispatchMode):
    """Follows the memory of tensors by the part that makes them; `known` ones, such as weights, are never alive."""

    def __init__(self, known: tuple[Tensor, ...] = ()) -> None:
        super().__init__()
        self.part = REST  # that is at work now
        self.live: dict[str, int] = {}  # part -> bytes of what it made that are alive now
        self.at_peak: dict[str, int] = {}  # the same, when the sum was largest
        self.moved: dict[str, int] = {}  # part -> least bytes, see `Count`
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self._read: set[int] = set()
        self._made: set[int] = set()
        self._total = self._most = 0

    @contextmanager
    def opened(self, part: str) -> Iterator[None]:
        """For `observed`: what is done inside the block is the part's."""
        self.part, self._read, self._made = part, set(), set()
        yield
        outlasting = sum(self._sizes[key] for key in self._made)
        self.moved[part] = self.moved.get(part, 0) + outlasting
        self.part = REST

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if torch.is_tensor(tensor) and (key := self._note(tensor, is_made=False)) not in self._made | self._read:
                self._read.add(key)
                size = min(tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size())
                self.moved[self.part] = self.moved.get(self.part, 0) + size
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor):
                self._note(tensor, is_made=True)
        return out

    def _note(self, tensor: Tensor, is_made: bool) -> int:
        """Follow the tensor's memory from now on, if it is not followed yet; returns its key."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = size = storage.nbytes() if is_made else 0
            weakref.finalize(storage, self._forget, key, size, self.part)
            self._made |= {key} if is_made else set()
            self._total += size
            self.live[self.part] = self.live.get(self.part, 0) + size
            if self._total > self._most:
                self._most, self.at_peak = self._total, dict(self.live)
        return key

    def _forget(self, key: int, size: int, part: str) -> None:
        del self._sizes[key]
        self._read.discard(key)
        self._made.discard(key)
        self._total -= size
        self.live[part] -= size


class _CudaArithmetic(TorchFunctionMode):
    """What meta tensors lack: bfloat16 autocast, while `bf16` is set, and attention without the L x L matrix."""

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
            q, k, v = (value.to(args[0].dtype) for value in args[:3])  # masks change nothing in what is kept
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=kwargs.get("scale"))[0]
        return func(*args, **kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value


@contextmanager
def as_on_cuda(bf16: bool = False) -> Iterator[None]:
    """Work on the meta device has the arithmetic of CUDA, under bfloat16 autocast if asked for.

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
