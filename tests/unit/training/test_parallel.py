"""Many processes, sharded weights, micro-batches and activations computed again: none of them changes the training."""

import subprocess
import sys
from pathlib import Path

import pytest
import sharded_worker
import torch
from torch import Tensor

from varestorer.systems.varestorer import VARestorer
from varestorer.training.parallel import shard
from varestorer.training.task import Task
from varestorer.training.tasks.distillation import DistillationTask
from varestorer.training.tasks.teacher import TeacherTask
from varestorer.utils.errors import UsageError

SPAWN = (
    "import sys; sys.path[:0] = sys.argv[2:]; import torch.multiprocessing as mp; from sharded_worker import work; "
    "mp.start_processes(work, (2, sys.argv[1]), nprocs=2, start_method='fork')"
)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What two processes with `fully_shard` over gloo found; a process of its own may fork."""
    folder = tmp_path_factory.mktemp("sharded")
    here = Path(__file__)
    words = [str(folder), str(here.parents[2]), str(here.parents[3])]
    done = subprocess.run(
        [sys.executable, "-c", SPAWN, *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict = torch.load(folder / "found.pt")
    return found


@pytest.fixture(scope="module")
def alone() -> dict:
    return sharded_worker.run(sharded_worker.Training())


def test_sharded_steps_equal_those_of_one_process(sharded: dict, alone: dict) -> None:
    for ours, theirs in zip(alone["steps"], sharded["steps"], strict=True):
        assert theirs == pytest.approx(ours, abs=1e-5)
    assert alone["steps"][0]["loss"] != alone["steps"][1]["loss"]


def test_what_a_sharded_task_saves_is_whole(sharded: dict, alone: dict) -> None:
    for name, tensors in alone["last"].items():
        assert tensors.keys() == sharded["last"][name].keys()
        for key, tensor in tensors.items():
            assert sharded["last"][name][key].shape == tensor.shape
            assert (sharded["last"][name][key] - tensor).abs().max() <= 1e-5, key


def test_a_sharded_task_goes_on_exactly_from_what_it_saved(sharded: dict) -> None:
    assert sharded["repeated"] == sharded["steps"][2]
    for name, tensors in sharded["last"].items():
        assert all(torch.equal(sharded["again"][name][key], tensor) for key, tensor in tensors.items())


def test_a_sharded_task_draws_the_same_pictures(sharded: dict, alone: dict) -> None:
    assert torch.allclose(sharded["picture"], alone["picture"], atol=1e-4)


def test_one_process_has_nothing_to_shard(tiny_system: VARestorer) -> None:
    with pytest.raises(UsageError, match="num_processes"):
        shard(DistillationTask(tiny_system, perceptual="ms_ssim"), torch.device("cpu"))


def gradients(task: Task, keys: list[int], micro_batch: int) -> dict[str, Tensor]:
    """Gradients of the mean loss of some samples, taken so many at a time."""
    parts = [keys[start : start + micro_batch] for start in range(0, len(keys), micro_batch)]
    for part in parts:
        (task(batch_of_tiny(part), 1)["loss"] / len(parts)).backward()
    parameters = task.trainable_parameters()
    found = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    task.zero_grad()
    return found


def batch_of_tiny(keys: list[int]) -> dict:
    batch = sharded_worker.batch_of(keys)
    return batch | {part: torch.cat([batch[part]] * 2, dim=2).repeat(1, 1, 1, 2) for part in ("hq", "lq")}


@pytest.mark.parametrize("stage", [DistillationTask, TeacherTask])
def test_accumulation_and_checkpointing_change_no_gradient(tiny_system: VARestorer, stage: type[Task]) -> None:
    options = {"perceptual": "ms_ssim"} if stage is DistillationTask else {}
    keys = [0, 1, 2, 3]
    want = gradients(stage(tiny_system, **options).train(), keys, 4)
    assert max(tensor.abs().max() for tensor in want.values()) > 1e-4
    for is_checkpointed, micro_batch in ((False, 1), (True, 4), (True, 2)):
        task = stage(tiny_system, **options, checkpoint_activations=is_checkpointed).train()
        have = gradients(task, keys, micro_batch)
        assert have.keys() == want.keys()
        assert all((have[name] - tensor).abs().max() <= 1e-6 for name, tensor in want.items())
