"""Degrading by batches on a device, seen from data sets and loaders."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from varestorer.data import BicubicDegradation, Degradation, PhotoCrops, build_loader
from varestorer.data import loader as loader_module
from varestorer.data.degradation.pipeline import carry_out
from varestorer.data.packing import pack
from varestorer.data.speed import LoaderSpeed, loader_report, measure_loader
from varestorer.utils.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(4):
        small = Image.fromarray(np.random.default_rng(number).integers(0, 255, (6, 8, 3), np.uint8))
        small.resize((64, 48)).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


def data(photos, **options):
    return PhotoCrops(str(photos), 32, Degradation(), seed=2, **{"degrade_on": "device", **options})


def take(count, *args, **options):
    return list(islice(build_loader(*args, **options), count))


def test_both_ways_draw_the_same(photos):
    """Sample by sample the same good picture, and a bad one as bad."""
    on_device = take(3, data(photos), 8, device="cpu")
    on_workers = take(3, data(photos, degrade_on="workers"), 8, device="cpu")
    errors = []
    for a, b in zip(on_device, on_workers, strict=True):
        assert a.keys() == b.keys() and torch.equal(a["hq"], b["hq"]) and torch.equal(a["key"], b["key"])
        assert a["lq"].shape == b["lq"].shape and not torch.equal(a["lq"], b["lq"])
        errors.append(torch.stack([(x["lq"] - x["hq"]).square().mean((1, 2, 3)).sqrt() for x in (a, b)]))
    assert torch.corrcoef(torch.cat(errors, dim=1))[0, 1] > 0.9


def test_plans_are_those_of_the_cpu(photos):
    plan = data(photos).planned(5)["plan"]
    assert plan.enlarge.size == (32, 32) and plan.shrink.size == (8, 8)
    sample = data(photos)[5]
    assert torch.equal(carry_out(plan, sample["hq"]), sample["lq"])
    assert plan.noise1 != data(photos).planned(6)["plan"].noise1


def test_batches_are_functions_of_the_position(photos):
    whole = take(4, data(photos), 3, device="cpu")
    rest = take(2, data(photos), 3, start_sample=6, num_workers=2, device="cpu")
    assert all(torch.equal(a["lq"], b["lq"]) for a, b in zip(rest, whole[2:], strict=True))


def test_processes_share_the_global_batch_up_to_float_rounding(photos):
    whole = take(1, data(photos), 6, device="cpu")[0]
    parts = [take(1, data(photos), 3, rank=rank, world=2, device="cpu")[0] for rank in range(2)]
    together = torch.stack([part["lq"] for part in parts], dim=1).flatten(0, 1)
    assert 255 * (together - whole["lq"]).abs().mean() < 0.1


def test_a_loader_without_a_fit_device_lets_workers_degrade(photos, monkeypatch):
    monkeypatch.setattr(loader_module, "degrade", None)
    for device in (None, "mps"):
        batch = take(1, data(photos), 2, device=device)[0]
        assert torch.equal(batch["lq"], take(1, data(photos, degrade_on="workers"), 2)[0]["lq"])
    sample = data(photos)[3]
    assert "plan" not in sample and not torch.equal(sample["hq"], sample["lq"])


def test_stages_without_bad_pictures_are_not_touched(photos):
    clean = PhotoCrops(str(photos), 32, None, seed=0)
    batch = take(1, clean, 2, device="cpu")[0]
    assert torch.equal(batch["lq"], batch["hq"]) and "plan" not in batch


def test_settings_that_cannot_be(photos):
    with pytest.raises(UserError, match="degrade_on must be one of workers, device, got 'gpu'"):
        data(photos, degrade_on="gpu")
    with pytest.raises(UserError, match="degrade_on=device needs degradation=realesrgan"):
        PhotoCrops(str(photos), 32, BicubicDegradation(), seed=0, degrade_on="device")


@pytest.mark.parametrize("name", ["folder", "shards", "embedded"])
def test_configs_say_where_to_degrade(photos, tmp_path, name):
    pack(tmp_path / "out", photos, 10**9)
    config = OmegaConf.create({"seed": 9, "data": OmegaConf.load(CONFIGS / "data" / f"{name}.yaml")})
    config.degradation = OmegaConf.load(CONFIGS / "degradation" / "realesrgan.yaml")
    config.data.crop, config.data.degrade_on = 16, "device"
    if name != "embedded":
        config.data.root = str(photos if name == "folder" else tmp_path / "out")
    built = instantiate(config.data)
    assert built.planned(0)["plan"].enlarge.size == (16, 16)
    assert OmegaConf.load(CONFIGS / "data" / f"{name}.yaml").degrade_on == "workers"


def test_the_speed_of_both_ways_is_measured(photos):
    speed = measure_loader(str(photos), crop=32, count=2, batch_size=2)
    assert min(speed.workers, speed.workers_device, speed.device) > 0 and speed.crop == 32
    assert any("cores" in line for line in loader_report(str(photos), crop=32, pairs=2))
    with pytest.raises(UserError, match="at least the batch size 8, got 4"):
        measure_loader(str(photos), crop=32, count=4)


def test_cores_follow_from_the_step_time():
    speed = LoaderSpeed(crop=512, workers=10.0, workers_device=200.0, device=1000.0, device_name="cuda")
    assert speed.cores(pairs=32, seconds=0.5) == (7, 1)
    text = "\n".join(speed.lines(32, 0.5))
    assert "64.0 pairs a second" in text and "6.4% more time a step" in text
