"""Text of photographs: the folder of features, data sets and batches with it, and what training makes of them."""

import json
import logging
import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from varestorer.data import BicubicDegradation, PairedCrops, PhotoCrops, build_loader
from varestorer.data.text import (
    EncoderRecord,
    PhotoTexts,
    TextWriter,
    open_texts,
    photograph_names,
    read_captions,
    write_captions,
)
from varestorer.systems.varestorer import VARestorer
from varestorer.training.tasks.teacher import prompts_of
from varestorer.utils.errors import UserError
from varestorer.utils.images import save_image

ENCODER = EncoderRecord("some/encoder", "abc", 512, "fp16")
NAMES = ["a.png", "b.jpg", "c.png", "sub/a.png"]


def features_of(name: str, width: int = 16) -> Tensor:
    """As many rows as the name has letters, of its place in `NAMES`."""
    return torch.full((len(name), width), float(NAMES.index(name)), dtype=torch.float16)


def write_folder(folder: Path, names: list[str] = NAMES) -> Path:
    """Two shards, whatever the names."""
    writer = TextWriter(folder, ENCODER)
    for part in (names[:2], names[2:]):
        writer.add({name: f"text of {name}" for name in part}, {name: features_of(name) for name in part})
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for number, name in enumerate(NAMES):
        save_image(root / name, torch.full((3, 40, 40), number / 8))
    return root


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    root = tmp_path / "pairs"
    for number, name in enumerate(NAMES[:3]):
        save_image(root / "hr" / name, torch.full((3, 40, 40), number / 8))
        save_image(root / "lr" / Path(name).with_suffix(".png"), torch.full((3, 10, 10), number / 8))
    return root


def photo_crops(root: Path, text: Path | None, **options: Any) -> PhotoCrops:
    return PhotoCrops(str(root), 16, BicubicDegradation(), seed=0, text=None if text is None else str(text), **options)


# the folder


def test_features_come_back_as_float32_and_by_name(tmp_path: Path) -> None:
    texts = PhotoTexts(write_folder(tmp_path), NAMES[::-1])
    for index, name in enumerate(NAMES[::-1]):
        features = texts[index]
        assert features is not None and features.dtype == torch.float32
        assert torch.equal(features, features_of(name).float())
    assert len(list((tmp_path / "shards").iterdir())) == 2


def test_features_own_their_memory_whatever_their_type(tmp_path: Path) -> None:
    writer = TextWriter(tmp_path, ENCODER)
    writer.add({"a.png": "a", "b.jpg": "b"}, {"a.png": torch.ones(2, 16), "b.jpg": torch.zeros(90, 16)})
    features = PhotoTexts(tmp_path, ["a.png"])[0]
    assert features is not None and features.untyped_storage().nbytes() == 2 * 16 * 4


def test_names_that_are_not_utf8_have_text_too(tmp_path: Path) -> None:
    name = "Mu\udcf1oz.png"
    TextWriter(tmp_path, ENCODER).add({name: "a man"}, {name: torch.full((2, 16), 3.0)})
    write_captions(tmp_path / "captions.json", {name: "a man"})
    assert TextWriter(tmp_path, ENCODER).pending(read_captions(tmp_path / "captions.json")) == []
    features_TE = PhotoTexts(tmp_path, [name])[0]
    assert features_TE is not None and features_TE.mean() == 3


def test_a_writer_opened_again_asks_only_for_what_is_new_changed_or_lost(tmp_path: Path) -> None:
    write_folder(tmp_path)
    captions = {name: f"text of {name}" for name in NAMES}
    assert TextWriter(tmp_path, ENCODER).pending(captions) == []
    changed = captions | {"b.jpg": "another text", "new.png": "new"}
    assert TextWriter(tmp_path, ENCODER).pending(changed) == ["b.jpg", "new.png"]
    (tmp_path / "shards" / "00001.safetensors").unlink()
    assert TextWriter(tmp_path, ENCODER).pending(captions) == ["c.png", "sub/a.png"]


def test_a_changed_text_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    write_folder(tmp_path)
    TextWriter(tmp_path, ENCODER).add({"b.jpg": "another text"}, {"b.jpg": torch.full((1, 16), 9.0)})
    texts = PhotoTexts(tmp_path, NAMES)
    assert torch.equal(texts[1], torch.full((1, 16), 9.0))
    assert torch.equal(texts[0], features_of("a.png").float())


