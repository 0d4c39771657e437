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
from varestorer.evaluation.sources import FolderSource
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


def test_a_prediction_that_changed_is_scored_again(tmp_path: Path) -> None:
    pairs: list[Pair] = []
    for name in ("a", "b"):
        image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(ord(name)))
        for side in ("lr", "hr", "made"):
            save_image(tmp_path / side / f"{name}.png", image)
        pairs.append((name, tmp_path / "lr" / f"{name}.png", tmp_path / "hr" / f"{name}.png"))

    def run() -> Evaluation:
        judge = Evaluator(PROTOCOLS["varestorer"], ["psnr"], offline=True)
        return judge.evaluate(pairs, FolderSource(tmp_path / "made"), progress=Progress(tmp_path / "out", {}))

    before = run()
    made = tmp_path / "made" / "b.png"
    save_image(made, load_image(made) * 0.5)
    later = (tmp_path / "out" / "per_image.csv").stat().st_mtime_ns + 10**9
    os.utime(made, ns=(later, later))
    after = run()
    assert after.rows[0] == before.rows[0]
    assert after.rows[1].scores["psnr"] < before.rows[1].scores["psnr"]
    with (tmp_path / "out" / "per_image.csv").open(newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)] == ["a", "b"]
    assert json.loads((tmp_path / "out" / "settings.json").read_text()) == {}
