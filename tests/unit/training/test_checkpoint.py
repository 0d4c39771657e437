"""Checkpoints on the disk: damage, pruning, another base, the weights of a whole run."""

import errno
import json
import logging
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from toy_training import ADAMW, KilledError, ToyPairs, ToySystem, ToyTask, config, metrics, train

from varestorer.training import checkpoint
from varestorer.training.checkpoint import Checkpointer, save_initial
from varestorer.training.fit import fit, make_accelerator
from varestorer.training.run import Run
from varestorer.utils.errors import UsageError, UserError
from varestorer.weights import runs
from varestorer.weights.runs import (
    is_run,
    latest_checkpoint,
    load_ema,
    load_initial,
    load_run_weights,
    newest_checkpoint,
    step_of,
)


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
    optimizer = runs.read_tensors(last / "optimizer.safetensors")
    assert {"exp_avg/second.weight", "exp_avg_sq/second.bias", "step/second.bias"} <= optimizer.keys()


@pytest.mark.parametrize("how", ["cut", "flip", "delete", "checksums", "no checksums", "state", "all"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path: Path, how: str, caplog):
    whole = tmp_path / "whole"
    train(whole, config())
    run = tmp_path / "run"
    train(run, config())
    folder = stage_folder(run) / "step_000008"
    names = {"checksums": "checksums.json", "no checksums": "checksums.json", "state": "state.json"}
    victim = folder / names.get(how, "model.safetensors")
    content = bytearray(victim.read_bytes())
    if how == "all":
        for path in folder.iterdir():
            path.write_bytes(b"")
    elif how == "no checksums":
        victim.write_text("{}")
    elif how == "delete":
        victim.unlink()
    elif how == "flip":
        content[-1] ^= 1
        victim.write_bytes(content)
    else:
        victim.write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(run).name == "step_000006"
    assert str(folder) in caplog.text and (victim.name in caplog.text or how == "all")
    train(run, config())
    assert metrics(run) == metrics(whole)
    assert runs.damage(folder) is None


@pytest.mark.parametrize("content", [b"", b"toy/step_000099\n", b"\xff\xfe", b"../../other\n"])
def test_a_latest_that_names_nothing_is_told_and_the_newest_taken(tmp_path: Path, content: bytes, caplog):
    train(tmp_path, config())
    (stage_folder(tmp_path) / "step_000008 (copy)").mkdir()
    (tmp_path / "checkpoints/latest").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path).name == "step_000008"
    assert "latest names no checkpoint" in caplog.text


def test_going_on_before_a_damaged_checkpoint_never_drops_good_ones_for_it(tmp_path: Path):
    train(tmp_path, config(checkpoint_every=2, keep_last=2))
    (stage_folder(tmp_path) / "step_000008/model.safetensors").write_bytes(b"")
    with pytest.raises(KilledError):
        train(tmp_path, config(checkpoint_every=1, keep_last=1), fail_at=8)
    assert [path.name for path in stage_folder(tmp_path).iterdir()] == ["step_000007"]
    assert latest_checkpoint(tmp_path).name == "step_000007"


def two_stages(folder: Path, fail_at: int = 0) -> None:
    torch.manual_seed(5)
    system = ToySystem()
    run = Run(folder, make_accelerator("cpu"), seed=1)
    run.stages = ["second", "first"]
    for part in run.stages:
        task = ToyTask(system, part=part, fail_at=fail_at if part == "first" else 0)
        task.name = part
        fit(task, ToyPairs(), config(checkpoint_every=2), ADAMW, run)


def test_damage_in_a_finished_stage_loses_nothing_of_the_next(tmp_path: Path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    two_stages(whole)
    with pytest.raises(KilledError):
        two_stages(cut, fail_at=6)
    (cut / "checkpoints/second/step_000008/ema.safetensors").unlink()
    two_stages(cut, fail_at=4)  # the next stage goes on after this step
    assert metrics(cut) == metrics(whole)


@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
def test_the_best_checkpoint_is_kept_beside_the_last_and_named(tmp_path: Path, mode: str, sign: int):
    train(tmp_path, config(checkpoint_every=2, keep_last=9, max_steps=12))
    losses = [line["loss"] for line in metrics(tmp_path)]
    means = {step: (losses[step - 2] + losses[step - 1]) / 2 for step in range(2, 14, 2)}
    wanted = min(means, key=lambda step: sign * means[step])
    cfg = config(checkpoint_every=2, keep_last=1, max_steps=12, keep_best="loss", keep_best_mode=mode)
    run = tmp_path / "run"
    with pytest.raises(KilledError):
        train(run, cfg, fail_at=9)
    train(run, cfg)
    best = json.loads((stage_folder(run) / "best").read_text())
    assert best == {
        "checkpoint": f"step_{wanted:06d}",
        "metric": "loss",
        "mode": mode,
        "value": pytest.approx(means[wanted]),
    }
    kept = {path.name for path in stage_folder(run).glob("step_*")}
    assert kept == {best["checkpoint"], "step_000012"}
    assert is_run(stage_folder(run) / "best") and is_run(run / "checkpoints/latest")
    assert latest_checkpoint(stage_folder(run) / "best").name == best["checkpoint"]


def test_a_kill_between_saving_and_naming_the_last_checkpoint_is_made_good(tmp_path: Path, monkeypatch):
    cfg = config(checkpoint_every=2, keep_last=1, keep_best="loss", keep_best_mode="max")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole, cfg)
    settle = Checkpointer._settle

    def killed(self, folder: Path, score) -> None:
        if folder.name == "step_000008":
            raise KilledError
        settle(self, folder, score)

    monkeypatch.setattr(Checkpointer, "_settle", killed)
    with pytest.raises(KilledError):
        train(cut, cfg)
    monkeypatch.undo()
    train(cut, cfg)
    names = [sorted(path.relative_to(run) for path in run.rglob("*")) for run in (whole, cut)]
    assert names[0] == names[1]
    for name in ("latest", "toy/best"):
        assert (cut / "checkpoints" / name).read_text() == (whole / "checkpoints" / name).read_text()


