"""The stages of restoring: the same result as a whole, operations by counter and formula, floors."""

from pathlib import Path

import pytest
import torch

from varestorer.conditioning.restorer import PUBLISHED_SIZES
from varestorer.evaluation.cost import add_published_restorer, cost_of, random_system
from varestorer.evaluation.speed.operations import swinir_flops, t5_flops
from varestorer.evaluation.speed.pictures import measure_picture
from varestorer.evaluation.speed.restoring import StageSpeed, measure_restoring
from varestorer.evaluation.speed.stages import least_bytes, restoring_stages, time_stages
from varestorer.evaluation.speed.subjects import Subject, subject
from varestorer.evaluation.speed.text import captioner_speed, text_encoder_speed
from varestorer.systems.acceleration import Acceleration
from varestorer.systems.varestorer import VARestorer
from varestorer.utils.errors import UsageError
from varestorer.utils.seeds import torch_generator
from varestorer.utils.timing import Clock, Timing

CPU = torch.device("cpu")


def tiny(system: VARestorer) -> VARestorer:
    return random_system(system.config, CPU, seed=1)


def images(system: VARestorer, batch: int) -> torch.Tensor:
    """Pictures of whole levels of 8 bits, which a PNG keeps."""
    levels = torch.randint(0, 256, (batch, 3, system.tile, system.tile), generator=torch_generator(0, "test"))
    return levels / 255


@pytest.mark.parametrize("keep_residual", [False, True])
def test_the_stages_one_after_another_restore(tiny_system: VARestorer, tmp_path: Path, keep_residual: bool) -> None:
    restorer = {"num_features": 16, "num_groups": 1, "num_blocks": 1} if keep_residual else None
    student = tiny_system.config["student"] | {"keep_residual": keep_residual}
    system = VARestorer(**tiny_system.config | {"student": student, "restorer": restorer}).eval()
    lq = images(system, 2)
    stages = restoring_stages(system, lq, system.null_text(2), tmp_path)
    value = None
    with torch.inference_mode():
        for stage in stages[:-2]:
            value = stage.work(value)
    assert stages[-2].name == "colour"
    assert torch.allclose(value, system.restore_batch(lq).images_B3HW, atol=1e-5)


def test_each_stage_has_its_time(tiny_system: VARestorer, tmp_path: Path) -> None:
    stages = restoring_stages(tiny_system, images(tiny_system, 1), tiny_system.null_text(1), tmp_path)
    found = time_stages(stages, Clock(CPU))
    assert list(found) == [stage.name for stage in stages]
    assert list(found)[0] == "decode PNG" and list(found)[-1] == "encode PNG"
    assert len(list(tmp_path.glob("*.out.png"))) == 1


@pytest.mark.parametrize("variant", ["eager", "merged", "bf16"])
def test_counter_and_formula_agree(tiny_system: VARestorer, variant: str) -> None:
    found = subject(tiny(tiny_system), Acceleration.parse(variant))
    assert found.formula == {name: flops for name, flops in found.counted.items() if flops}


def test_counter_and_formula_agree_on_the_published_restorer(tiny_system: VARestorer) -> None:
    system = tiny(tiny_system)
    add_published_restorer(system)
    assert cost_of(system)["restorer"].flops == swinir_flops(PUBLISHED_SIZES, 64)


def test_kept_text_saves_operations(tiny_system: VARestorer) -> None:
    merged = subject(tiny(tiny_system), Acceleration.parse("merged"))
    assert merged.keeps_text
    assert merged.counted["transformer"] < cost_of(tiny(tiny_system).merge_adapters())["transformer"].flops


