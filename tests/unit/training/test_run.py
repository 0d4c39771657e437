"""A run's folder and its loggers."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from offline_wandb import history, wandb_records

from varestorer.training.fit import make_accelerator
from varestorer.training.run import Run, choose_run_dir, environment, kept_lines
from varestorer.utils.errors import UsageError
from varestorer.utils.loggers import (
    Logger,
    Loggers,
    WandbLogger,
    open_loggers,
    open_tensorboard,
    open_trackio,
    open_wandb,
)


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
    assert len(kept_lines(path, "a", 1)) == 3
    assert len(kept_lines(path, "b", 5)) == 4
    run = Run(tmp_path, make_accelerator("cpu"))
    run.stages = ["a", "b"]
    run.rewind("a", 1)
    run.log("a", 2, {"loss": 1.0}, lr=0.1, grad_norm=1.0)
    run.rewind("b", 1)  # the lines of the stage before come first again
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in kept] == [("a", 1), ("a", 2), ("b", 1)]


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
        assert open_loggers({"wandb": open_wandb}, tmp_path, {}).loggers == []  # type: ignore[attr-defined]
    assert "wandb could not start" in caplog.text


def test_wandb_offline_has_config_curves_speed_pictures_and_checkpoints(tmp_path: Path, offline: None, capfd):
    config = {"seed": 1, "environment": {"git": "0123abc"}}
    run = Run(tmp_path, make_accelerator("cpu"), logger=open_wandb(tmp_path, config, artifacts=True))
    assert capfd.readouterr().err == ""
    for step in (1, 2):
        losses = {"loss": 1.0 / step, "cross_entropy_0": 0.5}
        run.log("teacher", step, losses, lr=0.1, grad_norm=2.0, speed={"images_per_second": 30.0, "memory_gb": 1.5})
    run.save_samples("teacher", 2, {"LQ": torch.rand(1, 3, 4, 4)})
    folder = tmp_path / "checkpoints/teacher/step_000002"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    run.log_checkpoint("teacher", 2, folder)
    run.logger.finish()
    records = wandb_records(tmp_path)
    (started,) = [record.run for record in records if record.HasField("run")]
    values = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert values["seed"] == 1 and values["environment"]["git"] == "0123abc"
    assert started.run_id == (tmp_path / "wandb/run_id").read_text().strip()
    rows = history(records)
    assert [row["teacher/loss"] for row in rows if "teacher/loss" in row] == [1.0, 0.5]
    assert {"teacher/cross_entropy_0", "teacher/grad_norm", "teacher/images_per_second", "teacher/memory_gb"} <= set(
        rows[0]
    )
    (picture,) = [row["teacher/samples/path"] for row in rows if "teacher/samples/path" in row]
    assert next(tmp_path.glob(f"wandb/offline-run-*/files/{picture}")).is_file()
    (artifact,) = artifacts(records)
    assert artifact.name == f"{started.run_id}-teacher" and "step_000002" in artifact.aliases
    assert [entry.path for entry in artifact.manifest.contents] == ["state.json"]


def artifacts(records: list) -> list:
    """Of either form: versions of wandb differ in it."""
    asked = [record.request.log_artifact for record in records if record.HasField("request")]
    plain = [record.artifact for record in records if record.HasField("artifact")]
    return [*plain, *(request.artifact for request in asked if request.HasField("artifact"))]


def test_wandb_goes_on_with_the_id_of_the_folder_and_sends_no_checkpoints_unasked(tmp_path: Path, offline: None):
    ids = []
    for _ in range(2):
        logger = open_wandb(tmp_path, {})
        logger.log_checkpoint("student", 1, tmp_path)
        logger.finish()
        records = wandb_records(tmp_path)
        ids += [record.run.run_id for record in records if record.HasField("run")]
        assert not artifacts(records)
    assert ids[0] == ids[1]


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_a_logger_that_is_not_installed_is_one_line_with_the_remedy(tmp_path: Path, monkeypatch, caplog, name: str):
    module = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio"}[name]
    monkeypatch.setitem(sys.modules, module, None)
    factory = {"tensorboard": open_tensorboard, "trackio": open_trackio}[name]
    with caplog.at_level(logging.WARNING):
        opened = open_loggers({name: factory}, tmp_path, {})
    opened.log_metrics("student", 1, {"loss": 1.0})
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"pip install {name}" in line and "\n" not in line


def log_all(run_dir: Path, opened: Logger) -> None:
    run = Run(run_dir, make_accelerator("cpu"), logger=opened)
    run.log("student", 1, {"loss": 0.5, "val/musiq": 61.0}, lr=0.1, grad_norm=2.0)
    run.save_samples("student", 1, {"LQ": torch.rand(1, 3, 4, 4)})
    opened.log_metrics("eval/realsr", None, {"musiq": 62.0, "clipiqa": 0.5})
    picture = next((run_dir / "samples").iterdir())
    opened.log_table("eval/realsr", ["image", "HQ", "musiq"], [["a", picture, 62.0], ["b", None, None]])
    opened.finish()


def test_several_loggers_get_the_same_figures_under_the_same_names(tmp_path: Path, offline: None):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    opened = open_loggers({"wandb": open_wandb, "tensorboard": open_tensorboard}, tmp_path, {"seed": 1})
    assert isinstance(opened, Loggers)
    log_all(tmp_path, opened)
    wanted = {"student/val/musiq": 61.0, "eval/realsr/musiq": 62.0, "eval/realsr/clipiqa": 0.5}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    in_wandb = {key: value for row in history(wandb_records(tmp_path)) for key, value in row.items()}
    for key, value in wanted.items():
        assert [event.value for event in events.Scalars(key)] == [value]
        assert in_wandb[key] == value
    assert {"student/samples", "eval/realsr/images/HQ"} == {*events.Tags()["images"]}


def test_trackio_keeps_figures_and_pictures(tmp_path: Path, monkeypatch):
    """In a process of its own: Trackio reads its folder when it is imported."""
    pytest.importorskip("trackio")
    code = f"""
from pathlib import Path
from test_training_run import log_all, open_loggers, open_trackio
from trackio.sqlite_storage import SQLiteStorage
folder = Path({str(tmp_path)!r}) / "exp" / "run"
log_all(folder, open_loggers({{"trackio": open_trackio}}, folder, {{"seed": 1}}))
logs = SQLiteStorage.get_logs("varestorer", "exp/run")
for key, value in {{"student/val/musiq": 61.0, "eval/realsr/musiq": 62.0, "eval/realsr/clipiqa": 0.5}}.items():
    assert [line[key] for line in logs if key in line] == [value], key
"""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, sys.path)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "trackio").rglob("*.png"))
