"""The memory report agrees with what real tensors take."""

import copy
from functools import partial

import pytest
import torch

from varestorer.benchmark.memory import measured_peak, memory_report, optimizer_bytes, step_memory, weights_by_part
from varestorer.systems.varestorer import VARestorer
from varestorer.training.distillation import DistillationTask
from varestorer.training.precision import keep_base_in
from varestorer.training.task import Task
from varestorer.training.teacher import TeacherTask

ADAMW = partial(torch.optim.AdamW, lr=1e-3)


def on_meta(task: Task) -> Task:
    return copy.deepcopy(task).to("meta")  # type: ignore[return-value]


def saved_bytes(task: Task, micro_batch: int, bf16: bool) -> int:
    """Bytes of distinct memory that a real forward pass keeps for the backward pass, beside the weights."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [*task.parameters(), *task.buffers()]}
    sizes: dict[int, int] = {}
    alive = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            alive.append(tensor)
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.rand(micro_batch, 3, 32, 32)
    batch = {"hq": images, "lq": images, "name": ["x"] * micro_batch, "key": torch.arange(micro_batch)}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            losses = task(batch, 1)
    assert losses["loss"].requires_grad
    return sum(sizes.values())


@pytest.fixture
def task(tiny_system: VARestorer) -> Task:
    return DistillationTask(tiny_system, perceptual="ms_ssim").train()


def test_weights_are_exact(task: Task) -> None:
    sizes = [tensor.numel() * tensor.element_size() for tensor in [*task.parameters(), *task.buffers()]]
    assert sum(weights_by_part(on_meta(task)).values()) == sum(sizes)
    halved = weights_by_part(task)["transformer blocks"]
    keep_base_in(task, torch.bfloat16)
    halved -= weights_by_part(task)["transformer blocks"]
    blocks = task.system.transformer.blocks  # type: ignore[union-attr, operator]
    frozen = sum(p.numel() for p in blocks.parameters() if p.dtype == torch.bfloat16)  # type: ignore[union-attr]
    assert halved == 2 * frozen > 0


def test_the_optimisers_state_is_exact(task: Task) -> None:
    trained = sum(parameter.numel() for parameter in task.trainable_parameters().values())
    steps = len(task.trainable_parameters())
    assert optimizer_bytes(on_meta(task), ADAMW) == 4 * (2 * trained + steps)


@pytest.mark.parametrize("stage", [DistillationTask, TeacherTask])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_kept_activations_are_those_of_a_real_pass(
    tiny_system: VARestorer, stage: type[Task], micro_batch: int
) -> None:
    options = {"perceptual": "ms_ssim"} if stage is DistillationTask else {}
    task = stage(tiny_system, **options).train()
    real = saved_bytes(task, micro_batch, bf16=False)
    kept = sum(step_memory(on_meta(task), micro_batch, 32, bf16=False)[0].values())
    assert 0.9 < kept / real < 1.15


def test_kept_activations_under_autocast_are_near_the_cpus(task: Task) -> None:
    # CUDA's autocast normalises in float32, the CPU's does not, so CUDA keeps more
    kept = sum(step_memory(on_meta(task), 2, 32, bf16=True)[0].values())
    assert 0.9 < kept / saved_bytes(task, 2, bf16=True) < 2.0


def test_checkpointing_keeps_less_and_each_image_keeps_the_same(tiny_system: VARestorer) -> None:
    kept = {}
    for is_checkpointed in (False, True):
        task = DistillationTask(tiny_system, perceptual="ms_ssim", checkpoint_activations=is_checkpointed).train()
        sizes = [step_memory(on_meta(task), count, 32, bf16=True)[0]["student forward"] for count in (1, 2, 3)]
        assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], rel=0.02)
        kept[is_checkpointed] = sizes[1] - sizes[0]
    assert kept[True] < kept[False] / 5


def test_the_rows_add_up_to_the_peak(task: Task) -> None:
    rows = memory_report(on_meta(task), ADAMW, 1, 32)
    weights = sum(weights_by_part(task).values())
    assert sum(size for (kind, _), size in rows.items() if kind == "weights") == weights
    assert rows["activations", "image losses"] > 0
    assert sum(rows.values()) > weights + sum(step_memory(on_meta(task), 1, 32, bf16=True)[1].values())


def test_a_report_leaves_torch_as_it_was(task: Task) -> None:
    before = torch.autocast, torch.utils.checkpoint.checkpoint
    memory_report(on_meta(task), ADAMW, 1, 32)
    assert (torch.autocast, torch.utils.checkpoint.checkpoint) == before


@pytest.mark.gpu
def test_the_calculation_agrees_with_a_gpu() -> None:
    model = {"channels": 64, "multipliers": (1, 2, 2), "latent_width": 16}
    network = {"width": 512, "depth": 8, "num_heads": 8, "latent_width": 16, "text_width": 256, "text_length": 64}
    with torch.device("meta"):
        system = VARestorer({"sides": [1, 2, 4, 8, 16, 32]}, model, network)
    task = DistillationTask(system, perceptual="ms_ssim", checkpoint_activations=True).train()
    keep_base_in(task, torch.bfloat16)
    calculated = sum(memory_report(task, ADAMW, 4, system.tile).values())
    measured = measured_peak(task.to_empty(device="cuda"), ADAMW, 4, system.tile)  # type: ignore[arg-type]
    assert calculated == pytest.approx(measured, rel=0.2)
