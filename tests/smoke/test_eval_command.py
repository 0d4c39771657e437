"""`eval` as a whole: files, texts, exit statuses."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from varestorer.commands.entry import compose
from varestorer.commands.eval import COMMAND
from varestorer.systems.varestorer import VARestorer
from varestorer.utils.images import load_image, resize, save_image

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
    assert "| bicubic |" in (out / "table.md").read_text()


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
    assert "musiq    unavailable: metric 'musiq' needs musiq_koniq" in capsys.readouterr().out
    assert run(root, "method=bicubic", "limit=1", "metrics=[psnr,musiq]") == 1
    assert "musiq    FAILED: metric 'musiq' needs musiq_koniq" in capsys.readouterr().out


def test_checkpoint(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class System:
        def restore(self, image: torch.Tensor, scale: int = 4, *, seed: int = 0) -> SimpleNamespace:
            return SimpleNamespace(image=resize(image, (image.shape[1] * scale, image.shape[2] * scale)))

    asked = []

    def load(ckpt: str, device: torch.device, merge: bool) -> System:
        asked.append((ckpt, device, merge))
        return System()

    monkeypatch.setattr(VARestorer, "from_pretrained", load)
    assert run(root, "ckpt=outputs/a run, the best", "metrics=psnr") == 0
    assert asked == [("outputs/a run, the best", torch.device("cpu"), True)]
    assert "s per image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=bicubic", "data.root=/nowhere"], "/nowhere"),
        (["method=bicubic", "metrics=[pnsr]"], "no metric 'pnsr'; did you mean psnr"),
        (["method=nearest"], "method must be one of bicubic, got 'nearest'"),
        (["method=bicubic", "limit=0"], "limit must be at least 1"),
        (["method=bicubic", "protocol=paper"], "paper"),
        (["method=bicubic", "predictions=x"], "got predictions and method"),
        (["predictions=/nowhere"], "/nowhere is not a folder"),
        ([], "give one of ckpt=, predictions= and method="),
    ],
)
def test_wrong_commands(words: list[str], message: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, *words) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_folder_without_pairs_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "method=bicubic") == 2
    assert "no pairs" in capsys.readouterr().err


def test_help_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMAND.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("predictions=FOLDER", "realsr", "stablesr_y", "Exit status"))


@pytest.mark.parametrize("dataset", ["div2k", "realsr", "drealsr", "folder"])
@pytest.mark.parametrize("protocol", ["varestorer", "stablesr_y", "varsr"])
def test_every_choice_composes(dataset: str, protocol: str) -> None:
    cfg = compose("eval", [f"dataset={dataset}", f"protocol={protocol}", "data.root=x"])
    assert cfg.dataset.name == dataset and cfg.protocol.name == protocol
    assert cfg.out.startswith(f"outputs/eval/{dataset}_")
