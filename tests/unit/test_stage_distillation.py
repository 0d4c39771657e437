"""Options of distillation: adapters on chosen layers, a trained encoder, image losses on crops or smaller images."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from varestorer.losses.pixel import mse_loss
from varestorer.systems.varestorer import VARestorer
from varestorer.training.crops import random_crops
from varestorer.training.distillation import DistillationTask
from varestorer.training.encoder import straight_through, trained_condition
from varestorer.training.task import Batch
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
from varestorer.utils.images import to_network
from varestorer.utils.seeds import torch_generator

IMAGE_ONLY = {"kl": 0.0, "perceptual": 0.0, "mse": 1.0}


def batch_of(*keys: int) -> Batch:
    hq = torch.stack([torch.rand(3, 32, 32, generator=torch_generator(0, key)) for key in keys])
    lq = F.avg_pool2d(hq, 4).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    return {"hq": hq, "lq": lq, "name": [str(k) for k in keys], "key": torch.tensor(keys)}


def task_of(system: VARestorer, weights: dict[str, float] = IMAGE_ONLY, **options: Any) -> DistillationTask:
    return DistillationTask(system, weights, perceptual="features", **options)


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


def test_a_trained_encoder_sees_the_same_tokens(tiny_system: VARestorer) -> None:
    lq = batch_of(0, 1)["lq"]
    plain, trained = tiny_system.condition(lq), trained_condition(tiny_system, lq)
    assert torch.allclose(plain.tokens_BLZ, trained.tokens_BLZ, atol=1e-6)
    assert not plain.tokens_BLZ.requires_grad
    assert trained.tokens_BLZ.requires_grad


def test_the_sum_of_all_scales_passes_its_gradient_unchanged(tiny_system: VARestorer) -> None:
    quantizer, schedule = tiny_system.tokenizer.quantizer, tiny_system.schedule
    features = torch.randn(2, 8, 4, 4, generator=torch_generator(0)).requires_grad_()
    pyramid = straight_through(quantizer(features.detach(), schedule), features, schedule, quantizer.quantiser)
    wanted = torch.randn(2, 8, 4, 4, generator=torch_generator(1))
    (gradient,) = torch.autograd.grad(pyramid.cumulative[-1], features, wanted, retain_graph=True)
    assert torch.allclose(gradient, wanted, atol=1e-5)
    (coarse,) = torch.autograd.grad(pyramid.cumulative[0], features, wanted)  # one token: the mean alone
    assert torch.allclose(coarse, wanted.mean(dim=(2, 3), keepdim=True).expand_as(coarse), atol=1e-5)


def test_the_encoder_learns_from_the_degraded_image_alone(tiny_system: VARestorer) -> None:
    task = task_of(tiny_system, {"kl": 1.0, "perceptual": 0.0, "mse": 1.0}, trained=["adapters", "encoder"])
    names = task.trainable_parameters()
    assert {name.split(".")[1] for name in names if name.startswith("tokenizer")} == {"encoder"}
    assert any(".lora_" in name for name in names)
    frozen = task_of(tiny_system, {"kl": 1.0, "perceptual": 0.0, "mse": 1.0})
    with torch.no_grad():
        assert torch.allclose(task(batch_of(0), 1)["loss"], frozen(batch_of(0), 1)["loss"], atol=1e-5)
    tiny_system.requires_grad_(False)
    task_of(tiny_system)  # a task freezes all but its own
    task = task_of(tiny_system, {"kl": 1.0, "perceptual": 0.0, "mse": 1.0}, trained=["adapters", "encoder"])
    labels = task._photograph(tiny_system, batch_of(0)["hq"]).labels()
    task(batch_of(0), 1)["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for n, p in names.items() if n.startswith("tokenizer"))
    torch.optim.SGD(names.values(), lr=10.0).step()
    assert torch.equal(task._photograph(tiny_system, batch_of(0)["hq"]).labels(), labels)
    assert not torch.equal(tiny_system.encode(batch_of(0)["hq"]).labels(), labels)


def test_the_encoder_does_not_train_alone(tiny_system: VARestorer) -> None:
    with pytest.raises(UserError, match=r"got trained=\['encoder'\]"):
        task_of(tiny_system, trained=["encoder"])


def test_crops_of_codes_and_image_show_the_same_place() -> None:
    rows = torch.arange(4.0)
    codes = (rows[:, None] * 10 + rows)[None, None].repeat(3, 1, 1, 1)
    image = codes.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3).expand(-1, 3, -1, -1)
    place = torch.tensor([[0.0, 0.0], [0.999999, 0.4], [1.0, 1.0]])
    cut, shown = random_crops(codes, image, 16, place)
    assert cut[:, 0, 0, 0].tolist() == [0.0, 21.0, 22.0]
    assert shown.shape == (3, 3, 16, 16)
    assert torch.equal(shown[:, :1, ::8, ::8], cut)


def test_only_the_crop_is_decoded_and_its_place_belongs_to_sample_and_step(
    tiny_system: VARestorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, decode = [], tiny_system.tokenizer.decode
    monkeypatch.setattr(tiny_system.tokenizer, "decode", lambda codes: sizes.append(codes.shape[-2:]) or decode(codes))
    task = task_of(tiny_system, straight_through={"crop": 16})
    with torch.no_grad():
        alone = [task(batch_of(key), 7)["mse"] for key in (3, 4)]
        assert torch.allclose(task(batch_of(3, 4), 7)["mse"], torch.stack(alone).mean(), atol=1e-6)
        assert len({round(task(batch_of(3), step)["mse"].item(), 6) for step in range(1, 8)}) > 1
    assert set(sizes) == {(2, 2)}
    task(batch_of(3), 7)["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in task.trainable_parameters().values())


@torch.no_grad()
def test_smaller_images_are_compared_where_asked(tiny_system: VARestorer) -> None:
    task = task_of(tiny_system, straight_through={"shrink": 4, "gumbel": False}, condition_drop=0.0)
    restored = to_network(tiny_system.restore_batch(batch_of(0)["lq"]).images_B3HW)
    expected = mse_loss(F.avg_pool2d(restored, 4), F.avg_pool2d(to_network(batch_of(0)["hq"]), 4))
    assert task(batch_of(0), 1)["mse"].item() == pytest.approx(expected.item(), abs=1e-5)


@torch.no_grad()
def test_held_out_pictures_are_compared_whole_and_without_noise(tiny_system: VARestorer) -> None:
    options = {"crop": 16, "gumbel": True}
    task = task_of(tiny_system, straight_through=options, condition_drop=1.0, tiles=[16, 32]).eval()
    scores = task.validation(batch_of(0, 1))
    restored = tiny_system.restore_batch(batch_of(0, 1)["lq"]).images_B3HW
    assert scores["mse"].item() == pytest.approx(4 * (restored - batch_of(0, 1)["hq"]).square().mean().item(), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": 12}, "crop must be a multiple of 8 pixels, at most the tile's 32, got 12"),
        ({"crop": 40}, "at most the tile's 32, got 40"),
        ({"crop": 16, "shrink": 3}, "shrink must divide the side of what is compared, got 3"),
    ],
)
def test_impossible_images_are_refused(tiny_system: VARestorer, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        task_of(tiny_system, straight_through=options)


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
    with pytest.raises(UserError, match="the residual is of whole ones; leave out the crop"):
        task_of(tiny_system, straight_through={"crop": 16})
