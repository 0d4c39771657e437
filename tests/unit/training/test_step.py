"""What one step of `fit` does: the length of the step, its gradients' norm, the averages after it."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy_training import ToyPairs, ToySystem, ToyTask, config, metrics

from varestorer.data.loader import collate
from varestorer.training.config import TrainerConfig
from varestorer.training.fit import fit, make_accelerator
from varestorer.training.run import Run
from varestorer.weights.runs import load_run_weights, read_tensors

SGD = partial(torch.optim.SGD, lr=0.5)
NAMES = ("second.weight", "second.bias")


def plain(**changes: object) -> TrainerConfig:
    """Every step is kept, and is the gradient times a constant learning rate."""
    values = {"warmup_steps": 0, "schedule": "constant", "checkpoint_every": 1, "keep_last": 99, "max_steps": 4}
    return config(**{**values, **changes})


def train(folder: Path, cfg: TrainerConfig, **options: object) -> dict[str, Tensor]:
    """One stage by plain gradient descent; returns the weights it began with."""
    torch.manual_seed(5)
    task = ToyTask(ToySystem(), dropout=0)  # which draws other numbers for other shapes
    task.name = "toy"
    start = {name: parameter.detach().clone() for name, parameter in task.trainable_parameters().items()}
    fit(task, ToyPairs(), cfg, SGD, Run(folder, make_accelerator("cpu"), seed=1), **options)  # type: ignore[arg-type]
    return start


def saved(folder: Path, step: int, name: str = "model") -> dict[str, Tensor]:
    return read_tensors(folder / f"checkpoints/toy/step_{step:06d}/{name}.safetensors")


def length(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return math.sqrt(sum((after[name] - before[name]).square().sum().item() for name in NAMES))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_is_as_long_as_the_clipped_gradient(tmp_path: Path, accumulate: int) -> None:
    train(tmp_path / "free", plain(clip_norm=None, accumulate=accumulate))
    norms = [line["grad_norm"] for line in metrics(tmp_path / "free")]
    assert length(saved(tmp_path / "free", 1), saved(tmp_path / "free", 2)) == pytest.approx(0.5 * norms[1], rel=1e-4)
    for share in (0.1, 0.9, 1.1):
        folder = tmp_path / str(share)
        start = train(folder, plain(clip_norm=share * norms[0], accumulate=accumulate, max_steps=1))
        assert metrics(folder)[0]["grad_norm"] == pytest.approx(norms[0], rel=1e-5)  # before clipping
        assert length(start, saved(folder, 1)) == pytest.approx(0.5 * min(share, 1) * norms[0], rel=1e-4)


def test_accumulation_changes_no_norm_and_no_step(tmp_path: Path) -> None:
    for accumulate in (1, 2, 4):
        train(tmp_path / str(accumulate), plain(accumulate=accumulate))
    for accumulate in (2, 4):
        for one, other in zip(metrics(tmp_path / "1"), metrics(tmp_path / str(accumulate)), strict=True):
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        one, other = (saved(tmp_path / str(count), 4) for count in (1, accumulate))
        assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in NAMES)


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_averages_follow_the_weights_after_each_step(tmp_path: Path, decay: float) -> None:
    """a <- d a + (1 - d) w with d = min(decay, (1 + step) / (10 + step)), from the weights of the start."""
    average = train(tmp_path, plain(ema_decay=decay))
    for step in range(1, 5):
        d, weights = min(decay, (1 + step) / (10 + step)), saved(tmp_path, step)
        average = {name: d * average[name] + (1 - d) * weights[name] for name in NAMES}
        kept = saved(tmp_path, step, "ema")
        assert all(torch.allclose(kept[name], average[name], atol=1e-7) for name in NAMES)


def test_the_cosine_begins_at_the_peak_after_the_warm_up_and_its_last_step_still_moves() -> None:
    cfg = config(max_steps=6, warmup_steps=2)
    wanted = [0.5, 1.0, *(0.5 + 0.5 * math.cos(math.pi * k / 4) for k in range(4))]
    assert [cfg.learning_rate_factor(step) for step in range(1, 7)] == pytest.approx(wanted)
    kept = config(max_steps=6, warmup_steps=2, final_lr_ratio=0.2).learning_rate_factor(6)
    assert kept == pytest.approx(0.2 + 0.8 * wanted[-1])


def test_held_out_batches_of_unequal_size_count_by_their_pictures(tmp_path: Path) -> None:
    batches = [collate([ToyPairs(9)[n] for n in numbers]) for numbers in (range(3), range(3, 4))]
    train(tmp_path / "two", plain(validate_every=1, max_steps=1), validation=batches)
    train(
        tmp_path / "one", plain(validate_every=1, max_steps=1), validation=[collate([ToyPairs(9)[n] for n in range(4)])]
    )
    two, one = (metrics(tmp_path / name)[0]["val/mse"] for name in ("two", "one"))
    assert two == pytest.approx(one, rel=1e-5)


def test_of_two_stages_that_train_the_same_tensors_the_later_one_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(5)
    system, run = ToySystem(), Run(tmp_path, make_accelerator("cpu"))
    ends = []
    for name in ("b_first", "a_second"):  # not the order of their names
        task = ToyTask(system)
        task.name = name
        fit(task, ToyPairs(), plain(), SGD, run)
        ends.append({key: value.clone() for key, value in system.state_dict().items() if key in NAMES})
    weights = load_run_weights(tmp_path)
    assert all(torch.equal(weights[name], ends[1][name]) for name in NAMES)
    assert not torch.equal(ends[0]["second.weight"], ends[1]["second.weight"])
    early = load_run_weights(tmp_path / "checkpoints/b_first/step_000004")
    assert all(torch.equal(early[name], ends[0][name]) for name in NAMES)
