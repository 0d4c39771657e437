"""The quickstarts train and report; what is theirs is restored with, started from, and resumed exactly."""

import json
from pathlib import Path

import pytest
import torch

from varestorer.commands.restore import COMMAND as RESTORE
from varestorer.commands.train import COMMAND as TRAIN
from varestorer.evaluation.comparison import UNDISTILLED
from varestorer.systems.varestorer import VARestorer
from varestorer.utils.images import load_image, save_image
from varestorer.weights.runs import load_ema

pytestmark = pytest.mark.smoke
# quickstart_scratch on networks of test size, two steps of every stage
TINY = ["+experiment=quickstart_scratch", "model=tiny", "data.crop=32", "trainer.max_steps=2", "trainer.num_workers=0"]
TINY += ["stages.tokenizer.trainer.batch_size=4", "trainer.batch_size=4", "+report.heldout.crop=64"]


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "tiny"
    assert TRAIN.main([*TINY, f"run_dir={run}"]) == 0
    return run


def test_from_scratch_trains_three_stages_and_writes_its_report(finished: Path) -> None:
    lines = lines_of(finished)
    assert [(line["stage"], line["step"]) for line in lines] == [
        (stage, step) for stage in ("tokenizer", "teacher", "student") for step in (1, 2)
    ]
    assert {"loss", "kl", "mse", "perceptual", "lr", "seconds"} <= lines[-1].keys()
    rows = json.loads((finished / "report.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [
        "bicubic",
        "multi-step",
        UNDISTILLED,
        "one step",
        "tokenizer ceiling",
    ]
    assert all(row["psnr"] > 0 and row["seconds"] > 0 for row in rows)
    assert "<img" in (finished / "report.html").read_text()
    assert (finished / "samples" / "student_000002.png").is_file()


def test_the_quickstart_betters_its_student_by_distilling_from_the_shipped_teacher(tmp_path: Path) -> None:
    run, shipped = tmp_path / "run", VARestorer.from_pretrained()
    words = ["trainer.max_steps=5", "trainer.warmup_steps=1", "trainer.batch_size=2", "trainer.num_workers=0"]
    words += ["+report.heldout.crop=192"]  # as large as MS-SSIM asks for
    assert TRAIN.main(["+experiment=quickstart", f"run_dir={run}", "report.metrics=[psnr,ms_ssim]", *words]) == 0
    system = VARestorer.from_pretrained(run)
    assert torch.equal(system.transformer.head.weight, shipped.transformer.head.weight)
    assert torch.equal(system.tokenizer.decoder.conv_in.weight, shipped.tokenizer.decoder.conv_in.weight)
    assert system.restorer is not None
    rows = {row["method"]: row for row in json.loads((run / "report.json").read_text())["rows"]}
    assert rows["one step"]["psnr"] > rows[UNDISTILLED]["psnr"]
    assert rows["one step"]["ms_ssim"] > rows[UNDISTILLED]["ms_ssim"]


def test_a_run_loads_with_its_averaged_weights(finished: Path) -> None:
    system = VARestorer.from_pretrained(finished)
    weights = load_ema(finished)
    state = system.state_dict()
    assert weights
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


def test_restore_takes_a_run(finished: Path, tmp_path: Path) -> None:
    save_image(tmp_path / "in" / "photo (1), a.png", torch.rand(3, 13, 21))
    words = [f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", f"ckpt={finished}", "select=sample"]
    assert RESTORE.main(words) == 0
    assert load_image(tmp_path / "out" / "photo (1), a.png").shape == (3, 52, 84)


def test_a_run_can_start_from_another_runs_parts(finished: Path, tmp_path: Path) -> None:
    words = ["+experiment=smoke", f"run_dir={tmp_path / 'run'}", "trainer.max_steps=1"]
    parts = [f"model.weights.{part}={finished}" for part in ("tokenizer", "transformer")]
    assert TRAIN.main([*words, *parts]) == 0
    ours, theirs = VARestorer.from_pretrained(tmp_path / "run"), VARestorer.from_pretrained(finished)
    assert torch.equal(ours.tokenizer.encoder.conv_in.weight, theirs.tokenizer.encoder.conv_in.weight)
    assert torch.equal(ours.transformer.head.weight, theirs.transformer.head.weight)


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    words = ["+experiment=smoke", "trainer.max_steps=4", "trainer.checkpoint_every=2", "trainer.schedule=constant"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert TRAIN.main([*words, f"run_dir={whole}"]) == 0
    assert TRAIN.main([*words, f"run_dir={parted}", "trainer.max_steps=2"]) == 0
    assert TRAIN.main([*words, f"run_dir={parted}", "resume=auto"]) == 0
    kept = [{k: v for k, v in line.items() if k != "seconds"} for line in lines_of(whole)]
    assert kept == [{k: v for k, v in line.items() if k != "seconds"} for line in lines_of(parted)]
    averages = load_ema(whole), load_ema(parted)
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])


def test_another_seed_gives_another_run(tmp_path: Path) -> None:
    losses = []
    for seed in (0, 0, 1):
        run = tmp_path / str(len(losses))
        assert TRAIN.main(["+experiment=smoke", "trainer.max_steps=1", f"seed={seed}", f"run_dir={run}"]) == 0
        losses.append(lines_of(run)[0]["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_the_varsr_quickstart_writes_its_report(tmp_path: Path) -> None:
    words = ["model=varsr_tiny", "trainer.max_steps=1", "trainer.num_workers=0", "data.crop=32", "trainer.batch_size=2"]
    words += ["stages.tokenizer.trainer.batch_size=2", "stages.isr.trainer.batch_size=2", "+report.heldout.crop=32"]
    words[0:1] = ["model=varsr_tiny", "model.schedule.sides=[1,2,4,8]"]
    assert TRAIN.main(["+experiment=varsr_quickstart", f"run_dir={tmp_path / 'run'}", *words]) == 0
    rows = json.loads((tmp_path / "run" / "report.json").read_text())["rows"]
    ways = ["bicubic", "negative-prompted", "unguided", "guided", "refined", "tokenizer ceiling"]
    assert [row["method"] for row in rows] == ways
    again = ["resume=auto", "report.ways=curve"]
    assert TRAIN.main(["+experiment=varsr_quickstart", f"run_dir={tmp_path / 'run'}", *words, *again]) == 0
    rows = json.loads((tmp_path / "run" / "report.json").read_text())["rows"]
    assert [row["method"] for row in rows[:2]] == ["guidance 0, no refiner", "guidance 3, no refiner"]
    assert rows[-1]["method"] == "50 refiner steps" and all(row["seconds"] > 0 for row in rows)
