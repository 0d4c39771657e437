"""Scores of free-running pictures while a stage trains: where they go, what may be missing, the best checkpoint."""

import json
import logging
from pathlib import Path

import pytest
import torch
from offline_wandb import history, wandb_records
from torch import Tensor
from toy_training import ADAMW, ToyPairs, ToySystem, ToyTask, config, metrics

from varestorer.data.loader import collate
from varestorer.training import scores as scores_module
from varestorer.training.config import TrainerConfig
from varestorer.training.fit import fit, make_accelerator
from varestorer.training.run import Run
from varestorer.training.scores import ImageScores
from varestorer.utils.errors import UsageError
from varestorer.utils.iqa import Metric, MetricUnavailableError
from varestorer.utils.iqa_weights import missing_weights
from varestorer.utils.loggers import open_wandb

BATCHES = [collate([ToyPairs(9)[n] for n in numbers]) for numbers in ((0, 1, 2), (3,))]


def brightness(image: Tensor) -> Tensor:
    """Stands for MUSIQ, whose weights tests do not have."""
    return 100 * image.mean(dim=(1, 2, 3))


@pytest.fixture
def metrics_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    real = scores_module.create_metric

    def create(name: str, device: torch.device | str = "cpu") -> Metric:
        if name == "musiq":
            return Metric(name, brightness, needs_reference=False, lower_is_better=False)
        if name == "clipiqa":
            raise MetricUnavailableError("metric 'clipiqa' needs RN50.pt in checkpoints")
        return real(name, device=device)

    monkeypatch.setattr(scores_module, "create_metric", create)


def train(folder: Path, cfg: TrainerConfig, names: list[str], logger=None) -> ToySystem:
    torch.manual_seed(5)
    system = ToySystem()
    task = ToyTask(system)
    task.name = "toy"
    run = Run(folder, make_accelerator("cpu"), seed=1, logger=logger)
    fit(task, ToyPairs(), cfg, ADAMW, run, preview=BATCHES[0], validation=BATCHES, scores=ImageScores(names))
    run.logger.finish()
    return system


def test_what_is_logged_is_the_score_of_what_the_averaged_weights_make(tmp_path: Path, metrics_at_hand: None) -> None:
    system = train(tmp_path, config(validate_every=3), ["psnr", "musiq"])
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines if "val/musiq" in line] == [3, 6, 8]
    batch = collate([ToyPairs(9)[n] for n in range(4)])
    with torch.no_grad():
        saved = (system(batch["lq"]).clamp(0, 1) * 255).round() / 255
    hq = (batch["hq"] * 255).round() / 255
    psnr = -10 * (saved - hq).square().mean(dim=(1, 2, 3)).log10()
    assert lines[-1]["val/psnr"] == pytest.approx(psnr.mean().item(), abs=1e-3)
    assert lines[-1]["val/musiq"] == pytest.approx(brightness(saved).mean().item(), rel=1e-4)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["toy_000003.png", "toy_000006.png", "toy_000008.png"]


def test_a_metric_that_cannot_run_is_one_warning_and_missing_afterwards(
    tmp_path: Path, metrics_at_hand: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        train(tmp_path, config(validate_every=2, keep_best="clipiqa"), ["psnr", "clipiqa", "lpips"])
    warnings = [record.getMessage() for record in caplog.records if "without val/" in record.getMessage()]
    assert len(warnings) == (1 if missing_weights("lpips") else 2)  # no weights; lpips: or pictures of 4 pixels
    assert sum("metric 'clipiqa' needs RN50.pt" in line for line in warnings) == 1
    assert all(not {"val/clipiqa", "val/lpips"} & line.keys() for line in metrics(tmp_path))
    assert "val/psnr" in metrics(tmp_path)[-1]


@pytest.mark.parametrize("name", ["musiq", "val/musiq"])
def test_the_best_by_a_score_is_the_highest(tmp_path: Path, metrics_at_hand: None, name: str) -> None:
    train(tmp_path, config(checkpoint_every=2, keep_last=1, validate_every=2, keep_best=name), ["musiq"])
    values = {line["step"]: line["val/musiq"] for line in metrics(tmp_path) if "val/musiq" in line}
    best = json.loads((tmp_path / "checkpoints/toy/best").read_text())
    step = max(values, key=lambda step: values[step])
    assert (best["checkpoint"], best["metric"], best["mode"]) == (f"step_{step:06d}", "val/musiq", "max")
    assert best["value"] == pytest.approx(values[step])


def test_names_that_are_no_scores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pyiqa has no metric 'psrn'; did you mean psnr"):
        ImageScores(["psrn"])
    with pytest.raises(UsageError, match="scores=fid compares folders"):
        ImageScores(["fid"])
    with pytest.raises(UsageError, match="no trainer.keep_best=niqe; it has"):
        train(tmp_path, config(validate_every=1, keep_best="niqe"), ["psnr"])


def test_pictures_with_nan_have_nan_for_a_score(metrics_at_hand: None) -> None:
    bad, good = torch.full((1, 3, 8, 8), torch.nan), torch.zeros(1, 3, 8, 8)
    found = ImageScores(["psnr", "musiq"])({"": (bad, good), "_4": (good, good)})
    assert found["psnr"].isnan() and found["musiq"].isnan() and found["musiq_4"] == 0


@pytest.mark.usefixtures("offline")
def test_an_offline_wandb_run_holds_scores_and_pictures(tmp_path: Path, metrics_at_hand: None) -> None:
    train(tmp_path, config(validate_every=4, max_steps=4), ["psnr", "musiq"], open_wandb(tmp_path, {}))
    rows = history(wandb_records(tmp_path))
    (scored,) = [row for row in rows if "toy/val/musiq" in row]
    (line,) = [line for line in metrics(tmp_path) if "val/musiq" in line]
    for key in ("val/musiq", "val/psnr", "val/loss"):
        assert scored[f"toy/{key}"] == pytest.approx(line[key])
    (picture,) = [row["toy/samples/path"] for row in rows if "toy/samples/path" in row]
    assert next(tmp_path.glob(f"wandb/offline-run-*/files/{picture}")).is_file()
