"""`varestorer benchmark` prints and writes what it measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from text_models import save_t5

from varestorer.commands.benchmark import COMMAND as BENCHMARK
from varestorer.commands.benchmark import together
from varestorer.utils import rates

pytestmark = pytest.mark.smoke
ROWS = ("VAE decoder", "adapters", "restorer", "transformer blocks")
TINY = ["model=tiny", "device=cpu", "repeats=2", "warmup=0"]


@pytest.fixture(autouse=True)
def small_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rates.MATRIX_SIDES, "cpu", (64,))
    monkeypatch.setitem(rates.COPY_BYTES, "cpu", 2**16)


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


def test_restoring_is_measured_by_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text_encoder = save_t5(tmp_path / "t5")
    words = ["what=restore", *TINY, "variants=[eager,merged]", "batch=[1,2]", "picture=20", f"out={tmp_path}"]
    assert BENCHMARK.main([*words, f"text={text_encoder}", "text_tokens=5"]) == 0
    text = capsys.readouterr().out
    assert "tiny on" in text and "torch" in text and "VAE decoder" in text and "wanted" not in text
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert [(run["variant"], run["batch"]) for run in content["runs"]] == [
        (variant, batch) for batch in (1, 2) for variant in ("eager", "merged")
    ]
    assert set(content["picture"]["runs"]) == {"eager", "merged"}
    assert [stage["name"] for stage in content["beside"]] == ["text encoder"]
    assert (tmp_path / "benchmark.png").stat().st_size > 1000


def test_what_cannot_be_measured_is_reported_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["what=restore", *TINY, "variants=[merged,graphs]", "picture=null", f"out={tmp_path}"]
    assert BENCHMARK.main(words) == 1
    assert "graphs" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "benchmark.json").read_text())["runs"]) == 1


@pytest.mark.parametrize("wrong", ["variants=[fastest]", "batch=[0]", "repeats=0", "color=red", "restorer=big"])
def test_wrong_options_of_restore_are_usage_errors(wrong: str) -> None:
    assert BENCHMARK.main(["what=restore", *TINY, wrong]) == 2


def test_all_parts_run_though_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []

    def part(words: list[str]) -> int:
        ran.append(words)
        folder = Path(words[1].removeprefix("out="))
        folder.mkdir()
        (folder / "benchmark.json").write_text('{"runs": []}')
        return 1 if "what=generate" in words else 0

    monkeypatch.setattr(together, "run_part", part)
    assert BENCHMARK.main(["what=all", "model=2b", "device=cpu", f"out={tmp_path}"]) == 1
    assert [words[0] for words in ran] == [f"what={name}" for name in together.PARTS]
    assert all("model=2b" in words and "device=cpu" in words for words in ran)
    assert "failed: generate" in capsys.readouterr().out
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert content["statuses"]["generate"] == 1 and content["parts"]["restore"] == {"runs": []}
    assert content["targets"] == []


def test_on_a_gpu_all_measures_two_sizes_of_batch_unless_told(tmp_path: Path) -> None:
    words = together.words_of("restore", ["what=all", "+out=x", "model=2b"], tmp_path, is_gpu=True)
    assert words == ["what=restore", f"out={tmp_path / 'restore'}", "model=2b", "batch=[1,16]"]
    assert "batch=[1,16]" not in together.words_of("restore", ["batch=[4]"], tmp_path, is_gpu=True)
    assert "batch=[1,16]" not in together.words_of("generate", [], tmp_path, is_gpu=True)


def test_targets_are_for_one_device_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert together.report_targets({"restore": {}, "generate": {}}, "NVIDIA A100") == []
    assert len(together.report_targets({"restore": {}, "generate": {}}, "NVIDIA H200 (139.8 GiB)")) == 6
    assert capsys.readouterr().out.count("not measured") == 6


def test_all_refuses_variants_whose_names_differ_from_part_to_part() -> None:
    assert BENCHMARK.main(["what=all", *TINY, "variants=[eager]"]) == 2


@pytest.mark.slow
def test_one_command_measures_everything(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "varestorer", "benchmark", "what=all", *TINY, "picture=null", f"out={tmp_path}"]
    subprocess.run(command, check=True)
    parts = json.loads((tmp_path / "benchmark.json").read_text())["parts"]
    assert all(parts[name] for name in together.PARTS)


@pytest.mark.gpu
def test_restoring_is_measured_on_a_gpu(tmp_path: Path) -> None:
    words = ["what=restore", "model=tiny", "device=cuda", "batch=[1,2]", "variants=[eager,bf16,bf16+graphs]"]
    assert BENCHMARK.main([*words, "repeats=3", "picture=40", f"out={tmp_path}"]) == 0
    runs = json.loads((tmp_path / "benchmark.json").read_text())["runs"]
    assert all(run["peak_bytes"] > 0 and run["seconds"] > 0 for run in runs)
    assert [bool(run["stages"]) for run in runs] == [True, True, False] * 2
