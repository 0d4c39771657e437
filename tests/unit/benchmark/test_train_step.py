"""How training steps are measured: variants in turns, their parts, and model operations counted once."""

import math
from functools import partial

import pytest
import torch

from varestorer.benchmark.measure import REST, measure
from varestorer.benchmark.train_step import TrainStep, loader_report, pairs_per_second
from varestorer.systems.varestorer import VARestorer
from varestorer.training.tasks.distillation import DistillationTask
from varestorer.training.tasks.teacher import TeacherTask
from varestorer.utils.errors import UsageError

CPU = torch.device("cpu")
ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


@pytest.fixture
def step(tiny_system: VARestorer) -> TrainStep:
    task = DistillationTask(tiny_system, {"mse": 1.0, "perceptual": 0.0}, condition_drop=0.0)
    return TrainStep(task, ADAMW, 2, tiny_system.tile)


def test_the_parts_make_up_the_step(step: TrainStep) -> None:
    works = {name: step.work(frozenset(name.split("+"))) for name in ("eager", "bf16", "checkpoint+slices")}
    for measured in measure(works, 2, 1, CPU).values():
        assert {"tokens", "teacher forward", "student forward", "backward", "optimizer", REST} <= measured.parts.keys()
        for turn in range(2):
            assert math.isclose(
                sum(part.seconds[turn] for part in measured.parts.values()), measured.whole.seconds[turn]
            )


def test_model_operations_count_nothing_twice(step: TrainStep) -> None:
    def flops(*words: str) -> dict[str, int]:
        return {part: cost.flops for part, cost in step.counts(frozenset(words)).items()}

    plain = flops("eager")
    assert flops("checkpoint", "slices") == plain
    assert plain["image losses"] > 0 and plain["student forward"] > 0
    assert plain["backward"] > 0 and plain[REST] == 0


def test_checkpointing_is_switched_for_its_variant_alone(step: TrainStep) -> None:
    for words in (frozenset(["checkpoint"]), frozenset(["eager"])):
        with step.prepared(words):
            assert step.task.system.transformer.checkpoint_activations is ("checkpoint" in words)  # type: ignore[union-attr]


def test_a_base_in_bfloat16_is_for_bfloat16_variants(tiny_system: VARestorer) -> None:
    step = TrainStep(TeacherTask(tiny_system), ADAMW, 1, tiny_system.tile)
    with pytest.raises(UsageError, match="are of distillation; TeacherTask has none"):
        step.work(frozenset(["slices"]))()
    task = DistillationTask(tiny_system, perceptual="ms_ssim", condition_drop=0.0)
    step = TrainStep(task, ADAMW, 1, tiny_system.tile, bf16_base=True)
    for name, dtype in (("bf16", torch.bfloat16), ("eager", torch.float32)):
        step.work(frozenset([name]))()
        assert tiny_system.transformer.blocks[0].ffn.fc1.weight.dtype == dtype


def test_cores_follow_from_the_step_time() -> None:
    assert pairs_per_second(crop=32, num_pairs=2) > 0
    text = loader_report(10.0, crop=512, pairs=32, seconds=0.5)
    assert "pairs of 512 x 512, a second and core: 10.0" in text
    assert "64.0 pairs a second): 7 cores" in text
