"""The real command in one process and in two gives the same run."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from safetensors.torch import load_file

from varestorer.commands.train import COMMAND as TRAIN

pytestmark = pytest.mark.smoke
ROOT = Path(__file__).parents[2]
SMOKE = ["+experiment=smoke", "device=cpu", "trainer.max_steps=3", "trainer.checkpoint_every=2"]
TORCHRUN = ["torch.distributed.run", "--nproc-per-node=2", "--master-port={port}"]
ACCELERATE = ["accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
ACCELERATE += ["--dynamo_backend=no", "--main_process_port={port}", "--num_cpu_threads_per_process=1"]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def launch(launcher: list[str], words: list[str]) -> None:
    port = free_port()
    command = [sys.executable, "-m", *(word.format(port=port) for word in launcher), str(ROOT / "scripts" / "train.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def files_of(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    assert TRAIN.main([*SMOKE, f"run_dir={run}"]) == 0
    return run


def assert_equal(run: Path, alone: Path) -> None:
    ours, theirs = lines_of(alone), lines_of(run)
    assert [line["step"] for line in theirs] == [1, 2, 3]
    for key in ("loss", "kl", "mse", "perceptual", "grad_norm", "lr"):
        assert [line[key] for line in theirs] == pytest.approx([line[key] for line in ours], abs=1e-5)
    assert files_of(run) == files_of(alone)
    # moments of gradients that were not averaged over the processes would differ by their own size
    place = Path("checkpoints", "student", "step_000003", "optimizer.safetensors")
    want, have = load_file(alone / place), load_file(run / place)
    assert all((have[name] - want[name]).abs().max() <= 1e-3 * want[name].abs().max() for name in want)


def test_two_processes_equal_one(alone: Path, tmp_path: Path) -> None:
    launch(TORCHRUN, [*SMOKE, f"run_dir={tmp_path / 'run'}", "trainer.accumulate=2"])
    assert_equal(tmp_path / "run", alone)


def test_the_environment_of_accelerates_launcher_changes_nothing(alone: Path, tmp_path: Path, monkeypatch) -> None:
    """On a CPU it starts one process, however many are asked for, with its settings in the environment."""
    words = [word.format(port=free_port()) for word in ACCELERATE[1:]]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args([*words, "train.py"]))
    _, environment = prepare_simple_launcher_cmd_env(args)
    ours = {name: value for name, value in environment.items() if os.environ.get(name) != value}
    assert ours["ACCELERATE_USE_CPU"] == "True"
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    assert TRAIN.main([*SMOKE, f"run_dir={tmp_path / 'run'}", "trainer.accumulate=2"]) == 0
    assert_equal(tmp_path / "run", alone)


@pytest.mark.slow
def test_a_sharded_run_equals_one_process_and_can_go_on_without_shards(tmp_path: Path) -> None:
    words = [*SMOKE, "trainer.schedule=constant", "model.student.lora_rank=0"]
    words += ["+stages.student.task.trained=all", "+stages.student.task.teacher=start"]
    alone, sharded = tmp_path / "alone", tmp_path / "sharded"
    assert TRAIN.main([*words, f"run_dir={alone}", "trainer.max_steps=4"]) == 0
    launch(TORCHRUN, [*words, f"run_dir={sharded}", "trainer.sharding=fsdp2"])
    assert TRAIN.main([*words, f"run_dir={sharded}", "trainer.max_steps=4", "resume=auto"]) == 0
    ours, theirs = lines_of(alone), lines_of(sharded)
    assert [line["step"] for line in theirs] == [1, 2, 3, 4]
    assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in ours], abs=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_accelerate_launches_a_sharded_run_on_two_gpus(tmp_path: Path) -> None:
    words = [*SMOKE[:1], *SMOKE[2:], "device=cuda", "model.student.lora_rank=0", f"run_dir={tmp_path / 'run'}"]
    words += ["+stages.student.task.trained=all", "+stages.student.task.teacher=start", "trainer.sharding=fsdp2"]
    launch([word for word in ACCELERATE if word != "--cpu"], words)
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [1, 2, 3]


def test_the_launchers_own_sharding_is_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert TRAIN.main([*SMOKE, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "trainer.sharding=fsdp2" in capsys.readouterr().err
