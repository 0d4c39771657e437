"""A training that is killed or told to stop goes on as if nothing had happened; only its model and data must stay.

Runs are processes of a fork server that has the heavy imports done, so that a start takes a second.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from command_process import run_command
from safetensors.torch import load_file

from varestorer.commands.train import COMMAND as TRAIN
from varestorer.utils.images import save_image
from varestorer.weights import runs
from varestorer.weights.runs import latest_checkpoint

pytestmark = pytest.mark.smoke
STAGES = ("tokenizer", "teacher", "student")
STEPS = 3
# quickstart_scratch at test size: three stages, accumulation, one data worker, averages, a checkpoint a step
WORDS = ["+experiment=quickstart_scratch", "model=tiny", "data.crop=32", "report=null", "device=cpu"]
WORDS += [f"trainer.max_steps={STEPS}", "trainer.batch_size=4", "trainer.accumulate=2", "trainer.num_workers=1"]
WORDS += ["trainer.checkpoint_every=1", "trainer.keep_best=loss"]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["varestorer.training.fit", "varestorer.systems.varestorer", "accelerate", "hydra", "peft"]
)


class Training:
    """A training command in a process."""

    def __init__(self, run: Path, *words: str) -> None:
        self.run = run
        self.output = run.with_name(f"{run.name}.txt")
        words = (*WORDS, f"run_dir={run}", "resume=auto", *words)
        self.process = FORKS.Process(target=run_command, args=(list(words), self.output))
        self.process.start()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process and its data workers, as a cluster would."""
        self.wait_for(lambda: os.getpgid(self.process.pid) == self.process.pid)
        os.killpg(self.process.pid, number)

    def has_ended(self) -> bool:
        return not self.process.is_alive()

    def status(self) -> int:
        """Exit status, or minus the signal that ended it."""
        self.process.join(300)
        assert not self.process.is_alive(), self.said()
        return self.process.exitcode

    def said(self) -> str:
        return self.output.read_text()

    def num_lines(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def wait_for(self, condition) -> bool:
        """Look all the time until a condition holds; False if the process ended before."""
        while not condition():
            if self.has_ended():
                return False
            time.sleep(0.0005)
        return True


def half_written(run: Path) -> list[Path]:
    return list(run.glob("checkpoints/*/.*.tmp"))


def kill_at_a_moment(training: Training, rng: random.Random) -> None:
    """Kill after a few steps more and a part of one; at times before there is any."""
    lines = training.num_lines() + rng.randint(0, 3)
    training.wait_for(lambda: training.num_lines() >= lines)
    time.sleep(rng.random() * 0.5)
    if not training.has_ended():
        training.send(signal.SIGKILL)


def kill_while_writing(training: Training, rng: random.Random) -> bool:
    """Kill while a checkpoint is half written; False if the run ended before."""
    writes = rng.randint(1, 3)
    while training.wait_for(lambda: half_written(training.run)):
        training.send(signal.SIGSTOP)  # so that it cannot finish the checkpoint between the look and the kill
        time.sleep(0.01)
        if half_written(training.run):
            writes -= 1
            if writes == 0:
                training.send(signal.SIGKILL)
                return True
        training.send(signal.SIGCONT)
        training.wait_for(lambda: not half_written(training.run))
    return False


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def largest_difference(run: Path, whole: Path) -> float:
    """Over all numbers of both runs' metrics; their lines and keys have to be the same."""
    ours, theirs = metrics(run), metrics(whole)
    assert [(*line, line["stage"], line["step"]) for line in ours] == [
        (*line, line["stage"], line["step"]) for line in theirs
    ]
    numbers = [
        (one[key], other[key])
        for one, other in zip(ours, theirs, strict=True)
        for key in one
        if isinstance(one[key], float)
    ]
    return max(abs(one - other) for one, other in numbers)


def assert_equal(run: Path, whole: Path) -> None:
    """The same metrics to the last digit, and the same checkpoints bit for bit."""
    assert metrics(run) == metrics(whole)
    for stage in STAGES:
        folders = [path.relative_to(whole) for path in (whole / "checkpoints" / stage).iterdir()]
        assert sorted(folders) == sorted(path.relative_to(run) for path in (run / "checkpoints" / stage).iterdir())
        for folder in folders:
            if folder.name == "best":
                assert (run / folder).read_text() == (whole / folder).read_text()
                continue
            for name in ("model", "ema", "optimizer", "rng"):
                one, other = (load_file(root / folder / f"{name}.safetensors") for root in (run, whole))
                assert one.keys() == other.keys()
                assert all(torch.equal(one[key], other[key]) for key in one), f"{folder}/{name}"
            assert runs.read_json(run / folder / "state.json") == runs.read_json(whole / folder / "state.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    training = Training(run)
    assert training.status() == 0, training.said()
    assert [(line["stage"], line["step"]) for line in metrics(run)] == [
        (stage, step) for stage in STAGES for step in range(1, STEPS + 1)
    ]
    return run


def test_a_run_killed_at_random_and_while_writing_equals_the_whole_one(whole: Path, tmp_path: Path) -> None:
    rng = random.Random(1)
    run = tmp_path / "run"
    training = Training(run)
    assert kill_while_writing(training, rng)
    assert training.status() == -signal.SIGKILL
    assert half_written(run)
    training = Training(run)
    kill_at_a_moment(training, rng)
    assert training.status() == -signal.SIGKILL
    training = Training(run)
    assert training.status() == 0, training.said()
    assert_equal(run, whole)
    assert not half_written(run)


@pytest.mark.slow
def test_twenty_kills_change_nothing(whole: Path, tmp_path: Path) -> None:
    rng = random.Random(2)
    kills = writing = number = 0
    largest = 0.0
    while kills < 20:
        number += 1
        run = tmp_path / f"run{number}"
        for _ in range(6):
            training = Training(run)
            if rng.random() < 0.5:
                writing += kill_while_writing(training, rng)
            else:
                kill_at_a_moment(training, rng)
            if training.status() == 0:
                break
            assert training.status() == -signal.SIGKILL, training.said()
            kills += 1
        else:
            training = Training(run)
            assert training.status() == 0, training.said()
        largest = max(largest, largest_difference(run, whole))
        assert_equal(run, whole)
    sys.stdout.write(f"\n{kills} kills in {number} runs, {writing} while writing; largest difference {largest}\n")
    assert writing >= 3


def test_a_signal_to_the_job_saves_a_checkpoint_and_gives_the_documented_status(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    training = Training(run, "trainer.checkpoint_every=1000")
    assert training.wait_for(lambda: training.num_lines() > STEPS)
    training.send(signal.SIGTERM)
    assert training.status() == 143, training.said()
    stopped = metrics(run)[-1]
    assert latest_checkpoint(run).parts[-2:] == (stopped["stage"], f"step_{stopped['step']:06d}")
    said = training.said()
    assert "SIGTERM: saving a checkpoint" in said and "resume=auto" in said and "Traceback" not in said
    assert len(metrics(run)) < len(metrics(whole))
    training = Training(run, "trainer.checkpoint_every=1000")
    assert training.status() == 0, training.said()
    assert metrics(run) == metrics(whole)


def test_a_resume_with_another_model_or_other_data_is_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {
        "model.transformer.depth": ("model.transformer.depth: 2 -> 3", "3"),
        "seed": ("seed: 0 -> 1", "1"),
        "trainer.batch_size": ("stages.teacher.trainer.batch_size: 4 -> 8", "8"),
        "data.use_flip": ("stages.student.data.use_flip: True -> False", "false"),
        "stages.student.task.weights.kl": ("stages.student.task.weights.kl: 0.05 -> 0.5", "0.5"),
    }
    before = (whole / "config.yaml").read_text()
    words = [f"{key}={value}" for key, (_, value) in changes.items()]
    assert TRAIN.main([*WORDS, f"run_dir={whole}", "resume=auto", *words, "trainer.max_steps=9"]) == 2
    refused = capsys.readouterr().err
    assert all(f"\n  {line}\n" in refused for line, _ in changes.values())
    assert "max_steps" not in refused and "Traceback" not in refused
    assert (whole / "config.yaml").read_text() == before


def test_other_photographs_are_refused_and_accepted_by_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        save_image(tmp_path / "in" / f"{number}.png", torch.rand(3, 40, 40 + number))
    run = tmp_path / "run"
    words = ["+experiment=smoke", "data=folder", f"data.root={tmp_path / 'in'}", "data.crop=32", f"run_dir={run}"]
    assert TRAIN.main([*words, "trainer.max_steps=1"]) == 0
    save_image(tmp_path / "in" / "a.png", torch.rand(3, 40, 40))
    more = [*words, "resume=auto", "trainer.max_steps=2"]
    assert TRAIN.main(more) == 1
    refused = capsys.readouterr().err
    assert "error: the data of stage student changed" in refused and "1 added (a.png)" in refused
    assert len(metrics(run)) == 1
    assert TRAIN.main([*more, "resume_other_data=true"]) == 0
    assert TRAIN.main([*more, "trainer.max_steps=3"]) == 0
    assert len(metrics(run)) == 3


def test_harmless_changes_are_allowed_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["+experiment=smoke", f"run_dir={tmp_path}"]
    assert TRAIN.main([*words, "trainer.max_steps=2"]) == 0
    others = ["trainer.max_steps=3", "trainer.checkpoint_every=1", "trainer.keep_last=1", "optimizer.lr=5e-4"]
    assert TRAIN.main([*words, *others, "resume=auto"]) == 0
    told = capsys.readouterr().err
    assert "changed since the run was started: stages.student.trainer.max_steps: 2 -> 3" in told
    assert "stages.student.optimizer.lr: 0.001 -> 0.0005" in told
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]
