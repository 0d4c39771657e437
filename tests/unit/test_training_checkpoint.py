"""Checkpoints on the disk: damage, pruning, another base, the weights of a whole run."""

import errno
import json
import logging
from pathlib import Path

import pytest
import torch
from test_training_fit import ADAMW, config, metrics, train
from toy_training import ToyPairs, ToySystem, ToyTask

from varestorer.training.checkpoint import save_initial
from varestorer.training.fit import fit, make_accelerator
from varestorer.training.run import Run
from varestorer.utils.errors import UserError
from varestorer.weights import storage
from varestorer.weights.runs import latest_checkpoint, load_ema, load_initial, load_run_weights


def stage_folder(run: Path) -> Path:
    return run / "checkpoints" / "toy"


def test_layout_and_pruning(tmp_path: Path):
    train(tmp_path, config(checkpoint_every=2, keep_last=2))
    assert sorted(path.name for path in stage_folder(tmp_path).iterdir()) == ["step_000006", "step_000008"]
    assert (tmp_path / "checkpoints/latest").read_text() == "toy/step_000008\n"
    last = latest_checkpoint(tmp_path)
    assert last == stage_folder(tmp_path) / "step_000008"
    assert latest_checkpoint(tmp_path / "checkpoints" / "latest") == last
    assert latest_checkpoint(last) == last
    assert {path.name for path in last.iterdir()} == {
        *(f"{name}.safetensors" for name in ("model", "ema", "optimizer", "rng")),
        "state.json",
        "checksums.json",
    }
    state = json.loads((last / "state.json").read_text())
    assert (state["stage"], state["step"], state["samples"]) == ("toy", 8, 32)
    optimizer = storage.read_tensors(last / "optimizer.safetensors")
    assert {"exp_avg/second.weight", "exp_avg_sq/second.bias", "step/second.bias"} <= optimizer.keys()


@pytest.mark.parametrize("how", ["cut", "flip", "delete", "checksums", "state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path: Path, how: str, caplog):
    whole = tmp_path / "whole"
    train(whole, config())
    run = tmp_path / "run"
    train(run, config())
    folder = stage_folder(run) / "step_000008"
    victim = folder / {"checksums": "checksums.json", "state": "state.json"}.get(how, "model.safetensors")
    content = bytearray(victim.read_bytes())
    if how == "delete":
        victim.unlink()
    elif how == "flip":
        content[-1] ^= 1
        victim.write_bytes(content)
    else:
        victim.write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(run).name == "step_000006"
    assert str(folder) in caplog.text and victim.name in caplog.text
    train(run, config())
    assert metrics(run) == metrics(whole)
    assert storage.damage(folder) is None


def test_nothing_whole_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="no checkpoint"):
        latest_checkpoint(tmp_path)
    train(tmp_path, config(max_steps=2))
    only = latest_checkpoint(tmp_path)
    (only / "ema.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="damaged checkpoint.*ema.safetensors has 0 bytes"):
        load_ema(only)


def test_full_disk_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch):
    whole = storage.write_tensors

    def full(path: Path, tensors: dict) -> None:
        if path.name == "optimizer.safetensors" and "step_000006" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(path, tensors)

    monkeypatch.setattr(storage, "write_tensors", full)
    with pytest.raises(UserError, match="cannot write .*step_000006.*No space left"):
        train(tmp_path, config())
    assert [path.name for path in stage_folder(tmp_path).iterdir()] == ["step_000003"]
    assert latest_checkpoint(tmp_path).name == "step_000003"


def test_another_frozen_base_is_refused(tmp_path: Path):
    train(tmp_path, config(max_steps=3))
    torch.manual_seed(6)  # other weights than `train` starts from
    task = ToyTask(ToySystem())
    task.name = "toy"
    with pytest.raises(UserError, match="other frozen weights"):
        fit(task, ToyPairs(), config(), ADAMW, Run(tmp_path, make_accelerator("cpu")))


def test_weights_of_a_run_are_its_start_and_each_stage_s_averages(tmp_path: Path):
    torch.manual_seed(0)
    system = ToySystem()
    save_initial(tmp_path, system.state_dict())
    run = Run(tmp_path, make_accelerator("cpu"))
    for part in ("second", "first"):
        task = ToyTask(system, part=part)
        task.name = part
        fit(task, ToyPairs(), config(), ADAMW, run)
    weights = load_run_weights(tmp_path)
    assert weights.keys() == system.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in system.state_dict().items())
    early = load_run_weights(latest_checkpoint(tmp_path, "second"))
    assert torch.equal(early["first.weight"], load_initial(tmp_path)["first.weight"])
    assert torch.equal(early["second.weight"], weights["second.weight"])


def test_tied_tensors_are_written_and_hashes_depend_on_values(tmp_path: Path):
    tensor = torch.arange(6.0)
    storage.write_tensors(tmp_path / "x.safetensors", {"a": tensor, "b": tensor, "c": tensor[2:].view(2, 2)})
    back = storage.read_tensors(tmp_path / "x.safetensors")
    assert torch.equal(back["b"], tensor) and torch.equal(back["c"], tensor[2:].view(2, 2))
    one = storage.tensors_sha256({"a": tensor, "s": torch.tensor(1, dtype=torch.bfloat16)})
    assert one == storage.tensors_sha256({"s": torch.tensor(1, dtype=torch.bfloat16), "a": tensor.clone()})
    assert one != storage.tensors_sha256({"a": tensor.view(2, 3), "s": torch.tensor(1, dtype=torch.bfloat16)})
