"""What a resumed run may change of its config."""

import logging
from pathlib import Path

import pytest
import yaml

from varestorer.training.checks import check_resumable, differences
from varestorer.utils.errors import UsageError, UserError

STAGE = {
    "task": {"_target_": "A", "weights": {"kl": 0.1}, "checkpoint_activations": False},
    "trainer": {"max_steps": 10, "batch_size": 4, "num_workers": 2},
    "optimizer": {"_target_": "AdamW", "lr": 1e-6},
    "data": {"root": "photos", "crop": 32, "degradation": None},
}
CONFIG = {
    "seed": 0,
    "run_dir": "a",
    "resume": "none",
    "device": "auto",
    "model": {"depth": 2, "sides": [1, 2]},
    "data": {"crop": 16},
    "stages": {"student": STAGE},
    "report": None,
    "environment": {"git": "abc"},
}


def changed(key: str, value: object) -> dict:
    """The config with one key changed."""
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    *path, last = key.split(".")
    node = config
    for name in path:
        node = node[name]
    node[last] = value
    return config


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("seed", 1, "seed: 0 -> 1"),
        ("model.depth", 3, "model.depth: 2 -> 3"),
        ("model.sides", [1, 2, 4], r"model.sides: \[1, 2\] -> \[1, 2, 4\]"),
        ("model.width", 8, r"model.width: \(nothing\) -> 8"),
        ("stages.student.task.weights.kl", 0.2, "stages.student.task.weights.kl: 0.1 -> 0.2"),
        ("stages.student.data.root", "others", "stages.student.data.root: photos -> others"),
        ("stages.student.data.degradation", {"scale": 4}, r"stages.student.data.degradation.scale: \(nothing\) -> 4"),
        ("stages.student.trainer.batch_size", 8, "stages.student.trainer.batch_size: 4 -> 8"),
        ("stages.student.optimizer._target_", "SGD", "stages.student.optimizer._target_: AdamW -> SGD"),
        ("stages.teacher", STAGE, r"stages.teacher.task._target_: \(nothing\) -> A"),
        ("stages", {"teacher": STAGE, "student": STAGE}, "order of stages: student -> teacher, student"),
    ],
)
def test_model_stages_and_data_must_stay(saved: Path, key: str, value: object, line: str):
    with pytest.raises(UsageError, match=rf"(?s)started with another config.*\n  {line}\n"):
        check_resumable(saved, changed(key, value))


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("stages.student.trainer.max_steps", 20, "stages.student.trainer.max_steps: 10 -> 20"),
        ("stages.student.trainer.num_workers", 0, "num_workers: 2 -> 0"),
        ("stages.student.trainer.keep_best", "loss", "keep_best: (nothing) -> loss"),
        ("stages.student.optimizer.lr", 2e-6, "lr: 1e-06 -> 2e-06"),
        ("stages.student.task.checkpoint_activations", True, "checkpoint_activations: False -> True"),
        ("device", "cpu", "device: auto -> cpu"),
        ("report", {"title": "x"}, "report.title: (nothing) -> x"),
        ("environment.git", "def", "environment.git: abc -> def"),
    ],
)
def test_anything_else_may_change_and_is_told(saved: Path, key: str, value: object, line: str, caplog):
    with caplog.at_level(logging.INFO):
        check_resumable(saved, changed(key, value))
    assert line in " ".join(caplog.text.split())


def test_what_a_run_is_called_with_and_what_stages_hold_already_do_not_count():
    assert differences(CONFIG, changed("resume", "auto")) == {}
    assert differences(CONFIG, changed("run_dir", "b")) == {}
    assert differences(CONFIG, changed("data.crop", 64)) == {}


def test_nothing_to_compare_is_fine_and_a_broken_config_is_an_error(tmp_path: Path):
    check_resumable(tmp_path / "config.yaml", CONFIG)
    for content in ("", "a: [", "just words"):
        (tmp_path / "config.yaml").write_text(content)
        with pytest.raises(UserError, match="cannot read .*config.yaml .*remove it to go on without comparing"):
            check_resumable(tmp_path / "config.yaml", CONFIG)
