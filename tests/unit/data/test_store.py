import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from varestorer.data import Mixture, PairedCrops, PhotoCrops
from varestorer.data import store as store_module
from varestorer.data.packing import pack
from varestorer.data.store import ImageStore, changes, contents_of, file_contents
from varestorer.data.text import EncoderRecord, TextWriter
from varestorer.utils.errors import UserError
from varestorer.utils.images import save_image
from varestorer.utils.seeds import torch_generator


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
    check, load = store_module._num_pixels, store_module.load_image
    monkeypatch.setattr(store_module, "_num_pixels", lambda p: looked.append(p.name) or check(p))
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


def photo(path, seed=0, side=16):
    save_image(path, torch.rand(3, side, side, generator=torch_generator(seed)))


@pytest.fixture
def photos(tmp_path):
    for number in range(4):
        photo(tmp_path / "photos" / f"{number}.png", number, 12 + number)
    return tmp_path / "photos"


def crops(root, **options):
    return PhotoCrops(str(root), 8, None, seed=0, **options)


def test_a_folder_that_moved_is_the_same_and_every_change_of_it_is_told(photos, tmp_path):
    before = contents_of(crops(photos))
    assert list(before) == ["0.png", "1.png", "2.png", "3.png"]
    root = tmp_path / "elsewhere"
    shutil.copytree(photos, root)
    assert changes(before, contents_of(crops(root))) is None
    (root / "1.png").rename(root / "b.png")
    (root / "2.png").unlink()
    photo(root / "a.png", 9, 30)
    photo(root / "3.png", 9, 40)
    told = changes(before, contents_of(crops(root)))
    assert told == "1 added (a.png); 1 removed (2.png); 1 renamed (1.png -> b.png); 1 changed (3.png)"


def test_many_are_counted_and_a_few_named():
    told = changes({}, {f"{n}.png": str(n) for n in range(1000)})
    assert told == "1000 added (0.png, 1.png, 2.png, 3.png, 4.png, ...)"


def test_another_order_is_a_change():
    assert changes({"a": "1", "b": "2"}, {"b": "2", "a": "1"}) == "the same files in another order"


def test_both_sides_of_pairs_count(tmp_path):
    photo(tmp_path / "hr" / "a.png", 0, 32)
    photo(tmp_path / "lr" / "a.png", 1, 8)
    before = contents_of(PairedCrops(str(tmp_path), 8, seed=0))
    assert before.keys() == {"hr/a.png", "lr/a.png"}
    (tmp_path / "lr" / "a.png").unlink()
    photo(tmp_path / "lr" / "a.png", 1, 32)
    assert changes(before, contents_of(PairedCrops(str(tmp_path), 8, seed=0))) == "1 changed (lr/a.png)"


def test_shards_of_equal_size_with_other_samples_differ(photos, tmp_path):
    for name in ("a", "b"):
        photo(photos / "new.png" if name == "b" else photos / "nex.png", 5, 14)
        pack(tmp_path / name, photos, 10**9)
        (photos / "nex.png").unlink(missing_ok=True)
    sizes = [(tmp_path / name / "shard-000000.tar").stat().st_size for name in ("a", "b")]
    assert sizes[0] == sizes[1]
    one, other = (contents_of(crops(tmp_path / name, packed=True)) for name in ("a", "b"))
    assert changes(one, other) == "1 changed (shard-000000.tar)"
    assert changes(one, contents_of(crops(tmp_path / "a", packed=True))) is None


def test_texts_count_with_their_encoder(photos, tmp_path):
    def texts(prompt, encoder):
        folder = tmp_path / f"{prompt}-{encoder}"
        writer = TextWriter(folder, EncoderRecord("t5", encoder, 8, "fp16"))
        writer.add({"0.png": prompt, "1.png": "a"}, {name: torch.zeros(1, 2) for name in ("0.png", "1.png")})
        return contents_of(crops(photos, text=str(folder)))

    before = texts("a dog", "f")
    assert changes(before, texts("a cat", "f")) == "1 changed (text of 0.png)"
    assert changes(before, texts("a dog", "g")) == "1 changed (text encoder)"
    assert changes(contents_of(crops(photos)), before).startswith("5 added (text encoder, text of 0.png")


def test_shares_of_a_mixture_and_its_sources_count(photos):
    def mixture(*shares):
        sources = {"one": crops(photos), "two": PhotoCrops(None, 8, None, seed=0)}
        return contents_of(Mixture(sources, dict(zip(sources, shares, strict=True)), 8, seed=0))

    before = mixture(0.9, 0.1)
    assert "one: 0.png" in before and "two: astronaut.png" in before
    assert changes(before, mixture(0.8, 0.2)) == "2 changed (share of one, share of two)"


def test_a_file_that_is_gone_and_a_data_set_that_says_nothing(tmp_path):
    assert file_contents([(tmp_path / "gone.png",)], tmp_path) == {"gone.png": "unreadable"}
    assert contents_of([1, 2]) is None
