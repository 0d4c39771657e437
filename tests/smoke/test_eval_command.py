"""`eval` as a whole: files, texts, exit statuses."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate

from varestorer.commands.entry import compose
from varestorer.commands.eval import COMMAND
from varestorer.commands.tables import COMMAND as TABLES
from varestorer.data.testsets.checking import joint_hash, pixel_hash
from varestorer.data.testsets.known import BENCHMARKS
from varestorer.evaluation.evaluator import Evaluator
from varestorer.evaluation.protocols import load_protocol
from varestorer.evaluation.sources import BicubicSource
from varestorer.systems.varestorer import StudentConfig, VARestorer
from varestorer.utils.images import load_image, resize, save_image, to_uint8
from varestorer.weights import DEFAULT

pytestmark = pytest.mark.smoke


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of three pairs, 12 x 16 -> 48 x 64."""
    for i in range(3):
        hq = resize(torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(i)), (48, 64))
        save_image(tmp_path / "pairs" / "hr" / f"{i}.png", hq)
        save_image(tmp_path / "pairs" / "lr" / f"{i}.png", resize(hq, (12, 16)))
    return tmp_path / "pairs"


def run(root: Path, *words: str, dataset: str = "folder") -> int:
    given = {word.partition("=")[0] for word in words}
    places = [f"data.root={root}", f"out={root.parent / 'out'}"]
    base = [f"dataset={dataset}", "device=cpu", "offline=true", *places]
    return COMMAND.main([*(word for word in base if word.partition("=")[0] not in given), *words])


