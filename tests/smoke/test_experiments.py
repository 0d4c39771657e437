"""Every experiment composes, trains at test size, and leaves a run that restores."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from varestorer.commands.train import COMMAND as TRAIN
from varestorer.commands.train import stage_configs
from varestorer.evaluation.comparison import UNDISTILLED
from varestorer.systems import load
from varestorer.systems.varestorer import VARestorer
from varestorer.systems.varsr import VARSR
from varestorer.utils.images import save_image

pytestmark = pytest.mark.smoke
EXPERIMENTS = sorted(
    path.stem for path in Path(__file__).parents[2].glob("configs/experiment/*.yaml") if not path.stem.endswith("_base")
)


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_compose(compose: Callable[..., DictConfig], experiment: str) -> None:
    more = ["model.weights.transformer=outputs/run"] if experiment.endswith("_small") else []
    cfg = compose("train", f"+experiment={experiment}", "data.root=null", *more)
    OmegaConf.resolve(cfg)
    assert stage_configs(cfg, [])


def test_paper_scale_experiments_have_the_papers_numbers(compose: Callable[..., DictConfig]) -> None:
    cfg = compose("train", "+experiment=dmd_div2k", "data.root=x")
    assert (cfg.trainer.max_steps, cfg.trainer.batch_size, cfg.optimizer.lr) == (10_000, 32, 1e-6)
    assert dict(cfg.stages.student.task.weights) == {"kl": 0.1, "perceptual": 0.25, "mse": 0.5}
    assert (cfg.model.student.lora_rank, cfg.optimizer.weight_decay, cfg.data.crop) == (32, 1e-2, 512)


WITHOUT_STUDENT = ("tokenizer_bsq", "tokenizer_gan", "teacher_512", "teacher_scratch")
WITHOUT_STUDENT += ("nano_restorer", "nano_telephone", "nano_tokenizer", "nano_teacher")
PREFIXED = ("dmd_varsr", "dmd_hvar")  # one-step students of other papers
OF_VARSR = tuple(name for name in EXPERIMENTS if name.startswith("varsr") and name != "varsr_quickstart")
SMALL = ("quickstart", "quickstart_scratch", "smoke")
OTHER_PAPERS = ("hvar", "varsr", *PREFIXED)  # their networks have tests of their own
SAME = {name: "dmd_div2k" for name in ("ablation_25k", "ablation_no_prompt", "ablation_teacher_1024", "dmd_lsdir")}
SAME |= {"lowlight": "derain"}  # at test size
PAPER_SCALE = [
    name for name in EXPERIMENTS if name not in (*SMALL, *WITHOUT_STUDENT, *SAME) and not name.startswith(OTHER_PAPERS)
]
# experiments of paper scale on networks of test size, one step, without files of weights
NANO = ["model=tiny", "logger=none", "++model.restorer=null", "model.weights.tokenizer=null"]
NANO += ["model.weights.transformer=null", "data.crop=32", "trainer.max_steps=1", "trainer.num_workers=0"]
NANO += ["trainer.batch_size=2", "trainer.accumulate=1", "trainer.checkpoint_every=1", "trainer.sample_every=0"]
OWN = {
    "dmd_1024": ["model.schedule.size=null", "stages.student.task.tiles=[16,32]", "trainer.max_steps=3"],
    "sweep_loss_weights": ["stages.student.task.weights.kl=0.1,0.3", "stages.student.task.weights.perceptual=0.25"],
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    for number in range(3):
        for folder in ("hr", "lr"):
            save_image(root / folder / f"{number}.png", torch.rand(3, 40, 40))
    return root


@pytest.mark.parametrize("experiment", SAME)
def test_experiments_of_other_weights_or_lengths_are_the_same_at_test_size(
    compose: Callable[..., DictConfig], experiment: str
) -> None:
    one, other = (
        compose("train", f"+experiment={name}", *NANO, "data.root=x", "run_dir=x")
        for name in (experiment, SAME[experiment])
    )
    assert one == other


@pytest.mark.parametrize("experiment", PAPER_SCALE)
def test_paper_scale_experiments_train_at_test_size(experiment: str, pairs: Path, tmp_path: Path) -> None:
    perceptual = [] if experiment.endswith("no_distill") else ["stages.student.task.perceptual=ms_ssim"]
    words = [f"+experiment={experiment}", *NANO, *perceptual, *OWN.get(experiment, [])]
    is_sweep = experiment == "sweep_loss_weights"
    place = f"run_dir={tmp_path}/run" + ("_${stages.student.task.weights.kl}" if is_sweep else "")
    assert TRAIN.main([*words, f"data.root={pairs}", place]) == 0
    runs = sorted(tmp_path.glob("run*"))
    assert len(runs) == (2 if is_sweep else 1)
    assert all(lines_of(run)[-1]["loss"] > 0 for run in runs)
    system = VARestorer.from_pretrained(runs[0])
    assert system.restore(torch.rand(3, 9, 9), 2).image.shape == (3, 18, 18)


TINY_STEPS = ["trainer.max_steps=1", "trainer.num_workers=0", "trainer.batch_size=2", "trainer.accumulate=1"]
TINY_STEPS += ["trainer.checkpoint_every=1", "trainer.sample_every=0", "model.weights.tokenizer=null"]
TINY_STEPS += ["model.weights.transformer=null"]
VARSR_OWN = {
    "varsr_tokenizer": ["stages.tokenizer.task.perceptual=ms_ssim", "stages.tokenizer.task.adversarial.weight=0"],
    "varsr_c2i": ["model.transformer.num_classes=4"],
    "varsr_absolute_positions": ["model.transformer.position_size=37"],
}
VARSR_TINY = ["model=varsr_tiny", "model.schedule.sides=[1,2,4]", "logger=none", "data.crop=16", *TINY_STEPS]


@pytest.mark.parametrize("experiment", OF_VARSR)
def test_varsr_experiments_train_at_test_size(experiment: str, pairs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*VARSR_TINY, f"data.root={pairs / 'hr'}", f"run_dir={run}", "report=null", *VARSR_OWN.get(experiment, [])]
    assert TRAIN.main([f"+experiment={experiment}", *words]) == 0
    assert lines_of(run)[-1]["loss"] > 0
    system = VARSR.from_pretrained(run)
    if system.prefix_encoder is None:
        assert system.make([0]).images_B3HW.shape == (1, 3, 16, 16)
    else:
        assert system.restore(torch.rand(3, 9, 9), 2).image.shape == (3, 18, 18)


STUDENTS = {
    "varsr": ["model=varsr_tiny", "model.schedule.sides=[1,2,4]", "data.crop=16"],
    "hvar": ["model=hvar_tiny", "data.crop=32"],
}


@pytest.mark.parametrize("paper", STUDENTS)
def test_students_of_prefixed_networks_train_at_test_size(paper: str, pairs: Path, tmp_path: Path) -> None:
    tiny = [*STUDENTS[paper], "logger=none", f"data.root={pairs / 'hr'}", *TINY_STEPS]
    experiment = {"varsr": "varsr_isr", "hvar": "hvar"}[paper]
    teacher, run, small = (tmp_path / name for name in ("teacher", "run", "small"))
    assert TRAIN.main([f"+experiment={experiment}", *tiny, f"run_dir={teacher}"]) == 0
    words = ["stages.student.task.perceptual=ms_ssim", f"run_dir={run}"]
    assert TRAIN.main([f"+experiment=dmd_{paper}", *tiny, *words]) == 0
    assert lines_of(run)[-1]["kl"] >= 0
    assert load(run).restore(torch.rand(3, 9, 9), 2).image.shape == (3, 18, 18)
    words = [*STUDENTS[paper], "trainer.max_steps=1", "trainer.batch_size=2", "trainer.num_workers=0"]
    words += [f"model.weights.transformer={teacher}", f"run_dir={small}"]
    words += ["report.metrics=[psnr]", "+report.heldout.crop=32"]
    assert TRAIN.main([f"+experiment=dmd_{paper}_small", *words]) == 0
    rows = json.loads((small / "report.json").read_text())["rows"]
    assert {"multi-step", UNDISTILLED, "one step"} <= {row["method"] for row in rows}


def test_ablations_change_what_they_say(compose: Callable[..., DictConfig]) -> None:
    base = compose("train", "+experiment=dmd_div2k", "data.root=x")
    changes = {
        "ablation_causal": ("model.student.attention", "causal"),
        "ablation_no_kl": ("stages.student.task.weights.kl", 0.0),
        "ablation_full_finetune": ("stages.student.task.trained", "all"),
        "ablation_no_restorer": ("model.restorer", None),
        "ablation_25k": ("trainer.max_steps", 25_000),
        "ablation_reverse_kl": ("stages.student.task.kl.direction", "reverse"),
        "dmd_1024": ("data.crop", 1024),
    }
    for experiment, (key, value) in changes.items():
        cfg = compose("train", f"+experiment={experiment}", "data.root=x")
        assert OmegaConf.select(cfg, key) == value
        assert OmegaConf.select(base, key) != value
        assert cfg.optimizer == base.optimizer


def test_a_missing_weight_file_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_image(tmp_path / "photos" / "a.png", torch.rand(3, 40, 40))
    words = [f"data.root={tmp_path / 'photos'}", f"run_dir={tmp_path / 'run'}", f"weights_dir={tmp_path}"]
    assert TRAIN.main(["+experiment=teacher_512", *words, "logger=none"]) == 2
    assert not (tmp_path / "run").exists()
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "infinity_vae_d32reg.pth" in message
    assert "hub FoundationVision/Infinity" in message
    assert "model.weights.tokenizer" in message
