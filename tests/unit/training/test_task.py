"""A frozen base in bfloat16 trains the same adapters."""

import pytest
import torch
from torch import Tensor, nn

from varestorer.systems.varestorer import VARestorer
from varestorer.training.task import frozen_matrices, keep_base_in
from varestorer.training.tasks.distillation import DistillationTask

BATCH = {"hq": torch.rand(2, 3, 32, 32), "lq": torch.rand(2, 3, 32, 32), "name": ["a", "b"], "key": torch.arange(2)}


def task_of(system: VARestorer) -> DistillationTask:
    return DistillationTask(system, perceptual="ms_ssim").train()  # type: ignore[return-value]


def losses_and_gradients(task: DistillationTask, bf16: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        losses = task(BATCH, 1)
    losses["loss"].backward()
    parameters = task.trainable_parameters()
    gradients = {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}
    task.zero_grad()
    return {name: value.detach() for name, value in losses.items()}, gradients


def test_a_bf16_base_changes_nothing_under_bf16_autocast(tiny_system: VARestorer) -> None:
    task = task_of(tiny_system)
    plain = losses_and_gradients(task, bf16=False)
    before = losses_and_gradients(task, bf16=True)
    keep_base_in(task, torch.bfloat16)
    after = losses_and_gradients(task, bf16=True)
    for want, have in zip(before, after, strict=True):
        assert all(torch.equal(have[name], want[name]) for name in want)
    assert float(after[0]["loss"]) == pytest.approx(float(plain[0]["loss"]), rel=0.05)


def test_the_base_is_bf16_and_what_trains_is_float32(tiny_system: VARestorer) -> None:
    task = task_of(tiny_system)
    keep_base_in(task, torch.bfloat16)
    _, gradients = losses_and_gradients(task, bf16=True)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert {parameter.dtype for parameter in task.trainable_parameters().values()} == {torch.float32}
    matrices = [layer for layer in tiny_system.transformer.blocks.modules() if isinstance(layer, nn.Linear)]
    frozen = [layer for layer in matrices if not layer.weight.requires_grad]
    assert frozen == list(frozen_matrices(task))
    assert len(frozen) == 7 * 2  # five adapted layers and two of the feed-forward, in two blocks
    assert {layer.weight.dtype for layer in frozen} == {torch.bfloat16}


def test_the_base_comes_back_in_float32_and_its_adapters_merge(tiny_system: VARestorer) -> None:
    task = task_of(tiny_system)
    image = torch.rand(1, 3, 32, 32)
    keep_base_in(task, torch.bfloat16)
    keep_base_in(task, torch.float32)
    assert {parameter.dtype for parameter in task.parameters()} == {torch.float32}
    separate = tiny_system.eval().restore_batch(image).logits
    merged = tiny_system.merge_adapters().restore_batch(image).logits
    assert separate is not None
    assert merged is not None
    assert torch.allclose(separate, merged, atol=1e-4)
