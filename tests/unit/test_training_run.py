"""A run's folder and its loggers."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
import yaml

from varestorer.training.fit import make_accelerator
from varestorer.training.loggers import NullLogger, WandbLogger, open_wandb
from varestorer.training.run import Run, choose_run_dir, environment, kept_lines
from varestorer.utils.errors import UsageError


def make_run(folder: Path, finished: bool = False) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    if finished:
        (folder / "checkpoints" / "finished").touch()
    return folder


def test_run_dir_is_new_unless_asked_to_resume(tmp_path: Path):
    first, second = (choose_run_dir("exp", None, False, tmp_path) for _ in range(2))
    assert first != second and first.parent == tmp_path / "exp" and first.is_dir()
    assert choose_run_dir("exp", tmp_path / "here", False) == tmp_path / "here"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    assert choose_run_dir("exp", tmp_path / "notes", False) == tmp_path / "notes"  # no run in it
    used = make_run(tmp_path / "used")
    with pytest.raises(UsageError, match="resume=auto.*another run_dir"):
        choose_run_dir("exp", used, False)
    assert choose_run_dir("exp", used, True) == used


def test_resume_takes_the_newest_unfinished_run_of_the_experiment(tmp_path: Path):
    make_run(tmp_path / "exp" / "2026-01-01_00-00-00")
    newest = make_run(tmp_path / "exp" / "2026-01-02_00-00-00")
    make_run(tmp_path / "exp" / "2026-01-03_00-00-00", finished=True)
    make_run(tmp_path / "other" / "2026-01-04_00-00-00")
    assert choose_run_dir("exp", None, True, tmp_path) == newest
    assert choose_run_dir("new", None, True, tmp_path).parent == tmp_path / "new"


def test_rewind_keeps_what_came_before(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    steps = [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    path.write_text("".join(json.dumps({"stage": s, "step": n, "seconds": 1.0}) + "\n" for s, n in steps))
    assert len(kept_lines(path, "b", 1)) == 3
    assert len(kept_lines(path, "a", 1)) == 1  # what followed was built on dropped steps
    assert len(kept_lines(path, "b", 5)) == 4
    assert kept_lines(tmp_path / "none", "a", 1) == []


def test_seconds_go_on_after_a_resume_and_nan_is_null(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "a", "step": 1, "seconds": 500.0}\n')
    run = Run(tmp_path, make_accelerator("cpu"))
    run.rewind("a", 1)
    run.log("a", 2, {"loss": 1.5, "psnr": float("inf")}, lr=0.1, grad_norm=1.0)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["seconds"] >= 500.0 and line["psnr"] is None and line["loss"] == 1.5


def test_config_and_environment(tmp_path: Path):
    run = Run(tmp_path, make_accelerator("cpu"))
    run.write_config({"prompt": "naïve", "environment": environment()})
    config = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert config["prompt"] == "naïve"
    assert config["environment"]["packages"]["torch"] == torch.__version__.split("+")[0]


class FakeWandbRun:
    """Keeps what a real one would send."""

    def __init__(self) -> None:
        self.logged: list[dict] = []
        self.axes: list[tuple[str, str]] = []

    def log(self, values: dict) -> None:
        self.logged.append(values)

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes.append((name, step_metric))


def test_wandb_keys_have_the_stage_in_front():
    fake = FakeWandbRun()
    logger = WandbLogger(fake)
    logger.log_metrics("student", 3, {"loss": 1.0, "kl": 0.5})
    logger.log_metrics("student", 4, {"loss": 1.0})
    assert fake.logged[0] == {"student/loss": 1.0, "student/kl": 0.5, "student/step": 3}
    assert fake.axes == [("student/*", "student/step")]


@pytest.mark.parametrize("reason", ["not installed", "broken"])
def test_a_run_goes_on_without_wandb(tmp_path: Path, monkeypatch, caplog, reason: str):
    if reason == "not installed":
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        import wandb

        def refuse(**options):
            raise OSError("no service")

        monkeypatch.setattr(wandb, "init", refuse)
    with caplog.at_level(logging.WARNING):
        assert isinstance(open_wandb(tmp_path, {}), NullLogger)
    assert "wandb could not start" in caplog.text and "metrics.jsonl" in caplog.text


def test_wandb_is_offline_and_quiet_without_a_key(tmp_path: Path, monkeypatch, capfd):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    run = Run(tmp_path, make_accelerator("cpu"), logger=open_wandb(tmp_path, {"seed": 1}))
    run.log("student", 1, {"loss": 1.0}, lr=0.1, grad_norm=2.0)
    run.save_samples("student", 1, {"LQ": torch.rand(1, 3, 4, 4)})
    run.logger.finish()
    (record,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = record.read_bytes()
    assert b"student/loss" in content and b"student/grad_norm" in content and b"samples" in content
    assert capfd.readouterr().err == ""
    kept = (tmp_path / "wandb" / "run_id").read_text()
    open_wandb(tmp_path, {}).finish()
    assert (tmp_path / "wandb" / "run_id").read_text() == kept
