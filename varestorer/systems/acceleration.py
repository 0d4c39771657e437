"""What makes restoring faster than plain float32 code: what it costs in exactness is tested, not supposed.

Merged adapters are the same function in exact arithmetic. Bfloat16 and low-precision linear layers round the logits,
so that bits whose two logits are close may flip. Compiled code and CUDA graphs compute what they were made from.
"""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from varestorer.utils.device import gains_from_bf16
from varestorer.utils.errors import UsageError, UserError

PRECISIONS = ("fp32", "bf16", "auto")
LINEARS = ("none", "int8", "fp8")
COMPILERS = ("g++", "c++", "clang++", "cl")
MOST_COMPILATIONS = 64
"""Of one piece of code: systems, sizes of batches and precisions in one process; torch goes on uncompiled after 8."""

MOST_GRAPHS = 4  # of different shapes; each keeps its inputs and its results, all share their working memory
WARM_UPS = 2  # calls in which libraries choose kernels and tables are made, which cannot be recorded

Tree = TypeVar("Tree")
"""A tensor, or dataclasses, tuples and lists of trees; other things in it are constants."""
WORDS: dict[str, dict[str, Any]] = {
    "merged": {"merge": True},
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "compile": {"compile": True},
    "graphs": {"graphs": True},
    "int8": {"linears": "int8"},
    "fp8": {"linears": "fp8"},
}
"""What each word of a variant's name chooses."""


@dataclass(frozen=True)
class Acceleration:
    """How a system restores; the default changes nothing but where a device gains from bfloat16.

    Attributes:
        merge: fold the adapters into the base weights, so that no teacher is left: one-step restoring only.
        precision: "fp32"; "bf16": blocks, decoder and restorer, while the encoder, which decides the bits of the
            input, the text and the head stay in float32; "auto": bf16 where the device gains from it.
        compile: blocks, encoder and decoder through torch.compile, for each size of a batch once (a minute or more).
        graphs: replay each size of a batch as one CUDA graph.
        linears: linear layers of the blocks in "int8" or "fp8", through torchao; "none" leaves them.
    """

    merge: bool = True
    precision: str = "auto"
    compile: bool = False
    graphs: bool = False
    linears: str = "none"

    def __post_init__(self) -> None:
        for name, choices in (("precision", PRECISIONS), ("linears", LINEARS)):
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} must be one of {', '.join(choices)}, got {name}={getattr(self, name)}")

    @classmethod
    def parse(cls, text: str) -> Acceleration:
        """A variant by its name: means joined by "+", in any order.

        It is "eager" (float32, adapters apart), or some of `WORDS`; all but eager have their adapters merged, so "bf16"
        is "merged+bf16". UsageError: an unknown word, or eager among others.
        """
        words = text.split("+")
        if words == ["eager"]:
            return cls(merge=False, precision="fp32")
        chosen: dict[str, Any] = {"precision": "fp32"}
        for word in words:
            if word not in WORDS:
                raise UsageError(f"a variant is eager, or some of {', '.join(WORDS)} joined by +; got {text!r}")
            chosen |= WORDS[word]
        return cls(**chosen)

    def on(self, device: torch.device) -> Acceleration:
        """The same with `precision` decided for a device: "fp32" or "bf16"."""
        if self.precision != "auto":
            return self
        return replace(self, precision="bf16" if gains_from_bf16(device) else "fp32")


def check_means(chosen: Acceleration, device: torch.device) -> None:
    """Refuse what cannot be done (UserError), before anything is changed."""
    if chosen.graphs and device.type != "cuda":
        raise UserError(f"graphs=true records CUDA graphs, and the device is {device.type}; leave it out")
    if chosen.compile and not any(map(shutil.which, (os.environ.get("CXX", "c++"), *COMPILERS))):
        raise UserError(f"compile=true needs a C++ compiler ({', '.join(COMPILERS)}); install one, or leave it out")
    if chosen.linears != "none" and not chosen.merge:
        raise UserError(f"linears={chosen.linears} needs merged adapters: use merge=true")
    if chosen.linears != "none" and find_spec("torchao") is None:
        raise UserError(f"linears={chosen.linears} needs torchao: pip install torchao")
    if chosen.linears == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise UserError("linears=fp8 needs an NVIDIA GPU of compute capability 8.9 or above; use int8 or none")


