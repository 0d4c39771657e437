"""Runs as tables, JSON and bars."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from varestorer.benchmark.counting import Count
from varestorer.benchmark.measure import REST, Measured, Timing
from varestorer.benchmark.report import Report, Run, overview, parts_table, write_bars
from varestorer.benchmark.roofline import Rates
from varestorer.evaluation.tables import to_text

RATES = Rates({"fp32": 100e9, "bf16": 400e9}, 10e9)


@pytest.fixture
def runs() -> list[Run]:
    parts = {"transformer": Timing([0.2, 0.4, 0.3]), "select": Timing([0.1]), REST: Timing([0.1])}
    counts = {"transformer": Count(15 * 10**9, 10**9), "select": Count(0, 10**8)}
    eager = Measured(Timing([0.5, 0.4, 0.6]), parts, 2**30)
    graphs = Measured(Timing([0.2]), {REST: Timing([0.2])})
    return [Run("eager", 2, "fp32", eager, counts), Run("graphs", 2, "bf16", graphs, counts)]


def test_the_overview_holds_shares_and_floors(runs: list[Run]) -> None:
    eager, graphs = overview(runs, RATES).rows
    assert eager.cells["images/s"] == 4 and eager.cells["ms"] == 500 and eager.cells["peak GiB"] == 1
    assert eager.cells["floor ms"] == pytest.approx(160) and eager.cells["x floor"] == pytest.approx(0.5 / 0.16)
    assert graphs.cells["% of rate"] == pytest.approx(100 * 15e9 / 0.2 / 400e9)


def test_each_part_stands_beside_what_the_device_can(runs: list[Run]) -> None:
    transformer, select, rest = parts_table(runs[0], RATES).rows
    assert transformer.cells["% of rate"] == 50 and transformer.cells["floor ms"] == 150
    assert transformer.cells["x floor"] == 2 and transformer.cells["% of copies"] == pytest.approx(100 / 3)
    assert select.cells["floor ms"] == pytest.approx(10) and "GFLOP" not in select.cells
    assert "x floor" not in rest.cells
    assert to_text(parts_table(runs[0], RATES)).startswith("eager, batch 2, against the rate of fp32\npart ")


def test_all_is_printed_at_once_and_written_at_the_end(runs: list[Run], tmp_path: Path) -> None:
    said: list[str] = []
    report = Report("restore", "toy", torch.device("cpu"), said.append)
    report.show_rates(RATES)
    report.show_runs(runs, RATES, "batch 2")
    text = "\n".join(said)
    assert "benchmark restore: toy on" in text and "0.1 TFLOP/s in fp32" in text and "copies 10 GB/s" in text
    assert "eager, batch 2" in text and "graphs, batch 2" not in text  # its parts are launched together
    report.write(tmp_path, runs, RATES, {})
    names = {f"benchmark.{suffix}" for suffix in ("json", "md", "tex", "html", "png")}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert "# benchmark restore: toy" in (tmp_path / "benchmark.md").read_text()


def test_bars_are_a_picture(runs: list[Run], tmp_path: Path) -> None:
    write_bars(tmp_path / "bars.png", runs, RATES, "a title")
    with Image.open(tmp_path / "bars.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 200
