"""`benchmark what=memory`: how much GPU memory a stage of training needs, by calculation: nothing is allocated.

The networks live on the meta device. One micro-batch goes forward and backward there, as it would on CUDA, while every
tensor's life is followed. Not counted: what CUDA takes for itself (about half a gigabyte), cuDNN's working memory, and
gaps between tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from varestorer.benchmark.counting import Ledger, as_on_cuda
from varestorer.benchmark.report import GIB, Report
from varestorer.benchmark.train_step import BACKWARD, TrainStep, made_up_batch
from varestorer.evaluation.tables import Column, Table, TableRow
from varestorer.training.optim import OptimizerFactory, build_optimizer
from varestorer.training.task import Task
from varestorer.utils.device import num_bytes
from varestorer.utils.watch import observed, watch

Rows = dict[tuple[str, str], int]
"""What memory holds (weights, gradients, optimizer, averages, activations), and what of it -> bytes."""


def run(
    report: Report,
    make: Callable[[], Task],
    optimizer: OptimizerFactory,
    micro_batches: Sequence[int],
    side: int,
    device: torch.device,
    folder: Path | None,
) -> None:
    """Print, and write if asked, the memory of a training step at each micro-batch; on a GPU it is measured too.

    `make` gives the task on the meta device, its base as it is kept in training; see `memory_report`.
    """
    columns: dict[int, Rows] = {}
    peaks: dict[int, int] = {}
    for micro_batch in micro_batches:
        columns[micro_batch] = memory_report(make(), optimizer, micro_batch, side)
        if device.type == "cuda":
            peaks[micro_batch] = measured_peak(make().to_empty(device=device), optimizer, micro_batch, side)
            torch.cuda.empty_cache()
    lines = {("peak", "all"): {size: sum(rows.values()) for size, rows in columns.items()}}
    if peaks:
        lines["measured", "peak"] = peaks
    held = {name: {n: rows.get(name) for n, rows in columns.items()} for rows in columns.values() for name in rows}
    rows = [
        TableRow({"GiB": kind, "of": part, **{str(size): value and value / GIB for size, value in found.items()}})
        for (kind, part), found in (held | lines).items()
    ]
    texts = Column("GiB", is_text=True), Column("of", is_text=True)
    report.show(Table((*texts, *(Column(str(size)) for size in columns)), tuple(rows), "at a micro-batch of"))
    if folder is not None:
        found = {
            str(size): {
                "rows": [{"kind": kind, "part": part, "bytes": value} for (kind, part), value in rows.items()],
                "peak": sum(rows.values()),
                "measured_peak": peaks.get(size),
            }
            for size, rows in columns.items()
        }
        report.write(folder, [], None, {"micro_batches": found})


def memory_report(task: Task, optimizer: OptimizerFactory, micro_batch: int, side: int) -> Rows:
    """What a training step under bfloat16 autocast holds at its peak, part by part, on one process.

    The task is on the meta device, its frozen weights in the precision they will be kept in (`keep_base_in`);
    `micro_batch` images of `side` pixels go through the networks at once. The sum of the rows is the peak; activations
    are those that are alive then, by the part that made them.
    """
    averaged = sum(parameter.numel() for parameter in task.averaged_parameters().values())
    rows = {("weights", part): size for part, size in weights_by_part(task).items()}
    rows["gradients", "of what trains"] = num_bytes(task.trainable_parameters().values())
    rows["optimizer", "state"] = optimizer_bytes(task, optimizer)
    rows["averages", "float32"] = averaged * torch.float32.itemsize
    _, at_peak = step_memory(task, micro_batch, side, bf16=True)
    return rows | {("activations", part): size for part, size in at_peak.items() if size}


def weights_by_part(task: Task) -> dict[str, int]:
    """Bytes of parameters and buffers: adapters, the blocks, and every other network that the task holds."""
    found: dict[str, int] = {}
    held = {id(tensor): (name, tensor) for name, tensor in [*task.named_parameters(), *task.named_buffers()]}
    for name, tensor in held.values():
        first, second, *_ = [*name.removeprefix("system.").split("."), ""]
        part = {"perceptual": "perceptual loss", "teacher": "separate teacher", "tokenizer": f"VAE {second}"}.get(first)
        if first == "transformer":
            part = "transformer blocks" if second == "blocks" else "transformer, the rest"
        part = "adapters" if ".lora_" in name else part or first
        found[part] = found.get(part, 0) + num_bytes([tensor])
    return found


def optimizer_bytes(task: Task, factory: OptimizerFactory) -> int:
    """Bytes of the optimizer's state after a step."""
    optimizer = build_optimizer(task, factory)
    for parameter in task.trainable_parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return num_bytes(tensors)


def step_memory(task: Task, micro_batch: int, side: int, bf16: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Send a micro-batch forward and backward through a task on the meta device.

    Returns:
        bytes by the part that made them: alive between the forward and the backward pass, and when most is alive.
    """
    for parameter in task.trainable_parameters().values():
        parameter.grad = torch.zeros_like(parameter)  # there from the micro-batch before
    batch = made_up_batch(micro_batch, side, torch.device("meta"))
    ledger = Ledger((*task.parameters(), *task.buffers()))
    with ledger, as_on_cuda(bf16), observed(ledger.opened):
        losses = task(batch, 1)
        kept = dict(ledger.live)
        with watch(BACKWARD):
            losses["loss"].backward()
    for parameter in task.parameters():
        parameter.grad = None
    return kept, dict(ledger.at_peak)


def measured_peak(task: Task, optimizer: OptimizerFactory, micro_batch: int, side: int) -> int:
    """Bytes that a task takes at most on a GPU in two steps of two micro-batches, bfloat16 autocast.

    What else the process holds there is left out. The task, of any weights, is changed; see `memory_report`.
    """
    device = next(task.parameters()).device
    others = torch.cuda.memory_allocated(device) - sum(weights_by_part(task).values())
    torch.cuda.reset_peak_memory_stats(device)
    step = TrainStep(task, optimizer, micro_batch, side)
    for _ in range(2):
        step.gradients(bf16=True)
        step.run(bf16=True)
    return int(torch.cuda.max_memory_allocated(device)) - others
