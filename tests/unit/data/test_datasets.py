from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from varestorer.data import BicubicDegradation, Degradation, PairedCrops, PhotoCrops, heldout_pairs
from varestorer.data.datasets import EpochOrder, draw_box, fill_square, random_square
from varestorer.utils.errors import UserError
from varestorer.utils.images import load_image, resize, save_image

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def position_picture(height, width):
    """Red is the row, green the column: a crop tells where it came from."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows, columns, np.full_like(rows, 7)], axis=2).astype(np.uint8)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def photos(tmp_path):
    for number in range(5):
        write(tmp_path / f"{number}.png", position_picture(60 + number, 90))
    return tmp_path


@pytest.fixture
def pairs(tmp_path):
    """Pairs whose bad side is the good one's area mean."""
    for number in range(3):
        noise = torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(number))
        high = torch.nn.functional.interpolate(noise[None, :, ::8, ::8], (48, 64), mode="bilinear")[0]
        save_image(tmp_path / "hr" / f"{number}.png", high)
        save_image(tmp_path / "lr" / f"{number}.png", torch.nn.functional.avg_pool2d(high, 4))
    return tmp_path


def same(a, b):
    return a["name"] == b["name"] and torch.equal(a["hq"], b["hq"]) and torch.equal(a["lq"], b["lq"])


