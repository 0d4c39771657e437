"""The VARSR system and its task, with random weights."""

from dataclasses import replace

import pytest
import torch
from tiny_sizes import VARSR_SIZES

from varestorer.data import BicubicDegradation, quality_crops
from varestorer.systems.acceleration import Acceleration
from varestorer.systems.base import Request
from varestorer.systems.varsr import VARSR, SamplingConfig
from varestorer.training.config import TrainerConfig
from varestorer.training.tasks.varsr import VARSRTask
from varestorer.utils.errors import UsageError, UserError


@pytest.fixture
def system() -> VARSR:
    made = VARSR(**VARSR_SIZES).eval()
    with torch.no_grad():
        made.transformer.head.weight.mul_(50)
        assert made.refiner is not None
        made.refiner.head.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return made


def restored(system: VARSR, **options: object) -> torch.Tensor:
    image = torch.rand(3, 9, 13, generator=torch.Generator().manual_seed(1))
    return system.restore(image, 2, **options).image


def test_noise_is_keyed_by_seed_and_tile_whatever_the_batch(system: VARSR) -> None:
    torch.testing.assert_close(restored(system, batch=1), restored(system, batch=8), atol=1e-4, rtol=0)
    assert not torch.equal(restored(system, seed=0), restored(system, seed=1))
    system.sampling = replace(system.sampling, use_refiner=False)
    assert torch.equal(restored(system, seed=0), restored(system, seed=1))  # the codes are greedy
    assert not torch.equal(restored(system, seed=0, select="sample"), restored(system, seed=1, select="sample"))


def test_guidance_of_zero_asks_the_network_once(system: VARSR) -> None:
    assert len(system.prepare(torch.zeros(1, dtype=torch.int64)).cond_BC) == 2
    system.sampling = replace(system.sampling, guidance=0.0)
    assert len(system.prepare(torch.zeros(1, dtype=torch.int64)).cond_BC) == 1
    assert restored(system).isfinite().all()


@pytest.mark.parametrize(("growth", "wanted"), [("linear", [0, 3, 6]), ("ahead", [3, 6, 9]), ("square", [0, 1.5, 6])])
def test_guidance_grows_over_the_scales(growth: str, wanted: list[float]) -> None:
    assert SamplingConfig(guidance=6.0, growth=growth).strengths(3) == wanted


@pytest.mark.parametrize(
    ("options", "message"), [({"prompt": "a dog"}, "without words"), ({"steps": 2}, "leave steps= out")]
)
def test_what_it_has_not_is_refused(system: VARSR, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        restored(system, **options)


def test_a_nan_in_the_refiner_is_an_error(system: VARSR) -> None:
    assert system.refiner is not None
    with torch.no_grad():
        system.refiner.head.bias[0] = torch.nan
    with pytest.raises(UserError, match=r"refiner step 1 of 3 .*NaN"):
        restored(system)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": {**VARSR_SIZES["tokenizer"], "vocabulary": 0}}, "model.tokenizer.vocabulary"),
        ({"prefix": {"channels": [4, 6]}}, "as many entries as"),
        ({"sampling": {"refiner_steps": 0}}, "refiner_steps must be 1 to 1000"),
        (
            {"schedule": {"sides": [1, 2, 4]}, "transformer": {**VARSR_SIZES["transformer"], "num_levels": 2}},
            "num_levels",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        VARSR(**(VARSR_SIZES | change))


def test_compat_official_names_the_size_it_needs(system: VARSR) -> None:
    with pytest.raises(UsageError, match="works at 512 pixels, and this model at 16"):
        system.restore_official(torch.zeros(3, 8, 8))


@pytest.mark.parametrize(("tiled", "size"), [(False, (512, 512)), (True, (36, 20))])
def test_compat_official_is_the_released_loop(tiled: bool, size: tuple) -> None:
    sides = {"schedule": {"sides": [1, 32]}, "tokenizer": VARSR_SIZES["tokenizer"] | {"multipliers": [1, 1, 1, 1, 1]}}
    system = VARSR(**{**VARSR_SIZES, **sides, "prefix": {"channels": [4, 4, 4, 4, 4]}}).eval()
    image = torch.rand(3, 9, 5)
    restored = system.restore_official(image, 4, tiled=tiled, seed=1)
    assert restored.shape == (3, *size) and torch.equal((restored * 255).round() / 255, restored)
    assert torch.equal(restored, system.restore_official(image, 4, tiled=tiled, seed=1))
    with pytest.raises(UserError, match="no words, and a whole scale"):
        system.restore_official(image, 2.5)


def test_prepared_qualities_serve_every_image(system: VARSR) -> None:
    before = restored(system)
    system.accelerate(Acceleration(precision="fp32"))
    assert system.accept(Request(), uncertainty=False).context is system.qualities
    torch.testing.assert_close(restored(system), before)


def batch_of(labels: list[int]) -> dict:
    data = quality_crops(None, None, 16, BicubicDegradation(), seed=0, share=0.5)
    samples = [data[n] for n in range(len(labels))]
    images = {name: torch.stack([sample[name] for sample in samples]) for name in ("hq", "lq")}
    return {**images, "label": torch.tensor(labels), "key": torch.arange(len(labels)), "name": ["a"] * len(labels)}


def test_the_task_learns_both_losses_and_scores_free_running(system: VARSR) -> None:
    task = VARSRTask(system, seed=1)
    losses = task(batch_of([0, 1]), 1)
    torch.testing.assert_close(losses["loss"], losses["cross_entropy"] + 2 * losses["diffusion"])
    assert {"accuracy", "accuracy_last", "cross_entropy_last"} <= losses.keys()
    task.eval()
    with torch.no_grad():
        batch = batch_of([0, 1])
        restored = task.restored(batch)["restored"]
        assert restored.shape == batch["hq"].shape and not torch.equal(restored, batch["hq"])
        batch["hq"] = torch.zeros_like(batch["hq"])  # is never shown to it
        assert torch.equal(task.restored(batch)["restored"], restored)
    with pytest.raises(UserError, match="labels of the data must be from 0 to 1"):
        task(batch_of([0, 2]), 1)
    with pytest.raises(UserError, match="class_drop is for models of classes"):
        VARSRTask(system, class_drop=0.1)


def test_bad_pictures_are_their_own_targets() -> None:
    data = quality_crops(None, None, 16, BicubicDegradation(), seed=0, share=0.5)
    labels = [data[n]["label"] for n in range(40)]
    assert 0 < sum(labels) < 40
    bad = data[labels.index(1)]
    good = bad["hq"] - bad["hq"].mean()
    assert good.isfinite().all()
    assert not torch.equal(bad["hq"], bad["lq"])


def test_hold_linear() -> None:
    config = TrainerConfig(max_steps=111, warmup_steps=10, schedule="hold_linear", final_lr_ratio=0.01)
    factors = [config.learning_rate_factor(step) for step in range(1, 112)]
    assert factors[0] == pytest.approx(0.005)
    assert factors[10:41] == pytest.approx([1.0] * 31)
    assert factors[41] < 1.0
    assert factors[-1] == pytest.approx(0.01)
