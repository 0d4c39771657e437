"""H-VAR from the command line: its experiments train at test size, are restored from and reported."""

import json
from pathlib import Path

import pytest
import torch

from varestorer.commands.restore import COMMAND as RESTORE
from varestorer.commands.train import COMMAND as TRAIN
from varestorer.systems.hvar import HVAR
from varestorer.utils.images import load_image, save_image
from varestorer.weights.runs import load_run_weights

pytestmark = pytest.mark.smoke
SMALL = ["model=hvar_tiny", "logger=none", "data.crop=32", "trainer.max_steps=2", "trainer.num_workers=0"]
SMALL += ["trainer.batch_size=2", "trainer.accumulate=1", "trainer.checkpoint_every=1", "trainer.sample_every=2"]
NO_FILES = ["model.weights.tokenizer=null", "model.weights.transformer=null"]


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "hvar"
    words = ["stages.tokenizer.trainer.batch_size=2", "report.metrics=[psnr]", "+report.heldout.crop=64"]
    assert TRAIN.main(["+experiment=hvar_quickstart", *SMALL, *words, f"run_dir={run}"]) == 0
    return run


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    for number in range(3):
        save_image(root / f"{number}.png", torch.rand(3, 40, 40))
    return root


@pytest.mark.parametrize("experiment", ["hvar", "hvar_no_dpo", "hvar_no_hit", "hvar_tokenizer"])
def test_experiments_of_paper_scale_train_at_test_size(experiment: str, photographs: Path, tmp_path: Path) -> None:
    stage = "tokenizer" if experiment == "hvar_tokenizer" else "transformer"
    perceptual = ["stages.tokenizer.task.perceptual=ms_ssim"] if stage == "tokenizer" else []
    words = [f"+experiment={experiment}", *SMALL, *NO_FILES, *perceptual, f"data.root={photographs}"]
    assert TRAIN.main([*words, f"run_dir={tmp_path / 'run'}"]) == 0
    last = lines_of(tmp_path / "run")[-1]
    assert last["stage"] == stage and last["loss"] > 0
    assert ("preference" in last) == (experiment in ("hvar", "hvar_no_hit"))
    assert ("usage_0" in last) == (stage == "tokenizer")
    system = HVAR.from_pretrained(tmp_path / "run")
    assert system.tokenizer.config.reuse == ("none" if experiment == "hvar_no_hit" else "tokens")
    assert system.restore(torch.rand(3, 9, 7), 2, sizes=[0.5, 2]).smaller[0.5].shape == (3, 4, 4)


def test_the_quickstart_reports_three_sizes_beside_the_plain_tokenizers(quickstart: Path) -> None:
    rows = json.loads((quickstart / "report.json").read_text())["rows"]
    assert {row["pixels"] for row in rows} == {8, 16, 32}
    assert {"H-VAR", "bicubic", "tokenizer"} <= {row["method"] for row in rows}
    assert all(row["psnr"] > 0 for row in rows)
    assert "<img" in (quickstart / "report.html").read_text()


def test_restore_writes_each_size_that_is_asked_for(quickstart: Path, tmp_path: Path) -> None:
    save_image(tmp_path / "in" / "a.png", torch.rand(3, 13, 21))
    save_image(tmp_path / "in" / "a.x1.png", torch.rand(3, 5, 5))
    words = [f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", f"ckpt={quickstart}"]
    assert RESTORE.main([*words, "sizes=[1,2,4]"]) == 0
    entry = json.loads((tmp_path / "out" / "restore.json").read_text())["a.png"]
    files = {"x1": (13, 21), "x2": (26, 42)}
    for label, size in files.items():
        assert load_image(tmp_path / "out" / entry["smaller"][label]).shape == (3, *size)
    assert load_image(tmp_path / "out" / entry["output"]).shape == (3, 52, 84)
    assert len({p.name for p in (tmp_path / "out").glob("*.png")}) == 6
    (tmp_path / "out" / entry["smaller"]["x1"]).unlink()
    assert RESTORE.main([*words, "sizes=[1,2,4]"]) == 0
    assert (tmp_path / "out" / entry["smaller"]["x1"]).is_file()


def test_sizes_that_cannot_be_are_a_wrong_command(quickstart: Path, tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", torch.rand(3, 5, 5))
    words = [f"input={tmp_path / 'a.png'}", f"output={tmp_path / 'out'}"]
    assert RESTORE.main([*words, f"ckpt={quickstart}", "sizes=[3]"]) == 2
    assert RESTORE.main([*words, "sizes=[1,4]"]) == 2  # the shipped model has one size
    assert RESTORE.main([*words, "sizes=[]"]) == 2


def test_a_part_of_another_reading_is_named(quickstart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [f"model.weights.tokenizer={quickstart}", "model.tokenizer.reuse=sum"]
    words = ["+experiment=hvar_no_dpo", *SMALL, *NO_FILES, "data.root=null", *parts]
    assert TRAIN.main([*words, f"run_dir={quickstart.parent / 'other'}"]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "model.tokenizer.reuse=tokens" in message and "new_reading" in message


def test_a_run_starts_from_another_runs_tokenizer(quickstart: Path, photographs: Path, tmp_path: Path) -> None:
    words = ["+experiment=hvar", *SMALL, *NO_FILES, f"model.weights.tokenizer={quickstart}"]
    assert TRAIN.main([*words, f"data.root={photographs}", f"run_dir={tmp_path / 'run'}"]) == 0
    theirs = load_run_weights(quickstart)["tokenizer.quantizer.codebook.entries"]
    assert torch.equal(HVAR.from_pretrained(tmp_path / "run").tokenizer.quantizer.codebook.entries, theirs)