def test_the_best_of_a_metric_nobody_has_is_refused_at_the_first_step(tmp_path: Path):
    with pytest.raises(UsageError, match="no trainer.keep_best=psnr; it has loss, mse, l1, grad_norm, and val/loss"):
        train(tmp_path, config(keep_best="psnr"))
    with pytest.raises(UsageError, match="no trainer.keep_best=val/mse"):
        train(tmp_path / "other", config(keep_best="val/mse"))


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, of a few bytes."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no small disk: {error}")
    if done.returncode:
        pytest.skip(f"no small disk: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_leaves_the_last_good_checkpoint(tmp_path: Path):
    whole = tmp_path / "whole"
    cfg = config(checkpoint_every=1, keep_last=99)
    train(whole, cfg)
    with small_disk(tmp_path / "disk", "200k") as disk:
        run = disk / "run"
        with pytest.raises(UserError, match=r"cannot write .*No space left on device.*free space, .*resume=auto"):
            train(run, cfg)
        last = latest_checkpoint(run)
        assert 1 <= step_of(last) < 8 and runs.damage(last) is None
        assert not list(run.glob("checkpoints/toy/.*"))
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        train(run, cfg)
        assert metrics(run) == metrics(whole)


def test_checksums_are_there_at_the_moment_of_the_rename(tmp_path: Path, monkeypatch):
    rename, seen = Path.rename, []

    def look_first(path: Path, target: Path) -> Path:
        seen.append(target.name)
        assert not target.exists() and runs.damage(path) is None
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", look_first)
    train(tmp_path, config(max_steps=2))
    assert "step_000002" in seen


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path):
    train(tmp_path, config(max_steps=3))
    before = sorted(tmp_path.rglob("*"))
    half = stage_folder(tmp_path) / ".step_000006.tmp"
    half.mkdir()
    (half / "model.safetensors").touch()
    for name in (".metrics.1.tmp.jsonl", "checkpoints/.latest.1.tmp", "checkpoints/toy/.best.1.tmp"):
        (tmp_path / name).touch()
    train(tmp_path, config(max_steps=3))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_stops_the_metrics_with_one_clear_error(tmp_path: Path):
    run = Run(tmp_path, make_accelerator("cpu"))
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write .*metrics.jsonl: .*No space left.*resume=auto"):
        run.log("toy", 1, {"loss": 1.0}, lr=0.1, grad_norm=1.0)


def test_nothing_whole_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="no checkpoint"):
        latest_checkpoint(tmp_path)
    train(tmp_path, config(max_steps=2))
    only = latest_checkpoint(tmp_path)
    (only / "ema.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="damaged checkpoint.*ema.safetensors has 0 bytes"):
        load_ema(only)


def test_full_disk_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch):
    whole = runs.write_tensors

    def full(path: Path, tensors: dict) -> None:
        if path.name == "optimizer.safetensors" and "step_000006" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
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
    early = load_run_weights(newest_checkpoint(tmp_path, "second"))
    assert torch.equal(early["first.weight"], load_initial(tmp_path)["first.weight"])
    assert torch.equal(early["second.weight"], weights["second.weight"])


def test_tied_tensors_are_written_and_hashes_depend_on_values(tmp_path: Path):
    tensor = torch.arange(6.0)
    runs.write_tensors(tmp_path / "x.safetensors", {"a": tensor, "b": tensor, "c": tensor[2:].view(2, 2)})
    back = runs.read_tensors(tmp_path / "x.safetensors")
    assert torch.equal(back["b"], tensor) and torch.equal(back["c"], tensor[2:].view(2, 2))
    one = runs.tensors_sha256({"a": tensor, "s": torch.tensor(1, dtype=torch.bfloat16)})
    assert one == runs.tensors_sha256({"s": torch.tensor(1, dtype=torch.bfloat16), "a": tensor.clone()})
    assert one != runs.tensors_sha256({"a": tensor.view(2, 3), "s": torch.tensor(1, dtype=torch.bfloat16)})