def test_the_empty_text_is_the_null_text_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = TextWriter(tmp_path, ENCODER)
    writer.add({"a.png": "", "b.jpg": "b"}, {"b.jpg": features_of("b.jpg")})
    assert TextWriter(tmp_path, ENCODER).pending({"a.png": ""}) == []
    texts = PhotoTexts(tmp_path, ["a.png", "b.jpg"])
    assert texts[0] is None and texts[1] is not None
    assert not caplog.records


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        (EncoderRecord("some/encoder", "other", 512, "fp16"), r"another text_encoder \(some/encoder\)"),
        (EncoderRecord("some/encoder", "abc", 77, "bf16"), r"another max_length \(512\), dtype \(fp16\)"),
    ],
)
def test_a_folder_of_another_encoder_is_not_mixed(tmp_path: Path, encoder: EncoderRecord, words: str) -> None:
    write_folder(tmp_path)
    with pytest.raises(UserError, match=words):
        TextWriter(tmp_path, encoder)


@pytest.mark.parametrize("content", ["[1]", "{", "{}", '{"encoder": {}, "images": {"a.png": {"prompt": "a"}}}'])
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json.*wanted the index of text features"):
        PhotoTexts(tmp_path, NAMES)


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/index\.json does not exist.*precompute_text"):
        PhotoTexts(tmp_path / "nowhere", NAMES)


def test_a_missing_or_damaged_shard_is_named(tmp_path: Path) -> None:
    texts = PhotoTexts(write_folder(tmp_path), NAMES)
    shard = tmp_path / "shards" / "00001.safetensors"
    shard.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"c\.png in .*00001\.safetensors"):
        texts[2]
    shard.unlink()
    with pytest.raises(UserError, match=r"00001\.safetensors is missing"):
        PhotoTexts(tmp_path, NAMES)


def test_photographs_without_text_are_counted_and_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path, NAMES[:2])
    with caplog.at_level(logging.WARNING):
        texts = PhotoTexts(tmp_path, NAMES)
    assert [texts[index] is None for index in range(4)] == [False, False, True, True]
    (record,) = caplog.records
    assert "no text for 2 of 4 photographs (c.png, sub/a.png)" in record.message


def test_a_folder_of_other_photographs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"text for none of the photographs \(x\.png\)"):
        PhotoTexts(write_folder(tmp_path), ["x.png"])


def test_open_files_do_not_travel_to_workers(tmp_path: Path) -> None:
    texts = PhotoTexts(write_folder(tmp_path), NAMES)
    assert texts[0] is not None
    copied = pickle.loads(pickle.dumps(texts))
    assert torch.equal(copied[3], features_of("sub/a.png").float())


def test_names_do_not_tell_how_the_root_was_given(pairs: Path) -> None:
    paths = sorted((pairs / "hr").iterdir())
    assert photograph_names(pairs, paths) == photograph_names(pairs / "hr", paths) == NAMES[:3]


def test_captions_are_read_as_they_were_written(tmp_path: Path) -> None:
    captions = {"a.png": "a dog, “on” grass", "b.png": ""}
    write_captions(tmp_path / "captions.json", captions)
    assert read_captions(tmp_path / "captions.json") == captions
    (tmp_path / "other.json").write_text(json.dumps({"a.png": ["a dog"]}))
    with pytest.raises(UserError, match=r"other\.json: wanted .*'a\.png' is no text"):
        read_captions(tmp_path / "other.json")


# data sets and batches


@pytest.mark.parametrize("kind", ["folder", "pairs"])
def test_samples_carry_the_text_of_their_photograph(kind: str, photos: Path, pairs: Path, tmp_path: Path) -> None:
    text = str(write_folder(tmp_path / "text"))
    data = photo_crops(photos, Path(text)) if kind == "folder" else PairedCrops(str(pairs), 16, seed=0, text=text)
    for n in range(len(data)):
        sample = data[n]
        number = round(float(sample["hq"].mean()) * 8)
        assert torch.equal(sample["text"], features_of(NAMES[number]).float())


def test_without_a_folder_of_text_samples_and_batches_have_none(photos: Path) -> None:
    data = photo_crops(photos, None)
    assert "text" not in data[0]
    assert "text" not in next(iter(build_loader(data, 2)))


def test_embedded_photographs_have_no_text(tmp_path: Path) -> None:
    assert open_texts(None, None, []) is None
    with pytest.raises(UserError, match=r"data\.text=.* needs data\.root"):
        PhotoCrops(None, 16, None, seed=0, text=str(write_folder(tmp_path)))


