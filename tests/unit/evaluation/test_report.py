"""The report: self-contained, escaped, with every picture, curve and number in it."""

import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from varestorer.evaluation.comparison import photographs
from varestorer.evaluation.report import methods_table, series, smooth, write_run_report
from varestorer.evaluation.tables import html_table


def make(path: Path) -> str:
    image = torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(0))
    columns = {"LQ": image[:, ::4, ::4], "student <one step>": image, "HQ": image}
    lines = [{"stage": "teacher", "step": i, "loss": 1 / i, "kl": 2 / i, "lr": 0.1} for i in range(1, 30)]
    rows = [{"method": "bicubic", "PSNR": 20.0}, {"method": "ours", "PSNR": 21.0, "seconds per image": 0.5}]
    facts = {"wall time": 12.5, "config": {"a.b": "<c>"}}
    write_run_report(path, "A & B", {"teacher": lines, "empty": []}, rows, {"coffee": columns}, facts)
    return path.read_text(encoding="utf-8")


def test_report_holds_everything_and_fetches_nothing(tmp_path: Path) -> None:
    page = make(tmp_path / "run" / "report.html")
    assert "<h1>A &amp; B</h1>" in page and "student &lt;one step&gt;" in page and "a.b: &lt;c&gt;" in page
    assert "<b>21.00</b>" in page and "<b>20.00</b>" not in page
    assert "29 steps; loss" in page and "{{" not in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert not re.findall(r"(?:src|href)=\"(?!data:)[^\"]+\"|https?://|url\(", page)
    sizes = [Image.open(BytesIO(b64decode(url.split(",")[1]))).size for url in sources]
    # three columns: the whole picture at the size of the largest, and 24 pixels enlarged nine times
    assert sizes[:6] == [(128, 96), (216, 216)] * 3 and len(sizes) == 7


def test_table_marks_the_best_in_its_direction() -> None:
    rows = [
        {"method": "a", "LPIPS": 0.3, "seconds": 2.0, "steps": 9},
        {"method": "b", "LPIPS": 0.2, "seconds": None, "steps": 1},
    ]
    table = html_table(methods_table(rows))
    assert "<b>0.2000</b>" in table and "<u>0.3000</u>" in table
    assert table.count("<b>") == table.count("<u>") == 1  # a time alone is not the best, and steps have no direction


def test_series_and_smoothing() -> None:
    steps, values = series([{"step": 3, "loss": 1.0}, {"step": 4}, {"step": 5, "loss": 2}], "loss")
    assert steps.tolist() == [3, 5] and values.tolist() == [1.0, 2.0]
    line = np.arange(100.0)
    assert np.allclose(smooth(line), line)
    assert np.std(smooth(np.tile([0.0, 1.0], 200))) < 0.1
    assert smooth(np.array([])).size == 0 and smooth(np.array([4.0])).tolist() == [4.0]


def test_report_that_cannot_be_written_names_the_path(tmp_path: Path) -> None:
    from varestorer.utils.errors import UserError

    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"report\.html"):
        make(tmp_path / "file" / "report.html")


def test_compared_photographs_are_a_quarter_as_large() -> None:
    hq = torch.rand(3, 42, 50, generator=torch.Generator().manual_seed(0))
    (photo,) = photographs([{"name": "a", "lq": hq, "hq": hq}])
    assert photo.lr.shape == (3, 10, 12) and torch.equal(photo.hq, hq[:, :40, :48])
