"""CUDA graphs of a function of tensors: all its kernels are launched at once, without Python in between."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

MOST_GRAPHS = 4  # of different shapes; each keeps its inputs and its results, all share their working memory
WARM_UPS = 2  # calls in which libraries choose kernels and tables are made, which cannot be recorded

Tree = TypeVar("Tree")
"""A tensor, or dataclasses, tuples and lists of trees; other things in it are constants."""


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


def tensors_of(tree: object) -> Iterator[Tensor]:
    """The tensors of a tree, always in the same order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for part in tree:
            yield from tensors_of(part)
    elif is_dataclass(tree):
        for f in fields(tree):
            yield from tensors_of(getattr(tree, f.name))


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

    def replay(self, inputs: tuple[Any, ...]) -> Any:
        """The outputs for other inputs of the same key, in memory of their own."""
        fill(self.inputs, inputs, self.copied)
        self.copied = inputs
        self.graph.replay()
        return map_tensors(torch.clone, self.outputs)


def fill(memory: tuple[Any, ...], inputs: tuple[Any, ...], copied: tuple[Any, ...]) -> None:
    """Copy inputs into memory of the same form.

    Args:
        memory: trees.
        inputs: trees of the same keys.
        copied: the inputs before: a dataclass that comes again is there already. Tensors may have been written to.
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
        """`function(*inputs)`.

        Args:
            function: asks the host for nothing, and is the same at every call with inputs of these shapes.
            inputs: trees on one CUDA device; what is in a dataclass stays as it is.
        Returns:
            a tree of new tensors.
        """
        key = key_of(inputs)
        if key not in self._recorded:
            while len(self._recorded) >= MOST_GRAPHS:
                self._recorded.popitem(last=False)
            self._recorded[key] = self._record(function, inputs)
        self._recorded.move_to_end(key)
        outputs: Tree = self._recorded[key].replay(inputs)
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