def test_least_bytes_are_weights_and_what_goes_in_and_out(tiny_system: VARestorer, tmp_path: Path) -> None:
    system, lq = tiny_system, images(tiny_system, 3)
    found = least_bytes(restoring_stages(system, lq, system.null_text(3), tmp_path))
    image, codes = 3 * 3 * system.tile**2, 3 * 8 * 4 * 4  # batch 3; 8 bits at 4x4 positions
    weights = sum(parameter.numel() for parameter in system.tokenizer.decoder.parameters())
    assert found["VAE decoder"] == 4 * (weights + codes + image)
    assert found["colour"] == 4 * 2 * image
    latent_width = 3 * 8 * (1 + 4 + 16)
    assert found["sum codes"] == latent_width + 4 * codes


def test_floor_is_the_larger_of_two_times() -> None:
    stage = StageSpeed("x", Timing([1.0]), counted=0, formula=100, least_bytes=30)
    assert stage.floor(matrix=10, copy=30) == 10
    assert stage.floor(matrix=1000, copy=30) == 1
    assert StageSpeed("x", Timing([1.0]), 0, None, None).floor(1, 1) is None


def test_variants_are_measured_at_a_size_of_batch(tiny_system: VARestorer, tmp_path: Path) -> None:
    names = ("eager", "merged")
    subjects = {name: subject(tiny(tiny_system), Acceleration.parse(name)) for name in names}
    speeds = measure_restoring(subjects, 2, tmp_path, repeats=2, warmup=0)
    assert [speed.variant for speed in speeds] == list(names)
    assert all(len(speed.whole.seconds) == len(speed.stages[0].timing.seconds) == 2 for speed in speeds)
    transformer = next(stage for stage in speeds[0].stages if stage.name == "transformer")
    assert transformer.counted == 2 * subjects["eager"].counted["transformer"]


def test_a_variant_that_fails_is_left_out(
    tiny_system: VARestorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    works, breaks = (subject(tiny(tiny_system), Acceleration.parse("merged")) for _ in range(2))

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("too little memory\nmore of it")

    monkeypatch.setattr(breaks.system, "restore_batch", fail)
    speeds = measure_restoring({"broken": breaks, "whole": works}, 1, tmp_path, repeats=1, warmup=0)
    assert [speed.variant for speed in speeds] == ["whole"]
    assert "broken" in caplog.text and "too little memory more of it" in caplog.text
    assert measure_restoring({"broken": breaks}, 1, tmp_path, repeats=1, warmup=0) == []


def test_pictures_are_restored_by_tiles(tiny_system: VARestorer) -> None:
    found: Subject = subject(tiny(tiny_system), Acceleration.parse("merged"))
    timings = measure_picture({"merged": found}, side=tiny_system.tile + 5, repeats=2, warmup=0)
    assert len(timings["merged"].seconds) == 2


def test_text_encoder_is_counted_and_timed(tmp_path: Path) -> None:
    from text_models import save_t5
    from transformers import AutoConfig

    folder = save_t5(tmp_path / "t5")
    found = text_encoder_speed(str(folder), 5, CPU, repeats=1, warmup=0)
    assert found.counted == found.formula == t5_flops(AutoConfig.from_pretrained(folder), 5)
    with pytest.raises(UsageError, match="neither t5 nor the folder"):
        text_encoder_speed(str(tmp_path), 5, CPU, repeats=1, warmup=0)


def test_captioner_is_timed(tmp_path: Path) -> None:
    from text_models import save_blip

    found = captioner_speed(str(save_blip(tmp_path / "blip")), torch.rand(1, 3, 32, 32), CPU, repeats=2, warmup=0)
    assert len(found.timing.seconds) == 2 and found.counted > 0 and found.floor(1, 1) is None


def test_random_weights_follow_the_seed(tiny_system: VARestorer) -> None:
    one, same = tiny(tiny_system), tiny(tiny_system)
    other = random_system(tiny_system.config, CPU, seed=2)
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in one.state_dict().items())
    assert not torch.equal(one.transformer.head.weight, other.transformer.head.weight)
    assert all(tensor.isfinite().all() for tensor in one.state_dict().values())
