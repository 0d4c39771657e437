"""Training a small restorer, and putting it in front of another system."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from varestorer.commands.train import train
from varestorer.conditioning.restorer import Restorer, new_restorer
from varestorer.systems.varestorer import VARestorer
from varestorer.training.task import Batch
from varestorer.training.tasks.restorer import RestorerTask
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.seeds import torch_generator
from varestorer.weights.restorers import load_restorer

SIZES = {"num_features": 16, "num_groups": 1, "num_blocks": 1}


def options(system: VARestorer, restorer: Any) -> dict[str, Any]:
    return {**system.config, "restorer": restorer}


def batch_of(count: int = 2) -> Batch:
    hq = torch.rand(count, 3, 32, 32, generator=torch_generator(0))
    return {"hq": hq, "lq": hq.roll(1, 3), "name": [str(n) for n in range(count)], "key": torch.arange(count)}


def test_its_weights_follow_from_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    first, again, other = (new_restorer(**SIZES, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), want)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["network.head.1.weight"], other["network.head.1.weight"])


def test_only_the_restorer_trains_and_parts_of_weight_0_are_left_out(tiny_system: VARestorer) -> None:
    system = VARestorer(**options(tiny_system, SIZES))
    task = RestorerTask(system, {"l1": 0.0, "mse": 2.0})
    losses = task(batch_of(), 1)
    losses["loss"].backward()
    assert {name.split(".")[0] for name in task.trainable_parameters()} == {"restorer"}
    assert all(parameter.grad is not None for parameter in task.trainable_parameters().values())
    assert losses["loss"].item() == pytest.approx(2 * losses["mse"].item()) and "perceptual" not in losses
    assert RestorerTask(system, {"perceptual": 1.0}, "ms_ssim")(batch_of(), 1)["perceptual"] > 0


def test_the_perceptual_loss_sees_the_image_in_all_phases_of_its_squares(tiny_system: VARestorer) -> None:
    task = RestorerTask(VARestorer(**options(tiny_system, SIZES)), {"perceptual": 1.0}, "ms_ssim")
    seen: list[tuple[int, int]] = []
    task.perceptual = lambda image, target: seen.append(tuple(image.shape[-2:])) or image.mean()  # type: ignore[func-returns-value]
    for step in range(16):
        task(batch_of(1), step)
    assert sorted(seen) == sorted((32 - down, 32 - right) for down in range(4) for right in range(4))


def test_it_learns(tiny_system: VARestorer) -> None:
    task = RestorerTask(VARestorer(**options(tiny_system, SIZES)))
    optimizer = torch.optim.Adam(task.trainable_parameters().values(), lr=3e-3)
    losses = []
    for step in range(25):
        loss = task(batch_of(), step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_system_without_one_is_refused(tiny_system: VARestorer) -> None:
    with pytest.raises(UserError, match="set model.restorer to its sizes or to a file"):
        RestorerTask(tiny_system)


@pytest.mark.smoke
def test_what_a_run_trained_restores_in_runs_and_bundles(
    compose: Callable[..., DictConfig], tmp_path: Path, tiny_system: VARestorer
) -> None:
    run, bundle = str(tmp_path / "run"), tmp_path / "bundle"
    small = ["model.restorer={num_features: 16, num_groups: 1, num_blocks: 1}", "data=embedded", "data.crop=32"]
    plain = ["degradation=bicubic", "data.downscale=null"]
    quick = ["trainer.warmup_steps=0", "trainer.num_workers=0", "trainer.precision=fp32", "trainer.batch_size=2"]
    for stage in ("restorer", "texture"):
        quick += [f"stages.{stage}.trainer.max_steps=2", f"stages.{stage}.task.perceptual=ms_ssim"]
    train(compose("train", "+experiment=nano_restorer", "model=tiny", f"run_dir={run}", *small, *plain, *quick))
    trained = load_restorer(run)
    drawn = new_restorer(**SIZES).state_dict()
    assert any(not torch.equal(tensor, drawn[name]) for name, tensor in trained.state_dict().items())

    system = VARestorer(**options(tiny_system, run))
    assert _same(system.restorer, trained)
    assert not any(name.startswith("restorer.") for name in system.initial_state())
    assert _same(VARestorer.from_pretrained(run).restorer, trained)
    system.save_pretrained(bundle)
    assert _same(VARestorer.from_pretrained(bundle).restorer, trained)
    assert _same(load_restorer(bundle), trained)


def test_weights_that_a_later_stage_wants_are_asked_for_before_the_first(
    compose: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    first = "stages.restorer.task.perceptual=ms_ssim"
    words = ["+experiment=nano_restorer", "model=tiny", "data=embedded", f"run_dir={tmp_path / 'run'}", first]
    with pytest.raises(UsageError, match="stage texture: metric 'dists' needs vgg16"):
        train(compose("train", *words, "stages.texture.task.perceptual=dists"))
    with pytest.raises(UsageError, match="stage texture: metric 'dists' needs vgg16"):
        train(compose("train", *words, "stages.texture.task.perceptual=ms_ssim+dists/4"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_that_trained_none_is_refused(compose: Callable[..., DictConfig], tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    train(compose("train", "+experiment=smoke", f"run_dir={run}", "trainer.max_steps=1", "trainer.batch_size=1"))
    with pytest.raises(UserError, match="has no restorer of its own; give a run of nano_restorer"):
        load_restorer(run)


def _same(one: Restorer | None, other: Restorer) -> bool:
    assert one is not None
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
