"""The training loop: resume, averages, accumulation, errors, files."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from toy_training import KilledError, ToyPairs, ToySystem, ToyTask

from varestorer.data.loader import collate
from varestorer.training.config import Precision, TrainerConfig
from varestorer.training.ema import Ema
from varestorer.training.fit import fit, make_accelerator
from varestorer.training.optimisers import build_optimizer
from varestorer.training.run import Run
from varestorer.utils.errors import UserError
from varestorer.weights.runs import load_ema

ADAMW = partial(torch.optim.AdamW, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)


def config(**changes) -> TrainerConfig:
    values = {"max_steps": 8, "batch_size": 4, "num_workers": 0, "checkpoint_every": 3, "sample_every": 0}
    return TrainerConfig(**{**values, "warmup_steps": 2, "ema_decay": 0.9, **changes})


def train(folder: Path, cfg: TrainerConfig, preview: bool = False, **task_options) -> ToySystem:
    """One stage of a run in `folder`, from the same start every time."""
    torch.manual_seed(5)
    system = ToySystem()
    task = ToyTask(system, **task_options)
    task.name = "toy"
    batch = collate([ToyPairs(9)[n] for n in range(2)]) if preview else None
    fit(task, ToyPairs(), cfg, ADAMW, Run(folder, make_accelerator("cpu"), seed=1), preview=batch)
    return system


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_metrics_have_the_agreed_form(tmp_path: Path):
    train(tmp_path, config())
    raw = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in raw] == list(range(1, 9))
    assert list(raw[0]) == ["stage", "step", "loss", "mse", "l1", "lr", "seconds"]
    assert raw[0]["lr"] == pytest.approx(0.01) and raw[1]["lr"] == pytest.approx(0.02)
    assert raw[0]["loss"] == pytest.approx(raw[0]["mse"] + 0.1 * raw[0]["l1"], rel=1e-6)
    assert all(a["seconds"] <= b["seconds"] for a, b in zip(raw, raw[1:], strict=False))


@pytest.mark.parametrize("fail_at", [1, 3, 5, 8])
def test_resume_equals_the_uninterrupted_run(tmp_path: Path, fail_at: int):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    system = train(whole, config(sample_every=2), preview=True)
    with pytest.raises(KilledError):
        train(cut, config(), fail_at=fail_at)
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "toy", "step"')  # half a line, as a kill can leave it
    resumed = train(cut, config())
    assert metrics(cut) == metrics(whole)
    for name in ("model", "ema", "optimizer", "rng"):
        path = f"checkpoints/toy/step_000008/{name}.safetensors"
        one, other = load_file(whole / path), load_file(cut / path)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    assert all(torch.equal(a, b) for a, b in zip(system.parameters(), resumed.parameters(), strict=True))


def test_accumulation_does_not_change_the_result(tmp_path: Path):
    train(tmp_path / "a", config(), dropout=0)  # which draws other numbers for other shapes
    train(tmp_path / "b", config(accumulate=2), dropout=0)
    for one, other in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["l1"] == pytest.approx(other["l1"], rel=1e-5)


def test_workers_do_not_change_the_result(tmp_path: Path):
    train(tmp_path / "none", config())
    train(tmp_path / "two", config(num_workers=2))
    assert metrics(tmp_path / "none") == metrics(tmp_path / "two")


def test_the_stage_leaves_its_averages_in_the_system(tmp_path: Path):
    system = train(tmp_path, config())
    ema = load_ema(tmp_path)
    assert ema.keys() == {"second.weight", "second.bias"}
    assert torch.equal(system.second.weight, ema["second.weight"])
    last = load_file(tmp_path / "checkpoints/toy/step_000008/model.safetensors")
    assert not torch.equal(last["second.weight"], ema["second.weight"])


def test_a_finished_stage_is_not_trained_again(tmp_path: Path):
    first = train(tmp_path, config())
    before = metrics(tmp_path)
    again = train(tmp_path, config(), fail_at=1)
    assert metrics(tmp_path) == before
    assert torch.equal(first.second.weight, again.second.weight)


def test_bfloat16_changes_the_computation_but_not_the_weights_format(tmp_path: Path):
    train(tmp_path / "fp32", config())
    system = train(tmp_path / "bf16", config(precision=Precision.bf16))
    assert system.second.weight.dtype == torch.float32
    one, other = metrics(tmp_path / "fp32")[0]["loss"], metrics(tmp_path / "bf16")[0]["loss"]
    assert one != other and one == pytest.approx(other, rel=0.02)


def test_more_steps_go_on_from_the_end(tmp_path: Path):
    train(tmp_path, config())
    train(tmp_path, config(max_steps=10))
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 11))


def test_non_finite_loss_stops_before_the_step(tmp_path: Path):
    with pytest.raises(UserError, match=r"step 2 of stage toy: loss part l1 is not finite .*picture_4.png"):
        train(tmp_path, config(checkpoint_every=1), nan_at=2)
    state = json.loads((tmp_path / "checkpoints/toy/step_000001/state.json").read_text())
    assert state["step"] == 1 and not (tmp_path / "checkpoints/toy/step_000002").exists()
    assert len(metrics(tmp_path)) == 1


def test_non_finite_gradient_names_the_parameter(tmp_path: Path):
    class Root(ToyTask):
        def forward(self, batch, step):
            zero = (self.system.second.bias * 0).sum()
            return {"loss": super().forward(batch, step)["loss"].detach() + zero.sqrt()}

    system = ToySystem()
    before = system.second.bias.clone()
    with pytest.raises(UserError, match=r"gradient of second.bias is not finite.*picture_0.png"):
        fit(Root(system), ToyPairs(), config(), ADAMW, Run(tmp_path, make_accelerator("cpu")))
    assert torch.equal(system.second.bias, before)


def test_samples_show_a_row_per_picture_and_a_column_per_entry(tmp_path: Path):
    train(tmp_path, config(sample_every=4), preview=True)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["toy_000004.png", "toy_000008.png"]
    picture = Image.open(tmp_path / "samples/toy_000008.png")
    assert picture.size == (3 * 4 + 4 * 2, 2 * 4 + 3 * 2)  # 4 pixels each, 2 between


def test_average_follows_its_formula():
    weight = torch.nn.Parameter(torch.zeros(1))
    ema = Ema({"w": weight}, decay=0.3)
    for step in (1, 2, 3):
        weight.data.fill_(float(step))
        ema.update(step)
    first = (1 - 2 / 11) * 1.0
    second = 3 / 12 * first + (1 - 3 / 12) * 2.0
    assert ema.averages["w"].item() == pytest.approx(0.3 * second + 0.7 * 3.0)
    with ema.in_place():
        assert weight.item() == pytest.approx(ema.averages["w"].item())
    assert weight.item() == 3.0


def test_decay_leaves_biases_alone_and_nothing_to_train_is_an_error():
    task = ToyTask(ToySystem())
    decayed, others = build_optimizer(task, ADAMW).param_groups
    assert [p.ndim for p in decayed["params"]] == [4] and decayed["weight_decay"] == 0.1
    assert [p.ndim for p in others["params"]] == [1] and others["weight_decay"] == 0.0
    task.requires_grad_(False)
    with pytest.raises(UserError, match="no parameter trains"):
        build_optimizer(task, ADAMW)