def test_every_epoch_shows_every_image_once_in_a_new_order():
    order = EpochOrder(20, seed=3)
    epochs = [[order[20 * epoch + n] for n in range(20)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert EpochOrder(20, seed=3)[45] == epochs[2][5]
    assert [EpochOrder(20, seed=4)[n] for n in range(20)] != epochs[0]


def test_samples_are_functions_of_their_number(photos):
    data = PhotoCrops(str(photos), 32, Degradation(), seed=5)
    first = [data[n] for n in range(12)]
    again = PhotoCrops(str(photos), 32, Degradation(), seed=5)
    assert all(same(first[n], again[n]) for n in reversed(range(12)))
    assert not same(first[0], PhotoCrops(str(photos), 32, Degradation(), seed=6)[0])
    assert len(data) == 5 and sorted(sample["name"] for sample in first[:5]) == list("01234")


def test_hidden_colors_and_pictures_are_not_trained_on(tmp_path):
    """Green is visible, red is not, and the last picture is red alone."""
    for number in range(20):
        pixels = np.zeros((48, 48, 4), np.uint8)
        pixels[...] = 255, 0, 0, 0
        pixels[8:40, 8:40] = 0, 200, 0, 255 if number < 19 else 0
        write(tmp_path / f"{number:02d}.png", pixels)
    data = PhotoCrops(str(tmp_path), 16, BicubicDegradation(4), seed=0)
    samples = [data[n] for n in range(40)]
    assert "19" not in {sample["name"] for sample in samples}
    assert max(float(sample[side][0].max()) for sample in samples for side in ("hq", "lq")) == 0
    assert min(float(sample["hq"][1].min()) for sample in samples) > 0.78


def test_sample_form(photos):
    sample = PhotoCrops(str(photos), 32, Degradation(), seed=0)[7]
    assert sample["key"] == 7
    for side in ("hq", "lq"):
        assert sample[side].shape == (3, 32, 32) and sample[side].dtype == torch.float32
        assert 0 <= sample[side].min() and sample[side].max() <= 1
    levels = sample["lq"] * 255
    assert torch.allclose(levels, levels.round(), atol=1e-4)


def test_crops_are_windows_all_over_the_picture_and_half_are_mirrored(photos):
    data = PhotoCrops(str(photos), 32, BicubicDegradation(), seed=0)
    corners, mirrored = [], 0
    for n in range(80):
        rows, columns, _ = (data[n]["hq"] * 255).round().int()
        assert torch.equal(rows - rows[0, 0], torch.arange(32).int()[:, None].expand(32, 32))
        step = int(columns[0, 1] - columns[0, 0])
        assert abs(step) == 1 and torch.equal(columns[:, 0], columns[0, 0].expand(32))
        corners.append((int(rows[0, 0]), int(columns.min())))
        mirrored += step < 0
    tops, lefts = zip(*corners, strict=True)
    assert min(tops) < 5 and max(tops) > 22 and min(lefts) < 8 and max(lefts) > 50
    assert 25 < mirrored < 55
    plain = PhotoCrops(str(photos), 32, BicubicDegradation(), seed=0, use_flip=False)
    assert all(plain[n]["hq"][1, 0, 1] > plain[n]["hq"][1, 0, 0] for n in range(20))


def test_downscale_shows_more_of_the_scene(photos):
    data = PhotoCrops(str(photos), 20, BicubicDegradation(), seed=0, downscale=[1, 2], use_flip=False)
    spans = [float(s["hq"][1, 0, -4] - s["hq"][1, 0, 3]) * 255 / 13 for s in (data[n] for n in range(60))]
    assert min(spans) > 0.95 and max(spans) < 2.05
    assert min(spans) < 1.15 and max(spans) > 1.85


def test_zoom_never_asks_for_more_than_there_is(photos):
    data = PhotoCrops(str(photos), 50, BicubicDegradation(), seed=0, downscale=[2, 3], use_flip=False)
    rows = data[0]["hq"][0, :, 0]
    assert (rows.diff() > 0).all()  # no reflection


@pytest.mark.parametrize("size", [(10, 90), (90, 10), (10, 12), (1, 1)])
def test_small_photographs_are_continued(size):
    photo = torch.from_numpy(position_picture(*size)).permute(2, 0, 1)
    square = random_square(photo, 64, np.random.default_rng(0))
    assert square.shape == (3, 64, 64)
    values = set((square[0] * 255).round().int().unique().tolist())
    assert values == set(range(size[0])) or size[0] > 64


def test_boxes_reach_every_place():
    rng = np.random.default_rng(0)
    boxes = {draw_box((5, 9), 4, rng) for _ in range(300)}
    assert boxes == {(top, left, 4, 4) for top in range(2) for left in range(6)}
    assert draw_box((3, 9), 4, rng)[2:] == (3, 4)
    assert fill_square(torch.zeros(3, 2, 7), 7).shape == (3, 7, 7)


def test_broken_file_is_replaced_the_same_way_every_time(tmp_path):
    for number in range(24):
        write(tmp_path / f"{number}.png", position_picture(40, 40))
    (tmp_path / "3.png").write_bytes(b"not a picture")
    first = PhotoCrops(str(tmp_path), 16, BicubicDegradation(), seed=0)
    names = [first[n]["name"] for n in range(24)]
    again = PhotoCrops(str(tmp_path), 16, BicubicDegradation(), seed=0)
    assert [again[n]["name"] for n in reversed(range(24))] == names[::-1]
    assert "3" not in names and names.count("4") == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"crop": 0}, "data.crop"),
        ({"crop": 8, "downscale": [0.5, 2]}, "data.downscale"),
        ({"crop": 8, "downscale": [2]}, "data.downscale"),
    ],
)
def test_wrong_options(photos, options, words):
    with pytest.raises(UserError, match=words):
        PhotoCrops(str(photos), degradation=BicubicDegradation(), seed=0, **options)


def test_paired_crops_fit_together(pairs):
    data = PairedCrops(str(pairs), 32, seed=0)
    assert len(data) == 3
    for n in range(12):
        sample = data[n]
        assert sample["hq"].shape == sample["lq"].shape == (3, 32, 32) and sample["key"] == n
        error = (sample["hq"] - sample["lq"]).abs().mean()
        assert error < 0.05
        shifted = (sample["hq"].roll(4, -1) - sample["lq"])[..., 4:].abs().mean()
        assert shifted > 1.5 * error
    assert same(data[2], PairedCrops(str(pairs), 32, seed=0)[2])


def test_pairs_smaller_than_the_crop(pairs):
    sample = PairedCrops(str(pairs), 80, seed=0)[0]
    assert sample["hq"].shape == sample["lq"].shape == (3, 80, 80)
    assert (sample["hq"] - sample["lq"]).abs().mean() < 0.05


def test_pairs_of_equal_size_are_taken_as_they_are(pairs):
    for path in (pairs / "hr").iterdir():
        save_image(pairs / "lr" / path.name, load_image(path) / 2)
    sample = PairedCrops(str(pairs), 32, seed=0)[0]
    assert torch.allclose(sample["lq"] * 2, sample["hq"], atol=1.1 / 255)


