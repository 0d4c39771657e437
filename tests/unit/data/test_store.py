import logging

import numpy as np
import pytest
import torch
from PIL import Image

from varestorer.data import store as store_module
from varestorer.data.store import ImageStore
from varestorer.utils.errors import UserError


def make(folder, count, broken=(), side=8):
    """`count` flat pictures whose level is their number; truncated ones where asked."""
    paths = []
    for number in range(count):
        path = folder / f"{number:03d}.png"
        Image.fromarray(np.full((side, side, 3), number, np.uint8)).save(path)
        if number in broken:
            path.write_bytes(path.read_bytes()[:40])
        paths.append((path,))
    return paths


@pytest.fixture
def lazy(monkeypatch):
    """Nothing is looked at in the beginning, as for the far files of a large folder."""
    monkeypatch.setattr(store_module, "HEADERS_TO_CHECK", 0)


def level(images):
    return int(images[0][0, 0, 0])


def test_reads_uint8(tmp_path):
    store = ImageStore(make(tmp_path, 3), "here")
    number, images = store.read(2)
    assert number == 2 and images[0].dtype == torch.uint8 and images[0].shape == (3, 8, 8)
    assert level(images) == 2 and len(store) == 3


@pytest.mark.parametrize("is_lazy", [False, True])
def test_a_broken_file_is_named_once_and_replaced(tmp_path, caplog, request, is_lazy):
    if is_lazy:
        request.getfixturevalue("lazy")
    with caplog.at_level(logging.WARNING):
        store = ImageStore(make(tmp_path, 40, broken=(39, 5)), str(tmp_path))
        assert [level(store.read(n)[1]) for n in (5, 39, 5, 4)] == [6, 0, 6, 4]
    assert [record.getMessage().count(".png") for record in caplog.records] == [1, 1]
    assert "005.png" in caplog.text and "039.png" in caplog.text
    assert [number for number, _ in store.read_all()] == [n for n in range(40) if n not in (5, 39)]


def test_too_many_broken_files_stop_at_the_start(tmp_path):
    with pytest.raises(UserError, match=r"7 of 40 images are broken.*5%.*000.png") as caught:
        ImageStore(make(tmp_path, 40, broken=range(7)), str(tmp_path))
    assert str(tmp_path) in str(caught.value) and str(caught.value).count(".png") == 5


def test_too_many_broken_files_stop_while_reading(tmp_path, lazy):
    store = ImageStore(make(tmp_path, 40, broken=(1, 2, 3)), str(tmp_path))
    with pytest.raises(UserError, match="3 of 40 images are broken"):
        store.read(1)


def test_no_usable_image(tmp_path):
    with pytest.raises(UserError, match="2 of 2 images are broken"):
        ImageStore(make(tmp_path, 2, broken=(0, 1)), str(tmp_path))


def test_one_in_twenty_is_still_allowed(tmp_path):
    assert ImageStore(make(tmp_path, 20, broken=(3,)), "here").read(3)[0] == 4


def test_start_looks_at_a_few_of_many(tmp_path, monkeypatch):
    looked, decoded = [], []
    monkeypatch.setattr(store_module, "HEADERS_TO_CHECK", 5)
    monkeypatch.setattr(store_module, "PIXELS_TO_CHECK", 2 * 64)
    check, load = store_module._check_file, store_module.load_image
    monkeypatch.setattr(store_module, "_check_file", lambda p, b: looked.append(p.name) or check(p, b))
    monkeypatch.setattr(store_module, "load_image", lambda p: decoded.append(p.name) or load(p))
    ImageStore(make(tmp_path, 20), "here")
    assert looked == ["000.png", "004.png", "008.png", "012.png", "016.png"]
    assert decoded == looked[:2]


def test_cache_is_bounded_and_keeps_the_latest(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "CACHE_BYTES", 2 * 3 * 64)
    store = ImageStore(make(tmp_path, 4), "here")
    decoded = []
    load = store_module.load_image
    monkeypatch.setattr(store_module, "load_image", lambda p: decoded.append(int(p.stem)) or load(p))
    for number in (0, 1, 0, 2, 0, 1):
        store.read(number)
    assert decoded == [0, 1, 2, 1]
    monkeypatch.setattr(store_module, "CACHE_BYTES", 1)
    assert level(store.read(3)[1]) == 3


def test_a_small_folder_is_read_before_the_workers_need_it(tmp_path, monkeypatch):
    store = ImageStore(make(tmp_path, 30, broken=(7,)), "here")
    store.read_ahead()
    monkeypatch.setattr(store_module, "load_image", lambda path: pytest.fail(f"{path} is read again"))
    assert [store.read(number)[0] for number in (0, 29, 7)] == [0, 29, 8]


def test_reading_ahead_leaves_a_folder_that_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "CACHE_BYTES", 3 * 3 * 64)
    store = ImageStore(make(tmp_path, 4), "here")
    monkeypatch.setattr(store_module, "load_image", lambda path: pytest.fail(f"{path} is read"))
    store.read_ahead()


def test_reading_ahead_counts_broken_files(tmp_path, lazy):
    with pytest.raises(UserError, match="3 of 40 images are broken"):
        ImageStore(make(tmp_path, 40, broken=(1, 2, 3)), str(tmp_path)).read_ahead()
