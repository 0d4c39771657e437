"""`varestorer benchmark what=memory` prints and writes its table."""

import json
from pathlib import Path

import pytest

from varestorer.commands.benchmark import COMMAND as BENCHMARK

pytestmark = pytest.mark.smoke
ROWS = ("VAE decoder", "adapters", "restorer", "transformer blocks")


def test_the_memory_of_the_papers_distillation_at_test_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = ["model=tiny", "++model.restorer=x", "data.crop=32", "stages.student.task.perceptual=ms_ssim"]
    words = ["what=memory", "train=dmd_div2k", "micro_batches=[1,2]", "device=cpu", f"out={tmp_path}"]
    assert BENCHMARK.main([*words, f"overrides={json.dumps(changed)}"]) == 0
    text = capsys.readouterr().out
    assert all(row in text for row in ROWS)
    columns = json.loads((tmp_path / "memory.json").read_text())["micro_batches"]
    one, two = (sum(row["bytes"] for row in columns[size]["rows"] if row["kind"] == "activations") for size in "12")
    assert one < two < 3 * one


def test_an_unknown_benchmark_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert BENCHMARK.main(["what=weather"]) == 2
    assert "memory" in capsys.readouterr().err
