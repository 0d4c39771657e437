"""What a training step leaves out, shares or fuses changes no loss and no gradient."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from varestorer.benchmark.train_step import TrainStep, made_up_batch
from varestorer.losses.perceptual import gaussian_band, ms_ssim
from varestorer.losses.tokens import distribution_matching_loss
from varestorer.systems.varestorer import VARestorer
from varestorer.tokenizer import ScaleSchedule
from varestorer.training.optim import build_optimizer
from varestorer.training.task import to_device, weighted_sum
from varestorer.training.tasks.distillation import DistillationTask
from varestorer.training.tasks.tokenizer import TokenizerWeights
from varestorer.transformer.heads import BitHead
from varestorer.utils.seeds import torch_generator

CPU = torch.device("cpu")
ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
SCHEDULE = ScaleSchedule.build(sides=[1, 2, 4])


def task_of(system: VARestorer, **options: Any) -> DistillationTask:
    return DistillationTask(system, perceptual="ms_ssim", condition_drop=0.0, **options).train()  # type: ignore[return-value]


def batch_of(system: VARestorer, size: int = 2) -> dict[str, Any]:
    return made_up_batch(size, system.tile, CPU)


def test_nothing_before_the_first_adapter_needs_a_gradient(tiny_system: VARestorer) -> None:
    entering, leaving = [], []
    first = tiny_system.transformer.blocks[0]
    first.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0].requires_grad))
    first.register_forward_hook(lambda _, inputs, output: leaving.append(output.requires_grad))
    task_of(tiny_system)(batch_of(tiny_system), 1)["loss"].backward()
    assert entering == [False, False]  # of the teacher and of the student
    assert leaving == [False, True]
    down, up = (getattr(first.self_attention.qkv, name).student.weight.grad for name in ("lora_A", "lora_B"))
    assert down.any() and up.any()


def test_frozen_weights_take_no_gradients(tiny_system: VARestorer) -> None:
    task = task_of(tiny_system)
    task(batch_of(tiny_system), 1)["loss"].backward()
    trained = task.trainable_parameters()
    held = {name.removeprefix("system.") for name, p in task.named_parameters() if p.grad is not None}
    assert held == set(trained)


def test_the_decoders_backward_pass_costs_no_more_than_its_forward_pass(tiny_system: VARestorer) -> None:
    task_of(tiny_system)
    codes = torch.randn(1, 8, 4, 4, generator=torch_generator(0), requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        image = tiny_system.tokenizer.decode(codes)
        forward = counter.get_total_flops()
        image.square().mean().backward()
    assert codes.grad is not None
    assert counter.get_total_flops() == 2 * forward  # with gradients of the weights it would be three times as much


def test_both_images_of_a_pair_in_one_pass_are_the_same_tokens(tiny_system: VARestorer) -> None:
    batch = batch_of(tiny_system, 3)
    r_hq, seen = tiny_system.pair_tokens(batch["hq"], batch["lq"])
    photograph, condition = tiny_system.encode(batch["hq"]), tiny_system.condition(batch["lq"])
    assert torch.equal(r_hq.labels(), photograph.labels())
    assert torch.allclose(r_hq.inputs(), photograph.inputs(), atol=1e-6)
    assert torch.allclose(seen.tokens_BLZ, condition.tokens_BLZ, atol=1e-6)
    assert seen.layout is condition.layout


def test_the_restorer_cleans_only_degraded_images(tiny_system: VARestorer) -> None:
    class Inverter(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return 1 - images

    tiny_system.restorer = Inverter()  # type: ignore[assignment]
    batch = batch_of(tiny_system)
    r_hq, condition = tiny_system.pair_tokens(batch["hq"], batch["lq"])
    assert torch.equal(r_hq.labels(), tiny_system.encode(batch["hq"]).labels())
    assert torch.equal(condition.pyramid.labels(), tiny_system.encode(1 - batch["lq"]).labels())


def test_the_encoder_runs_once_for_both_images(tiny_system: VARestorer) -> None:
    sizes: list[int] = []
    tiny_system.tokenizer.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    task_of(tiny_system)(batch_of(tiny_system), 1)
    assert sizes == [4]


@pytest.mark.parametrize("reduction", ["scale", "token"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_divergence_by_margins_is_that_of_log_softmaxes(direction: str, reduction: str) -> None:
    drawn = torch.randn(2, 3, SCHEDULE.num_tokens, 8, 2, generator=torch_generator(0)) * 4
    drawn[:, 0, 0, 0] = torch.tensor([[60.0, -60.0], [-60.0, 60.0]])  # sure of opposite bits
    teacher, student = drawn[0], drawn[1].requires_grad_()
    found = distribution_matching_loss(teacher, student, SCHEDULE, BitHead(1, 8), direction, 1.0, reduction)
    p, q = (x.log_softmax(dim=-1) for x in ((teacher, student) if direction == "forward" else (student, teacher)))
    kl_BLZ = (p.exp() * (p - q)).sum(dim=-1)
    wanted = kl_BLZ.mean() if reduction == "token" else sum(kl_BLZ[:, tokens].mean() for tokens in SCHEDULE.slices)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)  # type: ignore[union-attr]
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (found, wanted)]  # type: ignore[list-item]
    assert torch.allclose(*gradients, atol=1e-6)


def test_divergence_stays_in_float32_under_autocast() -> None:
    teacher, student = torch.randn(2, 2, SCHEDULE.num_tokens, 8, 2, generator=torch_generator(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = distribution_matching_loss(teacher, student, SCHEDULE, BitHead(1, 8))
    assert torch.equal(lowered, distribution_matching_loss(teacher, student, SCHEDULE, BitHead(1, 8)))


@pytest.mark.parametrize(("height", "width", "window"), [(20, 15, 11), (12, 12, 5)])
def test_blur_by_matrices_is_the_separable_convolution(height: int, width: int, window: int) -> None:
    image = torch.rand(1, 1, height, width, generator=torch_generator(0))
    kernel = gaussian_band(window, window, CPU)[0]
    wanted = F.conv2d(F.conv2d(image, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    found = gaussian_band(height, window, CPU) @ image @ gaussian_band(width, window, CPU).T
    assert torch.allclose(found, wanted, atol=1e-6)
    assert kernel.sum().item() == pytest.approx(1.0)
    assert torch.equal(kernel, kernel.flip(0))


def test_what_is_kept_for_the_blur_serves_training_after_restoring() -> None:
    gaussian_band.cache_clear()
    images = torch.rand(1, 3, 16, 16, generator=torch_generator(0))
    with torch.inference_mode():
        ms_ssim(images, images)
    ms_ssim(images.clone().requires_grad_(), images.flip(-1)).sum().backward()


def test_the_optimizer_is_one_kernel_and_takes_the_same_steps(tiny_system: VARestorer) -> None:
    task = task_of(tiny_system)
    fused = build_optimizer(task, ADAMW)
    plain = [p.detach().clone().requires_grad_() for p in task.trainable_parameters().values()]
    other = ADAMW(plain)
    names = list(task.trainable_parameters())
    assert all(group["fused"] for group in fused.param_groups)
    assert not any(task.no_decay(name, p) for name, p in task.trainable_parameters().items())
    for step in range(3):
        for name, parameter, twin in zip(names, task.trainable_parameters().values(), plain, strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=torch_generator(step, name))
            twin.grad = parameter.grad.clone()
        fused.step(), other.step()
    pairs = zip(task.trainable_parameters().values(), plain, strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


def test_a_chosen_way_of_stepping_is_kept(tiny_system: VARestorer) -> None:
    task = task_of(tiny_system)
    chosen = build_optimizer(task, partial(torch.optim.AdamW, foreach=True))
    assert all(group["foreach"] and not group["fused"] for group in chosen.param_groups)
    assert not any(group.get("fused") for group in build_optimizer(task, torch.optim.Adagrad).param_groups)
    on_meta = build_optimizer(DistillationTask(tiny_system, perceptual="ms_ssim").to("meta"), ADAMW)  # type: ignore[arg-type]
    assert not any(group["fused"] for group in on_meta.param_groups)


def test_parts_that_weigh_nothing_get_no_gradient() -> None:
    value = torch.tensor(2.0, requires_grad=True)
    dead = torch.tensor(0.0, requires_grad=True)
    parts = {"mse": value * 3, "entropy": dead.sqrt()}  # whose gradient at 0 is infinite
    weighted_sum(TokenizerWeights(mse=0.5, entropy=0.0), parts).backward()
    assert value.grad is not None and value.grad.item() == 1.5
    assert dead.grad is None
    assert weighted_sum(TokenizerWeights(mse=0.0), parts).item() == 0.0


def test_keys_stay_on_the_host() -> None:
    batch = to_device({"hq": torch.zeros(1, 3, 2, 2), "key": torch.arange(1), "name": ["x"]}, torch.device("meta"))
    assert batch["hq"].is_meta and not batch["key"].is_meta and batch["name"] == ["x"]


@pytest.mark.gpu
def test_the_host_never_waits_within_a_forward_and_backward_pass(tiny_system: VARestorer) -> None:
    task = task_of(tiny_system.to("cuda"), straight_through={"gumbel": False})
    step = TrainStep(task, ADAMW, 2, tiny_system.tile)
    for _ in range(2):
        step.run(bf16=True)  # layouts and masks are made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run(bf16=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
