"""Real images and the scores that their authors published: OSEDiff's outputs for RealSR."""

import csv
import os
from pathlib import Path

import pytest

from varestorer.evaluation.evaluator import Evaluator
from varestorer.evaluation.protocols import PROTOCOLS
from varestorer.evaluation.results import Evaluation, Pair
from varestorer.evaluation.sources import FolderSource
from varestorer.utils.iqa_weights import missing_weights
from varestorer.utils.seeds import numpy_generator

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def benchmark(shared: Path) -> Path:
    folder = shared / "benchmarks" / "realsr"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return folder


def need_weights(*metrics: str) -> None:
    if missing := [file for name in metrics for file in missing_weights(name)]:
        pytest.skip(f"weights not here (TORCH_HOME={os.environ.get('TORCH_HOME')}): {'; '.join(missing)}")


def score(benchmark: Path, protocol: str, *metrics: str, drawn: int | None = None) -> Evaluation:
    """Score all images, or some that are drawn."""
    paths = sorted((benchmark / "hr").glob("*.png"))
    if drawn:
        numbers = numpy_generator(0, "golden").choice(len(paths), drawn, replace=False)
        paths = [paths[number] for number in sorted(numbers)]
    pairs: list[Pair] = [(path.stem, benchmark / "lr" / path.name, path) for path in paths]
    evaluator = Evaluator(PROTOCOLS[protocol], metrics, offline=True)
    evaluation = evaluator.evaluate(pairs, FolderSource(benchmark / "osediff"), "realsr")
    assert len(evaluation.rows) == (drawn or 100) and not evaluation.failures
    return evaluation


def assert_agrees(evaluation: Evaluation, benchmark: Path, *metrics: str) -> None:
    """Every image is within 1e-3 of the published log."""
    with (benchmark / "osediff_log.csv").open(newline="") as file:
        golden = {Path(row["image"]).stem: row for row in csv.DictReader(file)}
    for row in evaluation.rows:
        for name in metrics:
            assert row.scores[name] == pytest.approx(float(golden[row.name][name]), abs=1e-3), (row.name, name)


def mean(evaluation: Evaluation, name: str) -> float:
    return evaluation.summary()["metrics"][name]["mean"]


def test_psnr_of_all_images_in_both_conventions(benchmark: Path) -> None:
    luma = score(benchmark, "stablesr_y", "psnr")
    assert_agrees(luma, benchmark, "psnr")
    assert mean(luma, "psnr") == pytest.approx(25.1511, abs=1e-4)
    assert mean(score(benchmark, "varestorer", "psnr"), "psnr") == pytest.approx(23.5895, abs=1e-4)


@pytest.mark.parametrize(("metric", "drawn"), [("ssim", 4), ("lpips", 4), ("dists", 1)])
def test_drawn_images_agree_with_the_published_log(metric: str, drawn: int, benchmark: Path) -> None:
    need_weights(metric)
    assert_agrees(score(benchmark, "stablesr_y", metric, drawn=drawn), benchmark, metric)


@pytest.mark.slow
def test_ssim_of_all_images_in_both_conventions(benchmark: Path) -> None:
    luma = score(benchmark, "stablesr_y", "ssim")
    assert_agrees(luma, benchmark, "ssim")
    assert mean(luma, "ssim") == pytest.approx(0.7341, abs=1e-4)
    assert mean(score(benchmark, "varestorer", "ssim"), "ssim") == pytest.approx(0.7073, abs=1e-4)


@pytest.mark.slow
def test_learned_metrics_of_all_images(benchmark: Path) -> None:
    need_weights("lpips", "dists", "niqe")
    evaluation = score(benchmark, "stablesr_y", "lpips", "dists", "niqe")
    assert_agrees(evaluation, benchmark, "lpips", "dists")
    assert mean(evaluation, "niqe") == pytest.approx(5.6476, abs=0.01)