def test_pairs_of_wrong_size_are_named(pairs):
    save_image(pairs / "lr" / "1.png", torch.zeros(3, 12, 15))
    data = PairedCrops(str(pairs), 32, seed=0)
    with pytest.raises(UserError, match=r"hr/1.png is 64x48.*lr/1.png, 15x12, or 4 times"):
        [data[n] for n in range(3)]
    with pytest.raises(UserError, match="multiple of scale 4, got 30"):
        PairedCrops(str(pairs), 30, seed=0)


def test_benchmark_pairs(shared):
    data = PairedCrops(str(shared / "benchmarks" / "realsr"), 128, seed=0)
    sample = data[0]
    assert len(data) == 100 and (sample["hq"] - sample["lq"]).abs().mean() < 0.1
    real = heldout_pairs(str(shared / "benchmarks" / "realsr"), limit=2)
    assert [sample["hq"].shape for sample in real] == [(3, 512, 512)] * 2 == [s["lq"].shape for s in real]
    assert [sample["key"] for sample in real] == [0, 50]


def test_embedded_training_pairs():
    data = PhotoCrops(None, 48, Degradation(), seed=0)
    names = sorted(data[n]["name"] for n in range(6))
    assert names == ["astronaut", "chelsea", "flower", "motorcycle_left", "motorcycle_right", "rocket"]
    assert data[0]["lq"].shape == (3, 48, 48)


def test_heldout_embedded_pairs_are_whole_and_fixed():
    first = heldout_pairs(None, degradation=Degradation(), seed=1)
    assert [sample["name"] for sample in first] == ["china", "coffee"]
    assert [tuple(sample["hq"].shape) for sample in first] == [(3, 424, 640), (3, 400, 600)]
    again = heldout_pairs(None, degradation=Degradation(), seed=1, limit=1)
    assert len(again) == 1 and same(first[0], again[0])
    other = heldout_pairs(None, crop=64, degradation=Degradation(), seed=2)
    assert other[0]["hq"].shape == other[0]["lq"].shape == (3, 64, 64)
    assert torch.equal(other[1]["hq"], first[1]["hq"][:, 168:232, 268:332])


def test_heldout_of_a_folder(photos):
    pairs = heldout_pairs(str(photos), degradation=BicubicDegradation(), limit=2)
    assert [(sample["name"], sample["key"]) for sample in pairs] == [("0", 0), ("2", 2)]
    assert pairs[1]["hq"].shape == (3, 60, 88)
    square = heldout_pairs(str(photos), crop=100, degradation=BicubicDegradation())[0]
    assert square["hq"].shape == (3, 100, 100)
    with pytest.raises(UserError, match="need a degradation"):
        heldout_pairs(None)
    with pytest.raises(UserError, match="multiple of scale"):
        heldout_pairs(str(photos), crop=33, degradation=BicubicDegradation())


@pytest.mark.parametrize("name", ["embedded", "folder"])
def test_configs_build_photo_crops(photos, name):
    config = OmegaConf.create(
        {
            "seed": 9,
            "degradation": OmegaConf.load(CONFIGS / "degradation" / "realesrgan.yaml"),
            "data": OmegaConf.load(CONFIGS / "data" / f"{name}.yaml"),
        }
    )
    config.data.crop = 16
    config.data.downscale = [1, 1.5]
    if name == "folder":
        assert OmegaConf.is_missing(config.data, "root")
        config.data.root = str(photos)
    data = instantiate(config.data)
    assert data.seed == 9 and data.degradation == Degradation() and data.downscale == (1, 1.5)
    assert data[0]["hq"].shape == (3, 16, 16)


def test_config_builds_paired_crops(pairs):
    config = OmegaConf.create({"seed": 9, "data": OmegaConf.load(CONFIGS / "data" / "pairs.yaml")})
    config.data.root, config.data.crop = str(pairs), 16
    assert instantiate(config.data)[0]["hq"].shape == (3, 16, 16)


def test_zooming_out_is_by_lanczos():
    photo = (torch.rand(3, 48, 48, generator=torch.Generator().manual_seed(0)) * 255).byte()
    square = random_square(photo, 24, np.random.default_rng(0), downscale=(2, 2))
    assert torch.allclose(square, resize(photo.float() / 255, (24, 24), "lanczos"), atol=1e-6)
