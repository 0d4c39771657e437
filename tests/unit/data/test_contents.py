"""What a data set says of its files, texts and shares, and how two such lists differ in words."""

import shutil

import pytest
import torch

from varestorer.data import Mixture, PairedCrops, PhotoCrops
from varestorer.data.packing import pack
from varestorer.data.store import changes, contents_of, file_contents
from varestorer.data.text import EncoderRecord, TextWriter
from varestorer.utils.images import save_image
from varestorer.utils.seeds import torch_generator


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
