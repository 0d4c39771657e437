"""Text encoder and captioner, with real transformers classes of random tiny size saved to a folder."""

import gc
import json
import logging
import os
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from local_hub import serving
from text_models import save_blip, save_t5

from varestorer.conditioning.captioner import Captioner
from varestorer.conditioning.pretrained import fingerprint, local_folder
from varestorer.conditioning.text_encoder import TextEncoder, add_positive_prompt
from varestorer.utils.errors import UserError
from varestorer.utils.files import cache_folder

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the features that a test's encoders remember."""
    monkeypatch.setenv("VARESTORER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/text"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders from which a T5 encoder was loaded, one entry a load."""
    seen: list[str] = []
    real = transformers.T5EncoderModel.from_pretrained

    def counted(path: str, **options):
        seen.append(path)
        return real(path, **options)

    monkeypatch.setattr(transformers.T5EncoderModel, "from_pretrained", counted)
    return seen


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_blip(tmp_path_factory.mktemp("blip"))


def test_rows_are_those_of_the_real_tokens_and_do_not_depend_on_padding(t5_folder: Path) -> None:
    encoder = TextEncoder(str(t5_folder))
    dog, empty = encoder.encode(["a dog on grass", ""])
    assert dog.shape == (5, 16) and empty.shape == (1, 16)
    assert dog.dtype == torch.float32 and not dog.requires_grad
    torch.testing.assert_close(encoder.encode(["a dog on grass"])[0], dog)


def test_padding_to_512_as_released_gives_the_same_rows(t5_folder: Path) -> None:
    tokens = transformers.AutoTokenizer.from_pretrained(t5_folder, legacy=True)(
        ["a dog"], max_length=512, padding="max_length", truncation=True, return_tensors="pt"
    )
    model = transformers.T5EncoderModel.from_pretrained(t5_folder).eval()
    with torch.no_grad():
        want = model(**tokens).last_hidden_state[0, : int(tokens.attention_mask.sum())]
    torch.testing.assert_close(TextEncoder(str(t5_folder)).encode(["a dog"])[0], want, atol=1e-5, rtol=0)


def test_long_prompts_are_cut_and_no_prompt_needs_no_model(t5_folder: Path, tmp_path: Path) -> None:
    encoder = TextEncoder(str(t5_folder), max_length=8)
    assert encoder.encode(["dog " * 50])[0].shape == (8, 16)
    assert TextEncoder(str(tmp_path / "nothing")).encode([]) == []


def test_it_loads_once_and_only_when_needed(t5_folder: Path, loads: list[str]) -> None:
    encoder = TextEncoder(str(t5_folder), cache=None)
    assert loads == []
    first = encoder.encode(["a dog"])
    encoder.encode(["a"])
    assert len(loads) == 1
    encoder.release()
    assert torch.equal(encoder.encode(["a dog"])[0], first[0])
    assert len(loads) == 2


def test_a_released_network_is_gone(t5_folder: Path, blip_folder: Path) -> None:
    encoder, captioner = TextEncoder(str(t5_folder)), Captioner(str(blip_folder), max_tokens=2)
    encoder.encode(["a dog"])
    captioner.caption(torch.zeros(1, 3, 8, 8))
    networks = [weakref.ref(user._loaded[1]) for user in (encoder, captioner)]
    gc.disable()
    try:
        encoder.release()
        captioner.release()
        assert [network() for network in networks] == [None, None]
    finally:
        gc.enable()


def test_features_do_not_depend_on_what_else_is_asked_for(t5_folder: Path) -> None:
    encoder = TextEncoder(str(t5_folder), cache=None)
    alone = encoder.encode(["a dog"])[0]
    assert torch.equal(encoder.encode(["a dog on grass", "a dog", "a dog"])[1], alone)


def test_a_remembered_prompt_needs_no_encoder(t5_folder: Path, cache: Path, loads: list[str]) -> None:
    first = TextEncoder(str(t5_folder)).encode(["a dog", "ein Hund, \u00fc\n"])
    assert len(list(cache.glob("*.safetensors"))) == 2 and len(loads) == 1
    again = TextEncoder(str(t5_folder)).encode(["ein Hund, \u00fc\n", "a dog"])
    assert len(loads) == 1
    assert torch.equal(again[1], first[0]) and torch.equal(again[0], first[1])


def test_without_a_cache_nothing_is_written(t5_folder: Path, cache: Path) -> None:
    TextEncoder(str(t5_folder), cache=None).encode(["a dog"])
    assert not cache.exists()


@pytest.mark.parametrize(
    ("prompt", "asked", "options"),
    [
        ("a man on grass", {}, {}),
        ("a man", {"use_positive_prompt": True}, {}),
        ("a man", {}, {"max_length": 2}),
        ("a man", {}, {"dtype": torch.float16}),
    ],
)
def test_other_requests_are_not_taken_for_a_remembered_one(
    prompt: str, asked: dict, options: dict, t5_folder: Path, loads: list[str]
) -> None:
    known = TextEncoder(str(t5_folder)).encode(["a man"])[0]
    other = TextEncoder(str(t5_folder), **options).encode([prompt], **asked)[0]
    assert len(loads) == 2
    assert not torch.equal(known, other) and other.dtype == torch.float32


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_one_other_byte_of_the_encoder_is_another_encoder(
    file: str, t5_folder: Path, tmp_path: Path, loads: list[str]
) -> None:
    copy = Path(shutil.copytree(t5_folder, tmp_path / "copy"))
    TextEncoder(str(t5_folder)).encode(["a dog"])
    TextEncoder(str(copy)).encode(["a dog"])
    assert len(loads) == 1  # the same files elsewhere are the same encoder
    content = bytearray((copy / file).read_bytes())
    if file == "model.safetensors":
        content[-3] ^= 1
    else:
        content += b"\n"
    (copy / file).write_bytes(content)
    TextEncoder(str(copy)).encode(["a dog"])
    assert len(loads) == 2


def test_of_big_weights_a_few_places_are_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as sparse:
        sparse.truncate(64 * 2**30)  # reading all of it would take minutes

    def hash_with(place: int, byte: bytes) -> str:
        with file.open("r+b") as sparse:
            sparse.seek(place)
            sparse.write(byte)
        return fingerprint(tmp_path)

    size = file.stat().st_size
    seen = [fingerprint(tmp_path)] + [hash_with(place, b"1") for place in (5, size // 2, size - 5)]
    assert len(set(seen)) == 4
    assert hash_with(2**30, b"1") == seen[-1]
    os.truncate(file, size + 1)
    assert fingerprint(tmp_path) not in seen


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "other", "folder"])
def test_a_damaged_cache_file_is_made_again_with_a_warning(
    damage: str, t5_folder: Path, cache: Path, loads: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    good = TextEncoder(str(t5_folder)).encode(["a dog"])[0]
    (file,) = cache.iterdir()
    content = file.read_bytes()
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        flipped = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
        file.write_bytes({"cut": content[:-5], "empty": b"", "flipped": flipped, "other": b"no tensors"}[damage])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(TextEncoder(str(t5_folder)).encode(["a dog"])[0], good)
    assert str(file) in caplog.text and len(loads) == 2
    if damage != "folder":
        TextEncoder(str(t5_folder)).encode(["a dog"])
        assert len(loads) == 2


def test_a_cache_that_cannot_be_written_is_one_warning(
    t5_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("VARESTORER_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert len(TextEncoder(str(t5_folder)).encode(["a dog", "a", "on"])) == 3
    assert caplog.text.count("text features are not cached") == 1
    assert "VARESTORER_CACHE" in caplog.text


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cached")
    monkeypatch.setenv("VARESTORER_CACHE", "~/mine")
    assert cache_folder() == Path("/home/someone/mine")
    monkeypatch.delenv("VARESTORER_CACHE")
    assert cache_folder() == Path("/var/cached/varestorer")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/someone/.cache/varestorer")


def test_a_hub_name_is_its_local_snapshot(
    t5_folder: Path,
    loads: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "varestorer")
    monkeypatch.setattr("varestorer.utils.hub.SMALL", 0)
    files: dict[str, bytes | Path] = {path.name: path for path in t5_folder.iterdir()}
    with serving(tmp_path, monkeypatch) as hub:
        commit = hub.commit("someone/t5", files | {"pytorch_model.bin": b"the same again"})
        TextEncoder(f"someone/t5@{commit}").encode(["a dog"])
        assert len(loads) == 1 and commit in loads[0]
        assert "model.safetensors" in hub.transfers and "pytorch_model.bin" not in hub.transfers
        assert re.match(r"fetching [\d.]+ .B of someone/t5$", caplog.messages[-1])
        TextEncoder(str(t5_folder)).encode(["a dog"])
        assert len(loads) == 1  # known by what it is, not by its name
        del files["model.safetensors"]
        hub.commit("someone/older", files | {"pytorch_model.bin": b"weights"})
        assert (local_folder("someone/older", "google/flan-t5-xl", "text_encoder") / "pytorch_model.bin").is_file()


def test_what_the_hub_says_becomes_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (
        serving(tmp_path, monkeypatch),
        pytest.raises(UserError, match=r"give text_encoder=someone/t5: it has no such repository.*download") as caught,
    ):
        TextEncoder("someone/t5").encode(["a dog"])
    assert "\n" not in str(caught.value)


def test_positive_prompt_is_appended_before_encoding(t5_folder: Path) -> None:
    encoder = TextEncoder(str(t5_folder))
    asked = encoder.encode(["a man"], use_positive_prompt=True)[0]
    assert torch.equal(asked, encoder.encode([add_positive_prompt("a man")])[0])
    assert asked.shape[0] > encoder.encode(["a man"])[0].shape[0]


@pytest.mark.parity
def test_positive_prompts_match_the_released_code(shared: Path) -> None:
    cases = json.loads((shared / "fixtures/infinity/meta_va.json").read_text())["tiling"]["prompt_aug"]
    assert [add_positive_prompt(prompt) for prompt, _ in cases] == [wanted for _, wanted in cases]


def test_captions_are_words_one_an_image_and_repeatable(blip_folder: Path) -> None:
    images = torch.rand(2, 3, 40, 24, generator=torch.Generator().manual_seed(0))
    captions = Captioner(str(blip_folder), max_tokens=5).caption(images)
    assert len(captions) == 2
    assert all(0 < len(caption.split()) <= 5 for caption in captions)
    again = Captioner(str(blip_folder), max_tokens=5)
    assert again.caption(images) == captions
    again.release()
    assert again.caption(images[:1]) == captions[:1]


def test_missing_folders_say_what_to_get_and_which_key_to_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing does not exist.*google/flan-t5-xl.* set text_encoder"):
        TextEncoder(str(tmp_path / "nothing")).encode(["a dog"])
    with pytest.raises(UserError, match=r"download Salesforce/blip.* set captioner"):
        Captioner(str(tmp_path / "nothing")).caption(torch.zeros(1, 3, 8, 8))


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot be loaded as google/flan-t5-xl"):
        TextEncoder(str(tmp_path)).encode(["a dog"])
