"""`varestorer benchmark` prints and writes what it measured."""

import json
from pathlib import Path

import pytest
from text_models import save_t5

from varestorer.benchmark import roofline
from varestorer.commands.benchmark import COMMAND as BENCHMARK

pytestmark = pytest.mark.smoke
ROWS = ("VAE decoder", "adapters", "restorer", "transformer blocks", "tokens")
TINY = ["model=tiny", "device=cpu", "repeats=2", "warmup=0"]


@pytest.fixture(autouse=True)
def small_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(roofline.MATRIX_SIDES, "cpu", (64,))
    monkeypatch.setitem(roofline.COPY_BYTES, "cpu", 2**16)


def test_the_memory_of_the_papers_distillation_at_test_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = ["model=tiny", "++model.restorer=x", "data.crop=32", "stages.student.task.perceptual=ms_ssim"]
    words = ["what=memory", "train=dmd_div2k", "micro_batches=[1,2]", "device=cpu", f"out={tmp_path}"]
    assert BENCHMARK.main([*words, f"overrides={json.dumps(changed)}"]) == 0
    text = capsys.readouterr().out
    assert all(row in text for row in ROWS)
    columns = json.loads((tmp_path / "benchmark.json").read_text())["micro_batches"]
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
    assert "tiny on" in text and "torch" in text and "VAE decoder" in text and "eager: first run" in text
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert [(run["variant"], run["batch"]) for run in content["runs"]] == [
        (variant, batch) for batch in (1, 2) for variant in ("eager", "merged")
    ]
    assert set(content["picture"]["runs"]) == {"eager", "merged"}
    (encoder,) = content["beside"]
    # two layers of width 16: two heads of 8, a gated feed-forward of 32; five tokens
    assert encoder["flops"] == 2 * 2 * 5 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 5 * 16)
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


@pytest.mark.parametrize("system", ["varsr", "hvar"])
def test_other_papers_are_measured_by_their_parts(system: str, tmp_path: Path) -> None:
    words = ["what=restore", f"system={system}", f"model={system}_tiny", "device=cpu", "repeats=1", "warmup=0"]
    assert BENCHMARK.main([*words, "variants=[merged]", "picture=null", f"out={tmp_path}"]) == 0
    (run,) = json.loads((tmp_path / "benchmark.json").read_text())["runs"]
    assert {"VAE encoder" if system == "hvar" else "refiner", "transformer", "VAE decoder"} <= run["parts"].keys()
    assert BENCHMARK.main(["what=generate", *words[1:], f"out={tmp_path}"]) == 2


def test_ways_to_generate_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["what=generate", *TINY, "variants=[one,multi+cfg]", f"out={tmp_path}"]
    assert BENCHMARK.main(words) == 0
    assert "best scale by scale: multi+cfg takes" in capsys.readouterr().out
    runs = json.loads((tmp_path / "benchmark.json").read_text())["runs"]
    assert [(run["variant"], run["passes"]) for run in runs] == [("one", 1), ("multi+cfg", 3)]


STEP = ["what=train_step", "device=cpu", "model=tiny", "warmup=0"]


def test_a_training_step_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*STEP, "train=quickstart_scratch", "repeats=2", "variants=[eager,bf16]", "batch=[1,2]", f"out={tmp_path}"]
    assert BENCHMARK.main([*words, 'overrides=["stages.student.task.perceptual=ms_ssim"]']) == 0
    content = json.loads((tmp_path / "benchmark.json").read_text())
    runs = content["runs"]
    names = [(run["variant"], run["batch"]) for run in runs]
    assert names == [(name, batch) for batch in (1, 2) for name in ("eager", "bf16")]
    assert runs[2]["flops"] == pytest.approx(2 * runs[0]["flops"], rel=0.1)
    share = runs[1]["flops"] / runs[1]["seconds"] / content["rates"]["matrix"]["bf16"]
    assert runs[1]["share_of_matrix_rate"] == pytest.approx(share)
    assert "images/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("experiment", "stage", "part"), [("nano_restorer", "texture", "restore"), ("quickstart", "student", "tokens")]
)
def test_the_restorer_of_an_experiment_takes_part(experiment: str, stage: str, part: str, tmp_path: Path) -> None:
    small = '"model.restorer={num_features: 16, num_groups: 1, num_blocks: 1}"'
    flops = {}
    for name, more in {"small": [small], "its own": []}.items():
        overrides = ",".join([f'"stages.{stage}.task.perceptual=ms_ssim"', *more])
        words = [*STEP, f"train={experiment}", "repeats=1", "variants=[eager]", f"overrides=[{overrides}]"]
        assert BENCHMARK.main([*words, f"out={tmp_path / name}"]) == 0
        (run,) = json.loads((tmp_path / name / "benchmark.json").read_text())["runs"]
        flops[name] = run["parts"][part]["flops"]
    assert 0 < flops["small"] < flops["its own"]


@pytest.mark.gpu
def test_restoring_is_measured_on_a_gpu(tmp_path: Path) -> None:
    words = ["what=restore", "model=tiny", "device=cuda", "batch=[1,2]", "variants=[eager,bf16,bf16+graphs]"]
    assert BENCHMARK.main([*words, "repeats=3", "picture=40", f"out={tmp_path}"]) == 0
    runs = json.loads((tmp_path / "benchmark.json").read_text())["runs"]
    assert all(run["peak_bytes"] > 0 and run["seconds"] > 0 for run in runs)
    assert ["transformer" in run["parts"] for run in runs]
