"""Speeds as text, JSON and bars; the targets of the paper's sizes."""

from pathlib import Path
from typing import Any

from PIL import Image

from varestorer.evaluation.speed.report import si, speed_content, speed_text, write_bars
from varestorer.evaluation.speed.restoring import Rates, Speed, StageSpeed
from varestorer.evaluation.speed.targets import all_targets, restoring_targets, targets_text
from varestorer.utils.timing import Timing

RATES = Rates({"fp32": 100e9, "bf16": 400e9}, 10e9)


def speeds() -> list[Speed]:
    stages = (
        StageSpeed("decode PNG", Timing([0.01]), 0, None, None),
        StageSpeed("transformer", Timing([0.2, 0.4, 0.3]), 15 * 10**9, 15 * 10**9, 10**9),
        StageSpeed("select", Timing([0.1]), 0, None, 10**8),
    )
    whole = Timing([0.5, 0.4, 0.6])
    return [Speed("eager", 2, "fp32", whole, stages, 2**30), Speed("graphs", 2, "bf16", whole, (), None)]


def test_figures_have_prefixes() -> None:
    assert [si(17.41e12), si(0.5e9, "B/s"), si(None), si(0)] == ["17.4 T", "500 MB/s", "-", "-"]


def test_table_names_variants_stages_and_rates() -> None:
    text = speed_text(speeds(), RATES)
    for words in (
        "100 GFLOP/s in fp32",
        "10 GB/s",
        "eager, batch 2",
        "transformer",
        "50.0 %",
        "1.00",
        "not timed apart",
    ):
        assert words in text


def test_content_holds_shares_and_floors() -> None:
    run, graphs = speed_content(speeds(), RATES)["runs"]
    assert run["images_per_second"] == 4 and run["seconds"] == 0.5 and graphs["stages"] == []
    transformer = run["stages"][1]
    assert transformer["share_of_matrix_rate"] == 0.5 and transformer["floor_seconds"] == 0.15
    assert transformer["gap"] == 2.0 and abs(transformer["share_of_copy_bandwidth"] - 1 / 3) < 1e-9
    assert abs(run["floor_seconds"] - 0.16) < 1e-9
    assert run["stages"][0]["floor_seconds"] is None


def test_bars_are_a_picture(tmp_path: Path) -> None:
    write_bars(tmp_path / "benchmark.png", speeds(), RATES, "a title")
    with Image.open(tmp_path / "benchmark.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 200


def run_of(variant: str, batch: int, seconds: float, share: float, peak: float) -> dict[str, Any]:
    return {
        "variant": variant,
        "batch": batch,
        "precision": "bf16",
        "seconds": seconds,
        "images_per_second": batch / seconds,
        "peak_bytes": peak,
        "stages": [{"name": "transformer", "share_of_matrix_rate": share}],
    }


def test_targets_hold_the_fastest_variant_against_the_limits() -> None:
    runs = [run_of("slow", 1, 0.09, 0.3, 9e9), run_of("fast", 1, 0.03, 0.6, 13e9)]
    verdicts = {target.name: (target.verdict, target.by) for target in restoring_targets({"runs": runs})}
    assert verdicts == {
        "end to end at batch 1, ms": ("reached", "fast"),
        "images a second at batch 16": ("not measured", ""),
        "peak memory at batch 1, GB": ("missed", "fast"),
        "peak memory at batch 16, GB": ("not measured", ""),
        "transformer, % of the matrix rate": ("reached", "fast, batch 1"),
    }


def test_one_step_is_held_against_the_best_guided_generation_with_a_cache() -> None:
    times = {
        "one": 0.05,
        "one+graphs": 0.04,
        "one+short": 0.01,
        "multi+cfg": 0.2,
        "multi+cfg+nocache": 0.01,
        "multi": 0.02,
    }
    runs = [{"variant": name, "batch": 1, "seconds": seconds} for name, seconds in times.items()]
    target = all_targets({}, {"runs": runs})[-1]
    assert target.measured == 0.2 / 0.04 and target.verdict == "reached"
    assert target.by == "multi+cfg over one+graphs"


def test_nothing_measured_is_said() -> None:
    targets = all_targets({}, {})
    assert {target.verdict for target in targets} == {"not measured"}
    assert targets_text(targets).count("not measured") == len(targets) == 6