def decode_in_bf16(decoder: Any) -> None:
    """A decoder in bfloat16, but for its last norm and convolution, which make pixels.

    Eight bits of mantissa are too few for the pixels themselves: they would be off by up to a level of 8 bits.
    """
    decoder.to(torch.bfloat16)
    decoder.norm_out.float()
    decoder.conv_out.float()
    decoder.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(torch.bfloat16),))
    decoder.norm_out.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def quantize_linears(blocks: nn.Module, kind: str) -> None:
    """Keep weights of linear layers, in place, and multiply in 8 bits ("int8", "fp8"): one scale a row and a token."""
    from torchao import quantization

    if kind == "int8":
        quantization.quantize_(blocks, quantization.Int8DynamicActivationInt8WeightConfig())
    else:
        config = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
        quantization.quantize_(blocks, config)


def compile_parts(*parts: nn.Module) -> None:
    """Compile at their first call what takes the time; blocks share one piece of code."""
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, MOST_COMPILATIONS)
    for part in parts:
        part.compile()


def map_tensors(change: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """A copy of a tree with every tensor changed."""
    changed: Any = tree
    if isinstance(tree, Tensor):
        changed = change(tree)
    elif isinstance(tree, tuple | list):
        changed = type(tree)(map_tensors(change, part) for part in tree)
    elif is_dataclass(tree) and not isinstance(tree, type):
        changed = replace(tree, **{f.name: map_tensors(change, getattr(tree, f.name)) for f in fields(tree) if f.init})
    return changed


def tensors_of(tree: object) -> list[Tensor]:
    """The tensors of a tree, always in the same order."""
    found: list[Tensor] = []
    map_tensors(lambda x: found.append(x) or x, tree)  # type: ignore[func-returns-value]
    return found


def key_of(tree: object) -> Hashable:
    """What two trees must share so that one graph serves both: structure, shapes, types and constants."""
    if isinstance(tree, Tensor):
        return tuple(tree.shape), tree.dtype
    if isinstance(tree, tuple | list):
        return tuple(map(key_of, tree))
    if is_dataclass(tree):
        return tuple(key_of(getattr(tree, f.name)) for f in fields(tree))
    return tree


@dataclass
class _Recorded:
    """A graph with the memory that it reads and writes, and what was last copied into it."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Any, ...]
    outputs: Any
    copied: tuple[Any, ...]


def fill(memory: tuple[Any, ...], inputs: tuple[Any, ...], copied: tuple[Any, ...]) -> None:
    """Copy inputs, trees of the same keys, into memory.

    A dataclass that is the same object as in `copied`, the inputs before, is there already; tensors may have been
    written to since.
    """
    for kept, given, before in zip(memory, inputs, copied, strict=True):
        if given is before and is_dataclass(given):
            continue
        for target, source in zip(tensors_of(kept), tensors_of(given), strict=True):
            target.copy_(source, non_blocking=True)


class BatchGraphs:
    """Records a function at the first inputs of their shapes, and replays it at the next ones."""

    def __init__(self) -> None:
        self._recorded: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self._pool: Any = None

    def __call__(self, function: Callable[..., Tree], *inputs: Any) -> Tree:
        """`function(*inputs)` in new tensors; inputs are trees on one CUDA device, dataclasses in them never change.

        The function asks the host for nothing, and is the same at every call with inputs of these shapes.
        """
        key = key_of(inputs)
        if key not in self._recorded:
            while len(self._recorded) >= MOST_GRAPHS:
                self._recorded.popitem(last=False)
            self._recorded[key] = self._record(function, inputs)
        self._recorded.move_to_end(key)
        recorded = self._recorded[key]
        fill(recorded.inputs, inputs, recorded.copied)
        recorded.copied = inputs
        recorded.graph.replay()
        outputs: Tree = map_tensors(torch.clone, recorded.outputs)  # the next replay writes over the graph's own
        return outputs

    def _record(self, function: Callable[..., Any], inputs: tuple[Any, ...]) -> _Recorded:
        """Capture the function, reading copies of its inputs."""
        kept = map_tensors(torch.clone, inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                function(*kept)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # others may load images
            outputs = function(*kept)
        return _Recorded(graph, kept, outputs, inputs)
