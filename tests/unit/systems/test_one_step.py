"""One-step students of networks that read a prefix."""

from pathlib import Path

import pytest
import torch
from tiny_sizes import HVAR_SIZES, VARSR_SIZES

from varestorer import systems
from varestorer.systems.hvar import HVAR
from varestorer.systems.one_step import OneStepSystem
from varestorer.systems.varsr import VARSR
from varestorer.training.tasks.distillation import DistillationTask
from varestorer.utils.errors import UserError


def student_of(paper: str, **student: object) -> OneStepSystem:
    made = {"varsr": lambda: VARSR(**VARSR_SIZES, student=student), "hvar": lambda: HVAR(**HVAR_SIZES, student=student)}
    system = made[paper]().eval()
    with torch.no_grad():
        system.transformer.head.weight.mul_(50)
    return system


def batch_of(system: OneStepSystem) -> dict:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 2, 3, system.tile, system.tile, generator=generator)
    return {"hq": images[0], "lq": images[1], "key": torch.arange(2)}


PAPERS = pytest.mark.parametrize("paper", ["varsr", "hvar"])


@PAPERS
def test_distillation_moves_the_adapters_alone_and_towards_the_teacher(paper: str) -> None:
    system = student_of(paper, lora_rank=4)
    weights = {"kl": 1.0, "perceptual": 0.0, "mse": 0.5}
    task = DistillationTask(system, weights, straight_through={"gumbel": False}).train()
    trained = task.trainable_parameters()
    assert trained and all(".lora_" in name for name in trained)
    optimizer, batch = torch.optim.Adam(trained.values(), lr=1e-2), batch_of(system)
    before = {name: tensor.clone() for name, tensor in system.state_dict().items() if ".lora_" not in name}
    losses = []
    for step in range(8):
        parts = task(batch, step)
        parts["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(parts["kl"].item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(tensor, system.state_dict()[name]) for name, tensor in before.items())


@PAPERS
def test_without_distillation_the_student_is_the_teacher_asked_for_all_scales_at_once(paper: str) -> None:
    system, batch = student_of(paper, lora_rank=4), None
    batch = batch_of(system)
    context = system.transformer.context(_labels(2))
    condition = system.condition(batch["lq"])
    with torch.no_grad():
        student = system.student_logits(condition, context)
        layout = system.transformer.layout(system.schedule, student.device, condition.prefix.size)
        inputs = condition.pyramid.own_inputs()
        asked = slice(len(layout) - system.schedule.num_tokens, None)
        whole = system.transformer(inputs, context, layout, None, prefix_BPC=condition.prefix.tokens_BPC)
    assert torch.allclose(student, whole[:, asked], atol=1e-5)


@PAPERS
def test_the_teacher_sees_the_photograph_only_up_to_the_scale_it_predicts(paper: str) -> None:
    system = student_of(paper, lora_rank=4)
    batch, last = batch_of(system), system.schedule.slices[-1]
    pyramid, condition = system.pair_tokens(batch["hq"], batch["lq"])
    other, _ = system.pair_tokens(batch["hq"].flip(-1), batch["lq"])
    context = system.transformer.context(_labels(2))
    with torch.no_grad():
        one, two = (system.teacher_logits(tokens, context, None, condition) for tokens in (pyramid, other))
    assert torch.allclose(one[:, :1], two[:, :1], atol=1e-5) and not torch.allclose(one[:, last], two[:, last])


@PAPERS
def test_one_step_is_the_default_and_the_teacher_is_left(paper: str) -> None:
    system = student_of(paper, lora_rank=4)
    with torch.no_grad():
        for name, parameter in system.transformer.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    image = torch.rand(3, 11, 7)
    one, same, multi = (system.restore(image, 2, steps=steps).image for steps in (None, "one", "multi"))
    assert torch.equal(one, same) and not torch.equal(one, multi)
    plain = student_of(paper)
    taken = {n: t for n, t in system.parts()["transformer"].items()}
    if isinstance(plain, VARSR):
        plain.load_network(taken)
    else:
        plain.transformer.load_state_dict(taken)
    plain.tokenizer.load_state_dict(system.parts()["tokenizer"])
    assert torch.allclose(plain.restore(image, 2).image, multi, atol=1e-5)
    with pytest.raises(UserError, match="leave steps= out, got steps=multi"):
        plain.restore(image, 2, steps="multi")
    merged = system.merge_adapters().restore(image, 2).image
    assert torch.allclose(merged, one, atol=1e-3)
    with pytest.raises(UserError, match="needs the teacher"):
        system.restore(image, 2, steps="multi")


@PAPERS
def test_a_bundle_keeps_the_adapters(paper: str, tmp_path: Path) -> None:
    system = student_of(paper, lora_rank=4)
    with torch.no_grad():
        for name, parameter in system.transformer.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    system.save_pretrained(tmp_path / "bundle")
    assert (tmp_path / "bundle" / "adapters.safetensors").is_file()
    again, image = systems.load(tmp_path / "bundle"), torch.rand(3, 11, 7)
    for steps in ("one", "multi"):
        assert torch.allclose(again.restore(image, 2, steps=steps).image, system.restore(image, 2, steps=steps).image)


def test_keeping_codes_gives_the_degraded_image_back() -> None:
    system = student_of("varsr", lora_rank=4, keep_codes=1e6)
    lq = batch_of(system)["lq"]
    indices = system.restore_batch(lq).indices
    assert all(torch.equal(a, b) for a, b in zip(indices, system.encode(lq).indices, strict=True))


def _labels(batch_size: int):  # noqa: ANN202
    from varestorer.transformer import ClassLabels

    return ClassLabels(torch.zeros(batch_size, dtype=torch.int64))
