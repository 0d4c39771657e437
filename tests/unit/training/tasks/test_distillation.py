"""Options of distillation: adapters on chosen layers, and what the image losses see."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from varestorer.systems.varestorer import VARestorer
from varestorer.training.task import Batch
from varestorer.training.tasks.distillation import DistillationTask
from varestorer.transformer import VARTransformer
from varestorer.transformer.adapters import (
    adapter_parameters,
    attach_adapters,
    init_adapters,
    merge_adapters,
    target_pattern,
    use_adapters,
)
from varestorer.utils.errors import UserError
from varestorer.utils.seeds import torch_generator

IMAGE_ONLY = {"kl": 0.0, "perceptual": 0.0, "mse": 1.0}


def batch_of(*keys: int) -> Batch:
    hq = torch.stack([torch.rand(3, 32, 32, generator=torch_generator(0, key)) for key in keys])
    lq = F.avg_pool2d(hq, 4).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    return {"hq": hq, "lq": lq, "name": [str(k) for k in keys], "key": torch.tensor(keys)}


def task_of(system: VARestorer, weights: dict[str, float] = IMAGE_ONLY, **options: Any) -> DistillationTask:
    return DistillationTask(system, weights, perceptual="ms_ssim", **options)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (["self_attention"], {"self_attention.qkv", "self_attention.proj"}),
        (["cross_attention", "ffn"], {f"cross_attention.{n}" for n in ("q", "kv", "proj")} | {"ffn.fc1", "ffn.fc2"}),
    ],
)
def test_adapters_sit_on_the_chosen_layers(tiny_system: VARestorer, targets: list[str], layers: set[str]) -> None:
    transformer = VARTransformer(tiny_system.transformer.config)
    attach_adapters(transformer, 4, False, targets)
    found = {name.split(".", 2)[2].rsplit(".", 2)[0] for name in adapter_parameters(transformer)}
    assert found == layers
    # without adapters on cross attention the student keeps the teacher's
    assert transformer.blocks[0].cross_attention.use_v_bias is ("cross_attention" not in targets)


@torch.no_grad()
def test_adapters_of_the_feed_forward_switch_off_and_merge(tiny_system: VARestorer) -> None:
    transformer = VARTransformer(tiny_system.transformer.config)
    transformer.init_weights(torch_generator(0))
    attach_adapters(transformer, 4, True, ["ffn"])
    init_adapters(transformer, torch_generator(1))
    tiny_system.transformer = transformer
    condition, text = tiny_system.condition(batch_of(0)["lq"]), tiny_system.null_text(1)
    base = tiny_system.student_logits(condition, text)
    for parameter in adapter_parameters(transformer).values():
        parameter.normal_(std=0.3, generator=torch_generator(2))
    adapted = tiny_system.student_logits(condition, text)
    assert not torch.allclose(adapted, base, atol=1e-4)
    use_adapters(transformer, False)
    assert torch.equal(tiny_system.student_logits(condition, text), base)
    use_adapters(transformer, True)
    merge_adapters(transformer)
    assert not adapter_parameters(transformer)
    assert torch.allclose(tiny_system.student_logits(condition, text), adapted, atol=1e-5)


def test_unknown_layers_are_refused() -> None:
    with pytest.raises(UserError, match=r"lora_targets must list some of .*, ffn, got \['head'\]"):
        target_pattern(["head"])
    with pytest.raises(UserError, match=r"got \[\]"):
        target_pattern([])


@torch.no_grad()
def test_held_out_pictures_are_compared_whole_and_without_noise(tiny_system: VARestorer) -> None:
    task = task_of(tiny_system, straight_through={"gumbel": True}, condition_drop=1.0, tiles=[16, 32]).eval()
    scores = task(batch_of(0, 1), 0)
    restored = tiny_system.restore_batch(batch_of(0, 1)["lq"]).images_B3HW
    assert scores["mse"].item() == pytest.approx(4 * (restored - batch_of(0, 1)["hq"]).square().mean().item(), abs=1e-5)


def test_without_image_losses_nothing_is_decoded(tiny_system: VARestorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_system.tokenizer, "decode", lambda codes: pytest.fail("decoded"))
    assert "mse" not in task_of(tiny_system, {"kl": 1.0, "perceptual": 0.0, "mse": 0.0})(batch_of(0), 1)


def test_without_kl_the_teacher_is_not_asked(tiny_system: VARestorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VARestorer, "teacher_logits", lambda *_: pytest.fail("asked"))
    assert "kl" not in task_of(tiny_system)(batch_of(0), 1)


def test_images_compared_one_by_one_give_the_same_losses_and_gradients(tiny_system: VARestorer) -> None:
    found = []
    for slices in (False, True):
        options = {"gumbel": False, "image_slices": slices}
        task = task_of(tiny_system, {"kl": 0.0, "perceptual": 1.0, "mse": 1.0}, straight_through=options)
        tiny_system.zero_grad()
        losses = task(batch_of(1, 2, 3), 1)
        losses["loss"].backward()
        gradients = [p.grad.clone() for p in task.trainable_parameters().values() if p.grad is not None]
        found.append((losses, gradients))
    (whole, wanted), (sliced, gradients) = found
    for name in ("mse", "perceptual", "loss"):
        assert sliced[name].item() == pytest.approx(whole[name].item(), abs=1e-6)
    assert wanted
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(wanted, gradients, strict=True))


@pytest.mark.parametrize("options", [{}, {"image_slices": True}])
def test_the_loss_sees_the_residual_that_is_kept(tiny_system: VARestorer, options: dict[str, Any]) -> None:
    with torch.no_grad():
        tiny_system.transformer.head.weight.zero_()
        tiny_system.transformer.head.bias.zero_()
    traits = {"keep_bits": 9.0, "keep_residual": True}
    tiny_system.student_config = replace(tiny_system.student_config, **traits)
    batch = batch_of(1, 2)
    flat = batch | {"hq": batch["hq"].mean(dim=(2, 3), keepdim=True).expand_as(batch["hq"])}
    flat |= {"lq": flat["hq"] + 0.1}  # whatever the tokenizer makes of it, it comes through
    task = task_of(tiny_system, straight_through={"gumbel": False, **options})
    assert task(flat, 1)["mse"].item() == pytest.approx(0.04, rel=1e-4)
