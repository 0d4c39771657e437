"""What is kept of an evaluation that stopped, and what is not."""

import csv
import json
import os
from pathlib import Path

import pytest
import torch

from varestorer.evaluation.evaluator import Evaluator
from varestorer.evaluation.progress import Progress
from varestorer.evaluation.protocols import PROTOCOLS
from varestorer.evaluation.results import Evaluation, Pair, Row
from varestorer.evaluation.sources import BicubicSource, FolderSource
from varestorer.utils.errors import UsageError
from varestorer.utils.images import load_image, save_image


def test_rows_are_read_back_to_the_last_digit(tmp_path: Path) -> None:
    rows = [Row("a, b", {"psnr": 0.1 + 0.2, "ssim": 1 / 3}, 2 / 3), Row('"c"\u00e9', {"psnr": 1e-17, "ssim": -5.0})]
    progress = Progress(tmp_path, {})
    progress.begin(["psnr", "ssim"], rows[:1])
    progress.append(rows[1:])
    assert Progress(tmp_path, {}).kept(["psnr", "ssim"]) == {row.name: row for row in rows}


def test_rows_with_errors_or_gaps_and_half_lines_are_done_again(tmp_path: Path) -> None:
    progress = Progress(tmp_path, {})
    progress.begin(["psnr"], [Row("good", {"psnr": 1.0}), Row("bad", {"psnr": 1.0}, errors=("x",)), Row("gap")])
    with progress.path.open("a", newline="") as file:
        file.write("half,1.5,")
    assert set(progress.kept(["psnr"])) == {"good"}
    assert not progress.kept(["psnr", "lpips"])  # a metric whose weights have come since
    progress.begin(["psnr"], progress.kept(["psnr"]).values())
    progress.append([Row("half", {"psnr": 1.5})])
    assert set(progress.kept(["psnr"])) == {"good", "half"}


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    settings = {"protocol": "varsr", "seed": 0, "metric weights": {"lpips": "ab"}}
    Progress(tmp_path, settings).begin([], [])
    Progress(tmp_path, settings)
    Progress(tmp_path, settings | {"metric weights": {"niqe": "cd"}})  # more weights than before contradict nothing
    with pytest.raises(UsageError, match=r"with seed=0; this one has seed=1: give another out="):
        Progress(tmp_path, settings | {"seed": 1})
    with pytest.raises(UsageError, match=r"with ckpt=None; this one has ckpt=run"):
        Progress(tmp_path, settings | {"ckpt": "run"})
    with pytest.raises(UsageError, match=r"metric weights=\[lpips: ab\]; this one has metric weights=\[lpips: zz\]"):
        Progress(tmp_path, settings | {"metric weights": {"lpips": "zz"}})
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UsageError, match="cannot read .*settings.json"):
        Progress(tmp_path, settings)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(UsageError, match="holds an evaluation without settings.json"):
        Progress(tmp_path, settings)


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    """Two pairs of one size, with predictions beside them in `made`."""
    found: list[Pair] = []
    for name in ("a", "b"):
        image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(ord(name)))
        for side in ("lr", "hr", "made"):
            save_image(tmp_path / side / f"{name}.png", image)
        found.append((name, tmp_path / "lr" / f"{name}.png", tmp_path / "hr" / f"{name}.png"))
    return found


def score(pairs: list[Pair], out: Path, source: FolderSource | BicubicSource, keep: Path | None = None) -> Evaluation:
    judge = Evaluator(PROTOCOLS["varestorer"], ["psnr"], offline=True)
    return judge.evaluate(pairs, source, keep=keep, progress=Progress(out, {}))


def replace_by_older(path: Path) -> None:
    """Another picture with an older time, as `cp -p` or unzip leave it."""
    save_image(path, 0.5 * load_image(path))
    os.utime(path, (1.5e9, 1.5e9))


@pytest.mark.parametrize("side", ["made", "hr", "lr"])
def test_an_older_file_in_the_place_of_another_is_scored_again(side: str, pairs: list[Pair], tmp_path: Path) -> None:
    def run(out: str) -> Evaluation:
        return score(pairs, tmp_path / out, FolderSource(tmp_path / "made"))

    before = run("out")
    replace_by_older(tmp_path / side / "b.png")
    after = run("out")
    assert after.rows[0] == before.rows[0] and after.rows[1].digests != before.rows[1].digests
    assert [row.scores for row in after.rows] == [row.scores for row in run("new").rows]
    with (tmp_path / "out" / "per_image.csv").open(newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)] == ["a", "b"]
    assert json.loads((tmp_path / "out" / "settings.json").read_text()) == {}


def test_files_of_other_times_but_the_same_content_keep_their_scores(
    pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = score(pairs, tmp_path / "out", FolderSource(tmp_path / "made"))
    for path in tmp_path.glob("*/*.png"):
        os.utime(path)
    monkeypatch.setattr(Evaluator, "score_batch", None)
    assert score(pairs, tmp_path / "out", FolderSource(tmp_path / "made")).rows == before.rows


@pytest.mark.parametrize("are_scored", [True, False])
def test_a_kept_image_of_another_lq_is_made_again(are_scored: bool, pairs: list[Pair], tmp_path: Path) -> None:
    def run(out: Path) -> Evaluation:
        return score(pairs, out, BicubicSource(1), keep=out / "images")

    run(tmp_path / "out")
    kept = [tmp_path / "out" / "images" / f"{name}.png" for name in ("a", "b")]
    before = [path.read_bytes() for path in kept]
    if not are_scored:
        (tmp_path / "out" / "per_image.csv").write_text("image,psnr,seconds,error\n")
    replace_by_older(pairs[1][1])
    after = run(tmp_path / "out")
    assert kept[0].read_bytes() == before[0] and kept[1].read_bytes() != before[1]
    assert after.rows[0].seconds is None or are_scored  # was taken, not made
    assert [row.scores for row in after.rows] == [row.scores for row in run(tmp_path / "new").rows]


def test_a_stranger_among_the_kept_images_is_not_scored(pairs: list[Pair], tmp_path: Path) -> None:
    keep = tmp_path / "out" / "images"
    wanted = score(pairs, tmp_path / "out", BicubicSource(1), keep=keep)
    save_image(keep / "a.png", torch.rand(3, 32, 32))
    assert [row.scores for row in score(pairs, tmp_path / "out", BicubicSource(1), keep=keep).rows] == [
        row.scores for row in wanted.rows
    ]


def test_rows_of_which_nobody_knows_the_files_are_done_again(pairs: list[Pair], tmp_path: Path) -> None:
    score(pairs, tmp_path / "out", FolderSource(tmp_path / "made"))
    rows = (tmp_path / "out" / "per_image.csv").read_text()
    (tmp_path / "out" / "files.csv").unlink()
    (tmp_path / "out" / "per_image.csv").write_text(rows.replace("80.0", "12.0"))
    assert [row.scores["psnr"] for row in score(pairs, tmp_path / "out", FolderSource(tmp_path / "made")).rows] == [
        80
    ] * 2
