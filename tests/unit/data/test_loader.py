from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from varestorer.data import Degradation, PhotoCrops, build_loader
from varestorer.data import store as store_module
from varestorer.utils.errors import UserError


@pytest.fixture
def photos(tmp_path):
    source = np.random.default_rng(0)
    for number in range(5):
        small = Image.fromarray(source.integers(0, 255, (6, 8, 3), np.uint8))
        small.resize((64, 48)).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.fixture
def data(photos):
    return PhotoCrops(str(photos), 24, Degradation(), seed=1)


def take(count, *args, **options):
    return list(islice(build_loader(*args, **options), count))


def same(a, b):
    return (
        a["name"] == b["name"]
        and torch.equal(a["key"], b["key"])
        and torch.equal(a["hq"], b["hq"])
        and torch.equal(a["lq"], b["lq"])
    )


def test_batches_have_the_agreed_form(data):
    batch = take(1, data, 4, start_sample=10)[0]
    assert batch["hq"].shape == batch["lq"].shape == (4, 3, 24, 24)
    assert batch["key"].tolist() == [10, 11, 12, 13] and batch["key"].dtype == torch.int64
    assert len(batch["name"]) == 4 and all(isinstance(name, str) for name in batch["name"])


def test_any_number_of_workers_gives_the_same_pairs(data):
    expected = take(5, data, 3)
    for num_workers in (1, 2):
        batches = take(5, data, 3, num_workers=num_workers)
        assert all(same(a, b) for a, b in zip(batches, expected, strict=True))


def test_resuming_goes_on_where_it_stopped(data):
    whole = take(6, data, 3)  # more than one epoch of five images
    rest = take(3, data, 3, start_sample=9, num_workers=1)
    assert all(same(a, b) for a, b in zip(rest, whole[3:], strict=True))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_global_batch(data, world):
    whole = take(2, data, 2 * world, start_sample=6)
    parts = [take(2, data, 2, start_sample=6, rank=rank, world=world) for rank in range(world)]
    for step in range(2):
        keys = torch.stack([part[step]["key"] for part in parts], dim=1).flatten()
        assert torch.equal(keys, whole[step]["key"])
        images = torch.stack([part[step]["lq"] for part in parts], dim=1).flatten(0, 1)
        assert torch.equal(images, whole[step]["lq"])


def test_stages_without_bad_pictures_look_at_good_ones(photos):
    batch = take(1, PhotoCrops(str(photos), 24, None, seed=0), 2)[0]
    assert torch.equal(batch["lq"], batch["hq"])


def test_loader_leaves_the_global_generator_alone(data):
    before = torch.get_rng_state()
    take(1, data, 2, num_workers=1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_workers_arrive_in_one_clear_line(photos, monkeypatch, num_workers):
    (photos / "2.png").write_bytes(b"broken")
    monkeypatch.setattr(store_module, "HEADERS_TO_CHECK", 0)
    data = PhotoCrops(str(photos), 24, Degradation(), seed=1)
    with pytest.raises(UserError) as caught:
        take(5, data, 2, num_workers=num_workers)
    assert str(caught.value).startswith(f"{photos}: 1 of 5 images are broken")
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 1, "rank": 2, "world": 2}])
def test_impossible_settings(data, options):
    with pytest.raises(ValueError, match="wanted batch_size >= 1"):
        build_loader(data, **options)


def test_workers_share_what_was_read_before_them(data, monkeypatch):
    expected = take(3, data, 3)
    fresh = PhotoCrops(data.store.root, 24, Degradation(), seed=1)
    read = []
    load = store_module.load_image

    def load_before(path):
        if get_worker_info() is not None:
            raise UserError(f"a worker reads {path.name} again")
        read.append(path.name)
        return load(path)

    monkeypatch.setattr(store_module, "load_image", load_before)
    assert all(same(a, b) for a, b in zip(take(3, fresh, 3, num_workers=2), expected, strict=True))
    assert sorted(read) == [f"{number}.png" for number in range(5)]