def test_texts_depend_on_the_position_alone(photos: Path, tmp_path: Path) -> None:
    data = photo_crops(photos, write_folder(tmp_path / "text", NAMES[:3]))
    expected = list(islice(build_loader(data, 3), 4))
    assert sum(text is None for batch in expected for text in batch["text"]) == 3
    again = islice(build_loader(data, 3, num_workers=2), 4)
    resumed = islice(build_loader(photo_crops(photos, tmp_path / "text"), 3, start_sample=6, num_workers=1), 2)
    for batches, wanted in ((again, expected), (resumed, expected[2:])):
        for batch, other in zip(batches, wanted, strict=True):
            pairs = zip(batch["text"], other["text"], strict=True)
            assert all(a is b if b is None else torch.equal(a, b) for a, b in pairs)


def test_a_damaged_shard_met_by_a_worker_is_one_clear_line(photos: Path, tmp_path: Path) -> None:
    data = photo_crops(photos, write_folder(tmp_path / "text"))
    (tmp_path / "text" / "shards" / "00000.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"^data\.text: cannot read the features of .*00000\.safetensors"):
        list(islice(build_loader(data, 4, num_workers=1), 1))


@pytest.mark.parametrize("kind", ["folder", "pairs"])
def test_configs_take_a_folder_of_text(
    kind: str, compose: Callable[..., DictConfig], photos: Path, pairs: Path, tmp_path: Path
) -> None:
    root = photos if kind == "folder" else pairs
    words = [f"data={kind}", f"data.root={root}", "data.crop=16"]
    assert compose("train", *words).data.text is None
    data = instantiate(compose("train", *words, f"data.text={write_folder(tmp_path / 'text')}").data)
    assert data[0]["text"].shape[1] == 16


# what training makes of them


def batch_of(*texts: Tensor | None) -> dict[str, Any]:
    return {"key": torch.arange(len(texts)), "text": list(texts)}


def test_a_sample_without_text_gets_all_of_the_null_text(tiny_system: VARestorer) -> None:
    with torch.no_grad():
        tiny_system.transformer.condition.null_features.normal_()
    text = prompts_of(batch_of(None, torch.ones(2, 16), None), tiny_system, 0.0, seed=0)
    null = tiny_system.transformer.condition.null_features
    assert text.lengths == (3, 2, 3)
    rows = text.to_list()
    assert torch.equal(rows[0], null) and torch.equal(rows[2], null) and torch.equal(rows[1], torch.ones(2, 16))


def test_a_batch_without_any_text_is_the_null_batch(tiny_system: VARestorer) -> None:
    text, null = prompts_of(batch_of(None, None), tiny_system, 0.1, seed=0), tiny_system.null_text(2)
    assert torch.equal(text.features_BTE, null.features_BTE) and text.lengths == null.lengths
    without = prompts_of({"key": torch.arange(2)}, tiny_system, 0.1, seed=0)
    assert torch.equal(without.features_BTE, null.features_BTE)


def test_dropped_prompts_become_null_text_of_their_length(tiny_system: VARestorer) -> None:
    with torch.no_grad():
        tiny_system.transformer.condition.null_features.normal_()
    given = [torch.ones(2, 16), torch.ones(5, 16)]  # longer than the model's null text of three rows
    text = prompts_of(batch_of(*given), tiny_system, 1.0, seed=0)
    null = tiny_system.transformer.condition.null_features
    assert text.lengths == (2, 3)
    assert torch.equal(text.to_list()[0], null[:2]) and torch.equal(text.to_list()[1], null)
    kept = prompts_of(batch_of(*given), tiny_system, 0.0, seed=0)
    assert kept.lengths == (2, 5)


def test_a_tenth_of_the_prompts_is_dropped_by_sample(tiny_system: VARestorer) -> None:
    batch = batch_of(*[torch.ones(2, 16)] * 400)

    def dropped(batch: dict[str, Any], seed: int) -> list[bool]:
        return [not torch.equal(row, torch.ones(2, 16)) for row in prompts_of(batch, tiny_system, 0.1, seed).to_list()]

    whole = dropped(batch, 0)
    assert 20 < sum(whole) < 60
    part = {"key": batch["key"][100:200], "text": batch["text"][100:200]}
    assert dropped(part, 0) == whole[100:200]
    assert dropped(batch, 1) != whole


def test_prompts_go_to_the_device_of_the_model(tiny_system: VARestorer) -> None:
    text = prompts_of(batch_of(None, torch.ones(2, 16)), tiny_system.to("meta"), 0.1, seed=0)
    assert text.features_BTE.device.type == "meta"


def test_features_of_another_width_are_refused(tiny_system: VARestorer) -> None:
    with pytest.raises(UserError, match=r"data\.text holds features of width 32, but the model wants 16"):
        prompts_of(batch_of(None, torch.ones(2, 32)), tiny_system, 0.1, seed=0)
