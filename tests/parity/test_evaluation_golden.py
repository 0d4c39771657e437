"""Real images and the scores that their authors published: OSEDiff's outputs for RealSR."""

import csv
import os
from pathlib import Path

import pytest

from varestorer.evaluation.evaluator import Evaluation, Evaluator, Pair
from varestorer.evaluation.protocols import PROTOCOLS
from varestorer.evaluation.sources import FolderSource
from varestorer.utils.iqa_weights import missing_weights


@pytest.fixture(scope="module")
def benchmark(shared: Path) -> Path:
    folder = shared / "benchmarks" / "realsr"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return folder


def log_of(benchmark: Path) -> dict[str, dict[str, str]]:
    with (benchmark / "osediff_log.csv").open(newline="") as file:
        return {Path(row["image"]).stem: row for row in csv.DictReader(file)}


def score(benchmark: Path, protocol: str, metrics: list[str], every: int = 1) -> Evaluation:
    pairs: list[Pair] = [
        (path.stem, benchmark / "lr" / path.name, path) for path in sorted((benchmark / "hr").glob("*.png"))[::every]
    ]
    evaluator = Evaluator(PROTOCOLS[protocol], metrics, offline=True)
    return evaluator.evaluate(pairs, FolderSource(benchmark / "osediff"), "realsr")


def assert_agrees(evaluation: Evaluation, benchmark: Path, metrics: list[str]) -> None:
    golden = log_of(benchmark)
    assert evaluation.rows and not evaluation.failures
    for row in evaluation.rows:
        for name in metrics:
            wanted = float(golden[row.name][name])
            assert row.scores[name] == pytest.approx(wanted, abs=1e-3), (row.name, name)


def mean(evaluation: Evaluation, name: str) -> float:
    return evaluation.summary()["metrics"][name]["mean"]


def test_a_few_images_agree_with_the_published_log(benchmark: Path) -> None:
    evaluation = score(benchmark, "stablesr_y", ["psnr", "ssim"], every=25)
    assert len(evaluation.rows) == 4
    assert_agrees(evaluation, benchmark, ["psnr", "ssim"])


def test_lpips_of_a_few_images_agrees_with_the_published_log(benchmark: Path) -> None:
    metrics = ["lpips"]
    if missing := [file for name in metrics for file in missing_weights(name)]:
        pytest.skip(f"weights not here (TORCH_HOME={os.environ.get('TORCH_HOME')}): {'; '.join(missing)}")
    assert_agrees(score(benchmark, "stablesr_y", metrics, every=50), benchmark, metrics)


@pytest.mark.slow
def test_all_images_agree_with_the_published_log(benchmark: Path) -> None:
    evaluation = score(benchmark, "stablesr_y", ["psnr", "ssim"])
    assert len(evaluation.rows) == 100
    assert_agrees(evaluation, benchmark, ["psnr", "ssim"])
    assert mean(evaluation, "psnr") == pytest.approx(25.1511, abs=1e-4)
    assert mean(evaluation, "ssim") == pytest.approx(0.7341, abs=1e-4)


@pytest.mark.slow
def test_means_in_the_papers_own_convention(benchmark: Path) -> None:
    evaluation = score(benchmark, "varestorer", ["psnr", "ssim"])
    assert mean(evaluation, "psnr") == pytest.approx(23.5895, abs=1e-4)
    assert mean(evaluation, "ssim") == pytest.approx(0.7073, abs=1e-4)


@pytest.mark.slow
def test_learned_metrics_of_all_images(benchmark: Path) -> None:
    metrics = ["lpips", "dists", "niqe"]
    if missing := [file for name in metrics for file in missing_weights(name)]:
        pytest.skip(f"weights not here (TORCH_HOME={os.environ.get('TORCH_HOME')}): {'; '.join(missing)}")
    evaluation = score(benchmark, "stablesr_y", metrics)
    assert_agrees(evaluation, benchmark, ["lpips", "dists"])
    assert mean(evaluation, "niqe") == pytest.approx(5.6476, abs=0.01)
