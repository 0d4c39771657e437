"""`tables` as a whole: files, texts, exit statuses."""

import json
from pathlib import Path

import pytest

from varestorer.commands.tables import COMMAND

pytestmark = pytest.mark.smoke


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of an evaluation on RealSR."""
    entry = {"mean": 30.0, "std": 1.0, "n": 100, "id": "psnr", "weights_sha256": None}
    summary = {"dataset": "realsr", "protocol": "varestorer", "n": 100, "metrics": {"psnr": entry}, "unavailable": {}}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "summary.json").write_text(json.dumps(summary))
    return tmp_path / "eval"


def test_table_1(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMAND.main(["table=1", f"runs=['our model={run}']", f"out={tmp_path / 'out'}"]) == 0
    text = capsys.readouterr().out
    assert "| ▸ our model | **30.00** |" in text and "wrote table1.md, table1.tex, table1.html to" in text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"table1.md", "table1.tex", "table1.html"}


def test_table_2_of_two_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["table=2", "model=[pico,tiny]", "repeats=1", "device=cpu", f"out={tmp_path}"]
    assert COMMAND.main(words) == 0
    text = capsys.readouterr().out
    assert "| ▸ pico | 0.3195 |" in text and "| ▸ tiny |" in text and "| *tiny* |" in text
    assert "pico: median of 1 on" in text


def test_table_2_without_timing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMAND.main(["table=2", "model=tiny", "measure=false", f"out={tmp_path}"]) == 0
    assert "tiny was not timed here" in capsys.readouterr().out


def test_table_3_without_runs_is_the_published_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMAND.main(["table=3", f"out={tmp_path}"]) == 0
    assert (
        "| w/o KL | <ins>0.3214</ins> | <ins>69.73</ins> | **4.372** | <ins>0.6682</ins> |" in capsys.readouterr().out
    )


def test_table_small_measures_what_runs_scored(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["table=small", f"runs=['resized={run}']", "models=['resized=bicubic']", "licenses=['resized=MIT']"]
    assert COMMAND.main([*words, "repeats=1", f"out={tmp_path / 'out'}"]) == 0
    assert "| resized |" in capsys.readouterr().out and (tmp_path / "out" / "tablesmall.html").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["table=4"], "table must be 1, 2, 3, varsr, preference, small, got 4"),
        (["table=one"], "table must be 1, 2, 3, varsr, preference, small, got one"),
        (["table=2", "model=nano", "repeats=x"], "repeats: Value 'x'"),
        (["table=2", "model=nano", "repeats=0"], "repeats must be at least 1, got repeats=0"),
        ([], "no value for table"),
        (["table=preference"], "takes one folder in runs="),
        (["table=1", "models=[a=bicubic]"], "models= and licenses= are for table=small"),
        (["table=small", "models=[bicubic]"], "models must be a list of 'label=...', got bicubic"),
        (["table=small", "models=[a=/nowhere]"], "/nowhere"),
        (["table=1", "model=nano"], "model= and ckpt= are for table=2"),
        (["table=2", "model=huge"], "huge"),
        (["table=1", "runs=[/nowhere]"], "/nowhere has no summary.json"),
        (["table=2", "model=tiny", "text_encoder=/nowhere"], "text_encoder=/nowhere has no config.json of a T5"),
    ],
)
def test_wrong_commands(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMAND.main([*words, f"out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMAND.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("runs=", "table=2", "nano"))
