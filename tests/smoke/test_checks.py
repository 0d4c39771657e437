"""What cannot become a run is refused before it begins: one line, status 2, no folder; also what a later stage asks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import save_file

from varestorer.commands.train import COMMAND as TRAIN
from varestorer.commands.train import stage_configs
from varestorer.training import checks
from varestorer.training.checks import check_stages
from varestorer.utils.errors import UsageError, UserError

pytestmark = pytest.mark.smoke
CPU = torch.device("cpu")
# three stages at test size
WORDS = ["+experiment=quickstart_scratch", "model=tiny", "data.crop=32", "report=null", "device=cpu"]
WORDS += ["trainer.num_workers=0", "logger=none"]
REFUSED = {
    "+stages.student.data.crop=48": "stage student: data.crop=48, but this model takes squares of 32 pixels",
    "data.crop=16": "stage tokenizer: data.crop=16, but this model takes squares of 32 pixels",
    "heldout.crop=64": "heldout.crop=64, but this model takes squares of 32 pixels",
    "+stages.student.task.tiles=[16,64]": "data.crop=32, but this model takes squares of 64 pixels",
    "+stages.student.task.teacher=gone.pth": "stage student: weights not found: gone.pth",
    "+stages.student.trainer.base_precision=bf16": "stage student: trainer.base_precision=bf16 wants trainer.precision",
    "+stages.teacher.data.root=gone": "stage teacher: data.root=gone is no folder",
    "heldout.root=gone": "heldout.root=gone is no folder",
    "+stages.student.data.text=gone": "stage student: data.text=gone is no folder",
    "stages.student.optimizer.lr=-1": "stage student: optimizer: Invalid learning rate",
    "+stages.student.task.temperature=2": "stage student: task: got an unexpected keyword argument 'temperature'",
    "model.weights.tokenizer=gone.pth": "the model: weights not found: gone.pth",
    "model.restorer=gone.ckpt": "the model: weights not found: gone.ckpt; set model.restorer",
    "model.weights.transformer=float8.safetensors": "the model: float8.safetensors holds 1 tensors of a kind",
    "model.weights.tokenizer=float8.pth": "such as a.weight (float8_e5m2)",
    "model.weights.transformer=bundle": "the model: bundle/transformer.safetensors holds 1 tensors of a kind",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with weights in eight bits."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundle").mkdir()
    eight = {"a.weight": torch.zeros(2, 2).to(torch.float8_e5m2), "b": torch.zeros(2)}
    for path in ("float8.safetensors", "bundle/transformer.safetensors"):
        save_file(eight, path)
    torch.save(eight, "float8.pth")
    return tmp_path


@pytest.mark.parametrize("word", REFUSED)
def test_refused_before_anything_begins(folder: Path, capsys: pytest.CaptureFixture[str], word: str) -> None:
    words = [one for one in WORDS if one.partition("=")[0] != word.partition("=")[0]]
    assert TRAIN.main([*words, word, "run_dir=run"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and REFUSED[word] in said and said.count("\n") == 1
    assert not (folder / "run").exists() and not (folder / "outputs").exists()


@pytest.mark.parametrize("is_new", [True, False])
def test_weights_that_do_not_fit_leave_no_run_but_what_was_there(
    folder: Path, capsys: pytest.CaptureFixture[str], is_new: bool
) -> None:
    note = folder / "run" / "note.txt"
    if not is_new:
        note.parent.mkdir()
        note.write_text("mine")
    words = ["model.weights={tokenizer: nano, transformer: null}", "run_dir=run", "data=embedded"]
    assert TRAIN.main([*WORDS, *words]) == 1
    assert "tokenizer" in capsys.readouterr().err.splitlines()[-1]
    assert note.exists() != is_new and (folder / "run").exists() != is_new


def test_nor_does_a_folder_with_the_time_in_its_name_stay(folder: Path) -> None:
    assert TRAIN.main([*WORDS, "model.weights={tokenizer: nano, transformer: null}", "data=embedded"]) == 1
    assert (folder / "outputs").is_dir() and not [*(folder / "outputs").glob("*/*")]


@pytest.mark.parametrize(("name", "hub"), [("hvar", "FoundationVision/var"), ("varsr_isr", "qyp2000/VARSR")])
def test_the_file_to_get_is_that_of_the_paper(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, hub: str
) -> None:
    words = [f"+experiment={name}", "data.root=.", "run_dir=run", "device=cpu", "logger=none"]
    assert TRAIN.main([*words, "model.weights={transformer: null, tokenizer: gone.pth}"]) == 2
    assert hub in capsys.readouterr().err


def stages_of(compose: Callable[..., DictConfig], *words: str) -> dict[str, DictConfig]:
    return stage_configs(compose("train", *words), [])


def test_the_batch_of_every_stage_has_to_divide_by_the_processes(compose: Callable[..., DictConfig]) -> None:
    stages = stages_of(compose, *WORDS, "stages.student.trainer.batch_size=6")
    check_stages(stages, 2, CPU)
    with pytest.raises(UsageError, match="stage student: trainer.batch_size=6 has to be a multiple of .* = 4 x 1"):
        check_stages(stages, 4, CPU)


def test_weights_of_a_later_stages_loss_are_looked_for(compose: Callable[..., DictConfig], monkeypatch) -> None:
    def missing(name: str) -> None:
        raise UserError(f"no weights of {name}")

    monkeypatch.setattr(checks, "perceptual_loss", missing)
    check_stages(stages_of(compose, *WORDS), 1, CPU)
    with pytest.raises(UsageError, match="stage student: no weights of lpips$"):
        check_stages(stages_of(compose, *WORDS, "stages.student.task.perceptual=ms_ssim+lpips"), 1, CPU)
    unused = ["stages.student.task.perceptual=lpips", "stages.student.task.weights.perceptual=0"]
    check_stages(stages_of(compose, *WORDS, *unused), 1, CPU)


def test_a_restorer_takes_squares_of_any_size(compose: Callable[..., DictConfig], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checks, "perceptual_loss", lambda name: None)
    words = ["+experiment=nano_restorer", f"data.root={tmp_path}", "data.crop=96"]
    check_stages(stages_of(compose, *words), 1, CPU)
