"""The options of the stages through the command, at test size: they train, resume exactly, and leave a usable run."""

import json
from pathlib import Path

import pytest
import torch

from varestorer.commands.train import COMMAND as TRAIN
from varestorer.systems.varestorer import VARestorer
from varestorer.utils.images import save_image
from varestorer.utils.seeds import torch_generator
from varestorer.weights.runs import load_ema

pytestmark = pytest.mark.smoke
TINY = ["model=tiny", "logger=none", "model.weights.tokenizer=null"]
TINY += ["model.weights.transformer=null", "data.crop=32", "trainer.num_workers=0", "trainer.batch_size=2"]
TINY += ["trainer.accumulate=1", "trainer.checkpoint_every=2", "trainer.sample_every=0", "trainer.warmup_steps=0"]
TINY += ["trainer.schedule=constant", "trainer.validate_every=1", "heldout.limit=1"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for number in range(3):
        save_image(root / f"{number}.png", torch.rand(3, 40, 40, generator=torch_generator(number)))
    return root


def command_line(experiment: str, photos: Path, *words: str) -> list[str]:
    return [f"+experiment={experiment}", *TINY, f"data.root={photos}", *words]


def train(experiment: str, photos: Path, run: Path, *words: str) -> list[dict]:
    """Three steps at once; a second time, in another folder, in two parts."""
    common = command_line(experiment, photos, *words)
    parted = run.with_name("parted")
    assert TRAIN.main([*common, "trainer.max_steps=3", f"run_dir={run}"]) == 0
    assert TRAIN.main([*common, "trainer.max_steps=2", f"run_dir={parted}"]) == 0
    assert TRAIN.main([*common, "trainer.max_steps=3", f"run_dir={parted}", "resume=auto"]) == 0
    assert lines_of(run) == lines_of(parted)
    whole, resumed = load_ema(run), load_ema(parted)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    return lines_of(run)


def lines_of(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_a_tokenizer_with_a_discriminator(photos: Path, tmp_path: Path) -> None:
    task = "stages.tokenizer.task"
    small = [f"{task}.adversarial.{key}" for key in ("start_step=2", "channels=8", "layers=2")]
    words = [f"{task}.perceptual=ms_ssim", "scores=[psnr]", "optimizer.lr=1e-3", *small]
    lines = train("tokenizer_gan", photos, tmp_path / "run", *words)
    assert "realism" not in lines[0] and {"realism", "adaptive_weight"} <= lines[1].keys()
    assert {"discriminator", "usage_0", "usage_2", "bit_0", "bit_7"} <= lines[2].keys()
    assert lines[0]["discriminator"] != lines[2]["discriminator"]
    assert lines[2]["val/psnr"] > 0 and "val/adversarial" not in lines[2]
    weights = load_ema(tmp_path / "run")
    assert {name.split(".")[0] for name in weights} == {"tokenizer"}  # averaged: the system's alone
    system = VARestorer.from_pretrained(tmp_path / "run")
    assert torch.equal(system.tokenizer.decoder.conv_out.weight, weights["tokenizer.decoder.conv_out.weight"])


def test_a_teacher_from_scratch(photos: Path, tmp_path: Path) -> None:
    sizes = ["width=32", "depth=2", "num_heads=2"]
    words = [*(f"model.transformer.{size}" for size in sizes), "+stages.teacher.task.checkpoint_activations=true"]
    words.append("stages.teacher.task.drop_path=0.8")
    lines = train("teacher_scratch", photos, tmp_path / "run", *words)
    assert {"cross_entropy_2", "accuracy_2", "val/loss", "val/cross_entropy_2", "val/accuracy_2"} <= lines[-1].keys()


def test_a_student_whose_images_are_compared_one_by_one(photos: Path, tmp_path: Path) -> None:
    words = ["model.restorer=null", "stages.student.task.perceptual=ms_ssim", "optimizer.lr=1e-3"]
    lines = train("dmd_div2k", photos, tmp_path / "run", *words)
    assert {"kl", "mse", "perceptual", "val/mse"} <= lines[-1].keys()
    weights = load_ema(tmp_path / "run")
    assert weights and all(".lora_" in name for name in weights)
    system = VARestorer.from_pretrained(tmp_path / "run")
    name = next(iter(weights))
    assert torch.equal(system.state_dict()[name], weights[name])
    assert system.restore(torch.rand(3, 9, 9), 2).image.shape == (3, 18, 18)