def test_bicubic(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, "method=bicubic", "metrics=[psnr,ssim]") == 0
    out = root.parent / "out"
    text = capsys.readouterr().out
    assert "folder, protocol varestorer: 3 images scored" in text and f"to {out}" in text
    summary = json.loads((out / "summary.json").read_text())
    assert summary["n"] == 3 and set(summary["metrics"]) == {"psnr", "ssim"} and not summary["unavailable"]
    with (out / "per_image.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["0", "1", "2"]
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert sorted(path.name for path in (out / "images").iterdir()) == ["0.png", "1.png", "2.png"]
    assert "bicubic" in (out / "table.md").read_text()


def test_a_smaller_size_is_scored_against_reduced_references(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        save_image(root.parent / "half" / f"{i}.png", resize(load_image(root / "hr" / f"{i}.png"), (24, 32), "area"))
    assert run(root, f"predictions={root.parent / 'half'}", "size=2", "metrics=[psnr]") == 0
    summary = json.loads((root.parent / "out" / "summary.json").read_text())
    assert summary["dataset"] == "folder_x2" and summary["metrics"]["psnr"]["mean"] > 70  # the same but for rounding
    assert run(root, f"predictions={root.parent / 'half'}", "metrics=[psnr]", f"out={root.parent / 'b'}") == 1
    for words, message in [(["size=5"], "at most scale=4"), (["size=2", "method=bicubic"], "size= goes with ckpt=")]:
        assert run(root, *words) == 2
        assert message in capsys.readouterr().err


def test_one_pass_of_hvar_is_scored_at_each_size(
    root: Path, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    instantiate(request.getfixturevalue("compose")("train", "system=hvar", "model=hvar_tiny").model).save_pretrained(
        tmp_path / "hvar"
    )
    for size in (1, 4):
        words = [f"ckpt={tmp_path / 'hvar'}", f"size={size}", "metrics=[psnr]", f"out={tmp_path / str(size)}"]
        assert run(root, *words) == 0
    names = [json.loads((tmp_path / s / "summary.json").read_text())["dataset"] for s in ("1", "4")]
    assert names == ["folder_x1", "folder"]
    assert load_image(tmp_path / "1" / "images" / "0.png").shape == (3, 12, 16)
    assert run(root, f"ckpt={tmp_path / 'hvar'}", "size=3", "metrics=[psnr]") == 2
    assert "sizes must be of 1, 2, 4" in capsys.readouterr().err


def test_a_known_set_under_another_name_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hashes = {str(i): pixel_hash(to_uint8(load_image(root / "lr" / f"{i}.png"))) for i in range(3)}
    realsr = replace(BENCHMARKS["realsr"], pairs=3, pixels={"lr": joint_hash(hashes), "hr": ""})
    monkeypatch.setitem(BENCHMARKS, "realsr", realsr)
    assert run(root, "method=bicubic", "metrics=[psnr]", dataset="drealsr") == 2
    assert "holds the pixels of realsr, not of drealsr" in capsys.readouterr().err
    assert run(root, "method=bicubic", "metrics=[psnr]", dataset="realsr") == 0
    assert run(root, "method=bicubic", "metrics=[psnr]", f"out={root.parent / 'own'}") == 0  # as a folder of one's own


def test_methods_are_compared_on_one_page(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = root.parent / "out"
    words = ["metrics=[psnr]", f"compare=[plain=bicubic,hq={root / 'hr'}]", "pairwise=true"]
    assert run(root, *words) == 0
    text = capsys.readouterr().out
    assert "plain on folder, protocol varestorer: 3 images scored" in text and "pairwise.json to" in text
    table = (out / "table.md").read_text()
    assert "| ▸ hq |" in table and "| plain - hq | psnr ↑ | -" in table
    titles = re.findall("<figcaption>(.*?)</figcaption>", (out / "gallery.html").read_text())
    assert titles == ["LQ", "plain", "hq", "HQ"] * 3
    assert json.loads((out / "hq" / "summary.json").read_text())["method"] == "hq"
    study = json.loads((out / "pairwise.json").read_text())
    answers = [{"trial": i, "chosen": 1, "left": i % 2} for i in range(3)]
    (out / "answers.json").write_text(json.dumps({"study": study["study"], "answers": answers}))
    tables = ["table=preference", f"runs=[{out}]", f"answers=[{out / 'answers.json'}]", f"out={root.parent / 'tables'}"]
    assert TABLES.main(tables) == 0
    assert "| plain - hq | 0 | 0 | 3 | 0.000 | 0.000 to 0.000 |" in capsys.readouterr().out
    # evaluations are taken up again: by the folder of one, too
    assert run(root, *words) == 0
    again = root.parent / "again"
    assert run(root, f"compare=[{out / 'plain'},b={out / 'hq'}]", "metrics=[psnr]", f"out={again}") == 0
    assert (again / "table.md").read_text().count("▸") >= 2
    capsys.readouterr()
    for words, message in [
        (["compare=[bicubic,bicubic]"], "two methods are called bicubic"),
        (["compare=[a=/nowhere/x]"], "/nowhere/x is not here"),
        (["compare=[]"], "at least one method"),
        (["compare=[LQ=bicubic]"], "cannot be called 'LQ'"),
        (["compare=[a/b=bicubic]"], "cannot be called 'a/b'"),
        (["compare=[bicubic]", "pairwise=true"], "two methods or more"),
        (["compare=[bicubic]", "method=bicubic"], "leave out method="),
        (["compare=[bicubic]", "explain='psnr=3'"], "leave out explain="),
    ]:
        assert run(root, *words, f"out={root.parent / 'c'}") == 2
        assert message in capsys.readouterr().err


def test_two_files_are_compared_without_a_data_set(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, reference = root / "hr" / "0.png", root / "hr" / "1.png"
    assert COMMAND.main([f"image={image}", f"reference={reference}", "metrics=[psnr,ssim]", "device=cpu"]) == 0
    out = capsys.readouterr().out
    judge = Evaluator(load_protocol("varestorer"), ["psnr"])
    psnr = judge.score(load_image(image), load_image(reference)).values["psnr"]
    assert f"psnr     {psnr:9.4f}" in out and "ssim" in out
    words = [f"image={image}", f"reference={reference}", f"explain='psnr={psnr:.4f}'", "device=cpu"]
    assert COMMAND.main(words) == 0 and "protocol varestorer" in capsys.readouterr().out
    for words, status, message in [
        ([f"image={image}"], 2, "image= and reference= go together"),
        ([f"image={image}", f"reference={reference}", "dataset=folder"], 2, "leave out dataset="),
        ([f"image={image}", f"reference={root / 'lr' / '0.png'}"], 1, "the image is 64x48 and its reference 16x12"),
        ([f"image={image}", f"reference={root / 'none.png'}"], 1, "none.png"),
        ([f"data.root={root}"], 2, "dataset= is missing"),
    ]:
        assert COMMAND.main([*words, "device=cpu", "offline=true"]) == status
        assert message in capsys.readouterr().err


def test_missing_prediction_is_named_and_the_rest_scored(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in (0, 2):
        save_image(root.parent / "made" / f"{i}.png", load_image(root / "hr" / f"{i}.png"))
    assert run(root, f"predictions={root.parent / 'made'}", "metrics=[psnr]", "protocol=stablesr_y") == 1
    text = capsys.readouterr().out
    assert "2 images scored" in text and "1: wanted one prediction 1.* in" in text
    summary = json.loads((root.parent / "out" / "summary.json").read_text())
    assert summary["metrics"]["psnr"]["n"] == 2
    assert summary["metrics"]["psnr"]["id"] == "psnr[color_space=ycbcr,test_y_channel=True]"
    assert not (root.parent / "out" / "images").exists()


def test_unavailable_metric_fails_only_if_asked_for(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(root.parent / "hub"))
    assert run(root, "method=bicubic", "limit=1") == 0
    shown = capsys.readouterr()
    assert shown.err.count("WARNING") == 1 and "left out, for they cannot run here: lpips, maniqa, musiq" in shown.err
    assert shown.out.count("musiq") == 1 and "(summary.json says why)" in shown.out
    assert "musiq_koniq" in (root.parent / "out" / "summary.json").read_text()
    assert run(root, "method=bicubic", "limit=1", "metrics=[psnr,musiq]", f"out={root.parent / 'asked'}") == 1
    assert "musiq    FAILED: metric 'musiq' needs musiq_koniq" in capsys.readouterr().out


def test_a_second_run_does_only_what_is_missing_and_gives_the_same_figures(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("method=bicubic", "metrics=[psnr,ssim]")
    out = root.parent / "out"
    assert run(root, *words) == 0
    whole = {name: (out / name).read_text() for name in ("summary.json", "per_image.csv")}
    lines = whole["per_image.csv"].splitlines(keepends=True)
    (out / "per_image.csv").write_text("".join(lines[:2]) + lines[2][:9])  # as if the machine had stopped
    (out / "images" / "2.png").unlink()
    made, scored = [], []
    make, score = BicubicSource.__call__, Evaluator.score_batch
    monkeypatch.setattr(BicubicSource, "__call__", lambda self, name, lq: made.append(name) or make(self, name, lq))
    monkeypatch.setattr(Evaluator, "score_batch", lambda self, *args: scored.append(len(args[0])) or score(self, *args))
    assert run(root, *words) == 0
    assert made == ["2"] and sum(scored) == 2
    assert (out / "summary.json").read_text() == whole["summary.json"]
    rows = list(csv.DictReader((out / "per_image.csv").open(newline="")))
    before = list(csv.DictReader(StringIO(whole["per_image.csv"])))
    assert [(row["psnr"], row["ssim"]) for row in rows] == [(row["psnr"], row["ssim"]) for row in before]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("protocol=stablesr_y", "with protocol=varestorer, metrics=[psnr]; this one has protocol=stablesr_y"),
        ("seed=1", "with seed=0; this one has seed=1"),
        ("metrics=[ssim]", "with metrics=[psnr]; this one has metrics=[ssim]"),
    ],
)
def test_a_folder_with_another_evaluation_is_refused(
    word: str, message: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, "method=bicubic", "metrics=[psnr]") == 0
    words = {"metrics=[psnr]", word} if not word.startswith("metrics") else {word}
    assert run(root, "method=bicubic", *words) == 2
    error = capsys.readouterr().err
    assert message in error and "give another out=, or remove that folder" in error


def test_a_smaller_limit_does_not_throw_scores_away(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("method=bicubic", "metrics=[psnr]")
    rows = root.parent / "out" / "per_image.csv"
    assert run(root, *words, "limit=2") == 0
    assert run(root, *words) == 0
    whole = rows.read_text()
    assert run(root, *words, "limit=1") == 2
    assert "holds scores of 2 more images; raise limit=, or give another out=" in capsys.readouterr().err
    assert rows.read_text() == whole


def test_images_without_references(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("method=bicubic", "metrics=[psnr,lpips,fid,entropy]", f"data.root={root / 'lr'}")
    assert run(root, *words, dataset="images") == 1
    summary = json.loads((root.parent / "out" / "summary.json").read_text())
    assert set(summary["metrics"]) == {"entropy"} and summary["n"] == 3
    reason = "needs references, and the data set has none"
    assert summary["unavailable"] == {"psnr": reason, "lpips": reason, "fid": reason}


def test_two_processes_give_the_same_figures(root: Path) -> None:
    (root / "lr" / "1.png").write_bytes(b"broken")
    words = ["method=bicubic", "metrics=[psnr,ssim]"]
    assert run(root, *words, f"out={root.parent / 'one'}") == 1
    shared = [f"data.root={root}", "dataset=folder", "device=cpu", "offline=true", f"out={root.parent / 'two'}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, "scripts/eval.py", *words, *shared],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and done.stdout.count("2 images scored") == 1, done.stdout + done.stderr
    one, two = (root.parent / name for name in ("one", "two"))
    assert (one / "summary.json").read_text() == (two / "summary.json").read_text()
    figures = []
    for out in (one, two):
        with (out / "per_image.csv").open(newline="") as file:
            figures.append([{**row, "seconds": ""} for row in csv.DictReader(file)])
    assert figures[0] == figures[1] and "cannot read the image" in figures[0][1]["error"]


def test_checkpoint(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class System(torch.nn.Linear):
        is_merged = False
        student_config = StudentConfig()
        traits: dict[str, object] = {}
        check_source, source = VARestorer.check_source, None

        def merge_adapters(self) -> None:
            self.is_merged = True

        def restore(self, image: torch.Tensor, scale: int = 4, **options: object) -> SimpleNamespace:
            assert self.is_merged and options["steps"] is None
            return SimpleNamespace(image=resize(image, (image.shape[1] * scale, image.shape[2] * scale)))

    torch.manual_seed(0)
    system = System(2, 2)
    asked = []
    monkeypatch.setattr(VARestorer, "from_pretrained", lambda ckpt: asked.append(ckpt) or system)
    assert run(root, "ckpt=outputs/a run, the best", "metrics=psnr") == 0
    assert asked == [Path("outputs/a run, the best")]
    assert "s per image" in capsys.readouterr().out
    assert run(root, "ckpt=outputs/a run, the best", "metrics=psnr") == 0
    with torch.no_grad():
        system.weight[0, 0] += 1  # trained on
    assert run(root, "ckpt=outputs/a run, the best", "metrics=psnr") == 2
    assert "holds an evaluation with weights=" in capsys.readouterr().err


def test_precision_is_a_part_of_what_was_scored(
    root: Path, tmp_path: Path, tiny_system: VARestorer, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_system.save_pretrained(tmp_path / "bundle")
    words = [f"ckpt={tmp_path / 'bundle'}", "metrics=psnr"]
    assert run(root, *words, "precision=bf16") == 0
    assert run(root, *words, "precision=bf16") == 0
    assert run(root, *words, "precision=fp32") == 2
    assert "holds an evaluation with precision=bf16" in capsys.readouterr().err
    assert run(root, *words, "precision=half") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=bicubic", "data.root=/nowhere"], "/nowhere"),
        (["method=bicubic", "metrics=[pnsr]"], "no metric 'pnsr'; did you mean psnr"),
        (["method=nearest"], "method must be one of bicubic, spandrel, tokenizer, got method=nearest"),
        (["method=spandrel"], "method=spandrel needs model_path=FILE"),
        (["method=spandrel", "model_path=/nowhere.pth"], "/nowhere.pth is no file"),
        (["method=bicubic", "batch=0"], "batch must be at least 1, got batch=0"),
        (["method=bicubic", "scale=0"], "scale must be at least 1, got scale=0"),
        (["method=bicubic", "scale=4.5"], "scale: Value '4.5'"),
        (["method=bicubic", "limit=x"], "limit: Value 'x'"),
        (["method=bicubic", "seed=x"], "seed: Value 'x'"),
        (["method=bicubic", "+bogus=1"], "no key 'bogus'"),
        (["method=bicubic", "device=tpu"], "got device=tpu"),
        (["method=bicubic", "limit=0"], "limit must be at least 1"),
        (["method=bicubic", "protocol=paper"], "paper"),
        (["method=bicubic", "predictions=x"], "got predictions and method"),
        (["predictions=/nowhere"], "/nowhere is not a folder"),
        (["ckpt=x", "method=bicubic"], "give one of ckpt=, predictions= and method="),
        (["method=bicubic", "model_path=x"], "model_path= is for method=spandrel and method=tokenizer"),
        (["method=bicubic", "steps=multi"], "steps= is for ckpt=MODEL"),
        (["method=bicubic", "precision=bf16"], "precision= is for ckpt=MODEL"),
        (["method=bicubic", "doubt=bicubic"], "doubt= is for ckpt=MODEL"),
        (["steps=multi", "doubt=bicubic"], "doubt= is for ckpt=MODEL"),
        (["doubt=none"], "doubt must be one of restorer, bicubic"),
    ],
)
def test_wrong_commands(words: list[str], message: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, *words) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert error.count("\n") == 1 or "Available options" in error


@pytest.mark.parametrize("words", [[], ["method=tokenizer"]])
def test_without_a_source_it_is_the_shipped_model(root: Path, words: list[str]) -> None:
    assert run(root, "metrics=[psnr]", "limit=1", *words) == 0
    settings = json.loads((root.parent / "out" / "settings.json").read_text())
    assert settings["ckpt"] == DEFAULT
    assert load_image(root.parent / "out" / "images" / "0.png").shape == (3, 48, 64)


def test_doubt_is_written_beside_the_scores(
    root: Path, tiny_system: VARestorer, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_system.save_pretrained(root.parent / "bundle")
    words = [f"ckpt={root.parent / 'bundle'}", "metrics=[psnr]", "limit=2"]
    assert run(root, *words, "doubt=restorer") == 2
    assert "no restorer: give doubt=bicubic" in capsys.readouterr().err
    assert run(root, *words, "doubt=bicubic") == 0
    assert "doubt.png" in capsys.readouterr().out
    content = json.loads((root.parent / "out" / "doubt.json").read_text())
    mean = json.loads((root.parent / "out" / "summary.json").read_text())["metrics"]["psnr"]["mean"]
    assert content["curves"]["psnr"]["doubt"][0] == pytest.approx(mean, abs=1e-3)


def test_a_model_of_other_traits_is_another_model(
    root: Path, tiny_system: VARestorer, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = root.parent / "bundle"
    tiny_system.save_pretrained(bundle)
    assert run(root, f"ckpt={bundle}", "metrics=[psnr]") == 0
    assert run(root, f"ckpt={bundle}", "metrics=[psnr]") == 0
    config = json.loads((bundle / "config.json").read_text())
    config["student"]["keep_residual"] = True  # of the same weights
    (bundle / "config.json").write_text(json.dumps(config))
    assert run(root, f"ckpt={bundle}", "metrics=[psnr]") == 2
    assert "student" in capsys.readouterr().err


def test_folder_without_pairs_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "method=bicubic") == 2
    assert "no pairs" in capsys.readouterr().err


def test_help_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMAND.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("predictions=FOLDER", "realsr", "stablesr_y", "Exit status"))


@pytest.mark.parametrize("dataset", ["div2k", "realsr", "drealsr", "reallr200", "folder", "images"])
@pytest.mark.parametrize("protocol", ["varestorer", "stablesr_y", "varsr"])
def test_every_choice_composes(dataset: str, protocol: str) -> None:
    cfg = compose("eval", [f"dataset={dataset}", f"protocol={protocol}", "data.root=x"])
    assert cfg.dataset.name == dataset and cfg.protocol.name == protocol
    assert cfg.out.startswith(f"outputs/eval/{dataset}_")


def test_the_loggers_get_the_figures(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict] = []
    run_of = SimpleNamespace(log=logged.append, finish=lambda: None)
    monkeypatch.setattr("wandb.init", lambda **_: run_of)
    out = root / "logged"
    assert run(root, "method=bicubic", "metrics=psnr") == 0
    assert logged == []
    assert run(root, "method=bicubic", "metrics=psnr", "logger=[wandb,tensorboard]", f"out={out}") == 0
    assert logged[0].keys() == {"eval/folder/psnr"}
    assert len(logged[1]["eval/folder/images"].data) == 3
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    (psnr,) = events.Scalars("eval/folder/psnr")
    assert psnr.value == pytest.approx(logged[0]["eval/folder/psnr"])
    assert [image.step for image in events.Images("eval/folder/images/HQ")] == [0, 1, 2]
