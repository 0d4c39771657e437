"""`precompute_text` from the command line with tiny networks, and training on what it makes."""

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors import safe_open
from text_models import save_blip, save_t5
from torch import Tensor

from varestorer.commands import precompute_text
from varestorer.commands.precompute_text import COMMAND, describe, given_captions
from varestorer.commands.train import COMMAND as TRAIN
from varestorer.conditioning.captioner import Captioner
from varestorer.conditioning.text_encoder import TextEncoder
from varestorer.data.text import PhotoTexts
from varestorer.utils.errors import UserError
from varestorer.utils.images import save_image
from varestorer.weights.runs import load_ema

pytestmark = pytest.mark.smoke
NAMES = ["0.png", "1.png", "2.png", "sub/0.png"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_t5(folder / "t5")
    save_t5(folder / "wide", width=32)
    save_blip(folder / "blip")
    gc.freeze()  # letting go of a network collects garbage: not over transformers, which this imported
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for name in NAMES:
        save_image(tmp_path / "photos" / name, torch.rand(3, 40, 48, generator=generator))
    return tmp_path / "photos"


@pytest.fixture
def words(models: Path, photos: Path, tmp_path: Path) -> list[str]:
    """The command line of a run on the photographs; its features go to `text`."""
    places = [f"data.root={photos}", f"out={tmp_path / 'text'}", f"text_encoder={models / 't5'}"]
    return [*places, "device=cpu", "num_workers=0"]


def features_in(folder: Path, names: list[str] = NAMES) -> list[Tensor | None]:
    texts = PhotoTexts(folder, names)
    return [texts[index] for index in range(len(names))]


def lines_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_photographs_are_described_and_encoded(words: list[str], models: Path, tmp_path: Path) -> None:
    assert COMMAND.main([*words, f"captioner={models / 'blip'}", "num_workers=1"]) == 0
    captions = json.loads((tmp_path / "text" / "captions.json").read_text())
    assert list(captions) == NAMES
    encoder = TextEncoder(str(models / "t5"), cache=None)
    for name, features in zip(NAMES, features_in(tmp_path / "text"), strict=True):
        expected = encoder.encode([captions[name]])[0]
        assert features is not None and torch.equal(features, expected.half().float())
    with safe_open(tmp_path / "text" / "shards" / "00000.safetensors", "pt") as shard:
        assert shard.get_tensor("sub/0.png").dtype == torch.float16


def test_the_captioner_is_let_go_before_the_encoder_comes(
    words: list[str], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    release, encode = Captioner.release, TextEncoder.encode
    monkeypatch.setattr(Captioner, "release", lambda self: calls.append("release") or release(self))
    monkeypatch.setattr(TextEncoder, "encode", lambda self, prompts: calls.append("encode") or encode(self, prompts))
    assert COMMAND.main([*words, f"captioner={models / 'blip'}"]) == 0
    assert calls[0] == "release" and set(calls[1:]) == {"encode"}


def test_broken_photographs_are_named_and_left_out(
    words: list[str], models: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "1.png").write_bytes(b"not a picture")
    assert COMMAND.main([*words, f"captioner={models / 'blip'}"]) == 1
    out = capsys.readouterr().out
    assert f"failed: 1.png: cannot read the image {photos / '1.png'}" in out
    assert f"3 of 4 photographs have text in {tmp_path / 'text'}" in out
    assert [features is None for features in features_in(tmp_path / "text")] == [False, True, False, False]


def test_a_photograph_that_was_replaced_is_described_again(
    words: list[str], models: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(Captioner, "caption", lambda self, images: seen.append(1) or [f"text {len(seen)}"])
    words = [*words, f"captioner={models / 'blip'}"]
    assert COMMAND.main(words) == 0
    save_image(photos / NAMES[1], torch.zeros(3, 40, 48))
    for name in NAMES:
        os.utime(photos / name, (1.5e9, 1.5e9))
    assert COMMAND.main(words) == 0
    captions = json.loads((tmp_path / "text" / "captions.json").read_text())
    assert captions == {name: f"text {number}" for name, number in zip(NAMES, (1, 5, 3, 4), strict=True)}
    assert COMMAND.main(words) == 0 and len(seen) == 5


def test_a_text_that_may_be_that_of_two_photographs_is_refused(
    words: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_image(photos / "1.jpg", torch.rand(3, 40, 48))
    (tmp_path / "given.json").write_text(json.dumps({"1": "a dog"}))
    assert COMMAND.main([*words, f"captions={tmp_path / 'given.json'}"]) == 1
    assert "the text of 1 may be that of 1.jpg, 1.png" in capsys.readouterr().err


def test_an_interrupted_run_goes_on(
    words: list[str], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precompute_text, "SHARD_SIZE", 2)
    blip = f"captioner={models / 'blip'}"
    seen: list[int] = []
    caption, encode = Captioner.caption, TextEncoder.encode

    def interrupted_caption(self: Captioner, images: Tensor) -> list[str]:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return caption(self, images)

    def interrupted_encode(self: TextEncoder, prompts: list[str]) -> list[Tensor]:
        seen.append(2)
        if seen.count(2) == 4:
            raise KeyboardInterrupt
        return encode(self, prompts)

    monkeypatch.setattr(Captioner, "caption", interrupted_caption)
    monkeypatch.setattr(TextEncoder, "encode", interrupted_encode)
    assert COMMAND.main([*words, blip]) == 130
    assert list(json.loads((tmp_path / "text" / "captions.json").read_text())) == NAMES[:2]
    assert COMMAND.main([*words, blip]) == 130
    assert seen.count(1) == 5  # two, the one that broke off, and the other two
    assert list(json.loads((tmp_path / "text" / "index.json").read_text())["images"]) == NAMES[:2]
    assert COMMAND.main([*words, blip]) == 0
    assert seen.count(1) == 5 and seen.count(2) == 6
    assert all(features is not None for features in features_in(tmp_path / "text"))
    assert COMMAND.main([*words, blip]) == 0
    assert seen.count(2) == 6


def test_captions_may_be_given_and_changed(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my captions.json"
    file.write_text(json.dumps({"0.png": "a dog", "1": "dog  on\ngrass", "2.png": "", "sub/0.png": "a", "x.png": "a"}))
    assert COMMAND.main([*words, f"captions={file}"]) == 0
    assert "1 texts belong to no photograph: x.png" in capsys.readouterr().err
    first = features_in(tmp_path / "text")
    assert first[2] is None and sum(features is not None for features in first) == 3
    assert json.loads((tmp_path / "text" / "captions.json").read_text())["1.png"] == "dog on grass"
    file.write_text(json.dumps({"0.png": "grass on a dog"}))
    assert COMMAND.main([*words, f"captions={file}"]) == 0
    second = features_in(tmp_path / "text")
    assert second[0] is not None and not torch.equal(second[0], first[0])
    assert torch.equal(second[1], first[1])


def test_text_files_beside_the_photographs_are_captions(
    words: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "sub" / "0.txt").write_text("a dog\non grass\n")
    (photos / "sub" / "zebra.txt").write_text("a zebra")
    assert COMMAND.main([*words, f"captions={photos}"]) == 1
    said = capsys.readouterr()
    assert f"failed: 0.png: no text in {photos}" in said.out
    assert f"{photos}: 1 texts belong to no photograph: sub/zebra.txt" in said.err
    assert json.loads((tmp_path / "text" / "captions.json").read_text()) == {"sub/0.png": "a dog on grass"}


def test_captions_of_other_photographs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text('{"x.png": "a"}')
    with pytest.raises(UserError, match=r'no text for any of 4 photographs; wanted \{"0\.png": "text"'):
        given_captions(tmp_path / "captions.json", NAMES)
    with pytest.raises(UserError, match=r"wanted 0\.txt"):
        given_captions(tmp_path, NAMES)


def test_what_is_there_is_kept_when_the_captioner_fails(photos: Path, tmp_path: Path) -> None:
    captions = {"0.png": "a dog"}
    photographs = {name: photos / name for name in NAMES}
    with pytest.raises(UserError, match="captioner must be a folder or a hub name"):
        describe(photographs, captions, Captioner("no/such/folder"), tmp_path / "captions.json", 0)
    assert json.loads((tmp_path / "captions.json").read_text()) == {"0.png": "a dog"}


def test_features_too_large_for_their_type_are_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "captions.json").write_text('{"0.png": "a dog"}')
    monkeypatch.setattr(TextEncoder, "encode", lambda self, prompts: [torch.full((3, 16), 1e6)])
    assert COMMAND.main([*words, f"captions={tmp_path / 'captions.json'}"]) == 1
    assert "'a dog': the features are not finite in fp16; try dtype=fp32" in capsys.readouterr().err
    assert COMMAND.main([*words, f"captions={tmp_path / 'captions.json'}", "dtype=fp32"]) == 1  # the other three
    assert features_in(tmp_path / "text")[0] is not None


@pytest.mark.parametrize(
    ("extra", "status", "message"),
    [
        ("dtype=fp8", 2, "dtype must be one of fp16, bf16, fp32, got dtype=fp8"),
        ("num_workers=-1", 2, "num_workers must be at least 0"),
        ("device=tpu", 2, "device must be auto, cpu"),
        ("text=a", 2, "text"),
        ("text_encoder=no/such/folder", 1, "text_encoder must be a folder or a hub name"),
        ("captions=nowhere.json", 1, "nowhere.json does not exist; wanted a JSON object"),
    ],
)
def test_wrong_options_are_one_clear_line(
    words: list[str], capsys: pytest.CaptureFixture[str], extra: str, status: int, message: str
) -> None:
    assert COMMAND.main([*words, extra]) == status
    assert message in capsys.readouterr().err


def test_required_keys_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMAND.main([]) == 2
    assert "data.root=... out=..." in capsys.readouterr().err
    assert COMMAND.main(["data.root=a", "out=b", "captions=c", "captioner=d"]) == 2
    assert "contradict" in capsys.readouterr().err


# training on it

TINY = ["+experiment=smoke", "data=folder", "data.crop=32", "trainer.checkpoint_every=1", "trainer.schedule=constant"]
TINY += ["heldout=null"]


@pytest.fixture
def text(words: list[str], tmp_path: Path) -> Path:
    """Texts of three photographs of four."""
    (tmp_path / "given.json").write_text(json.dumps({"0.png": "a dog", "1.png": "dog on grass", "2.png": "grass"}))
    assert COMMAND.main([*words, f"captions={tmp_path / 'given.json'}"]) == 1
    return tmp_path / "text"


def test_training_reads_the_text_and_resumes_exactly(text: Path, photos: Path, tmp_path: Path) -> None:
    given = [*TINY, f"data.root={photos}", f"data.text={text}"]
    whole, parted, without = (tmp_path / name for name in ("whole", "parted", "without"))
    assert TRAIN.main([*given, "trainer.max_steps=2", f"run_dir={whole}"]) == 0
    assert TRAIN.main([*given, "trainer.max_steps=1", f"run_dir={parted}"]) == 0
    resumed = ["trainer.max_steps=2", "trainer.num_workers=1", f"run_dir={parted}", "resume=auto"]
    assert TRAIN.main([*given, *resumed]) == 0
    assert lines_of(whole) == lines_of(parted)
    averages = load_ema(whole), load_ema(parted)
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])
    assert TRAIN.main([*given, "data.text=null", "trainer.max_steps=2", f"run_dir={without}"]) == 0
    assert [line["kl"] for line in lines_of(without)] != [line["kl"] for line in lines_of(whole)]


def test_text_of_another_encoder_is_one_clear_line(
    words: list[str], models: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "given.json").write_text(json.dumps(dict.fromkeys(NAMES, "a dog")))
    wide = [f"text_encoder={models / 'wide'}", f"captions={tmp_path / 'given.json'}"]
    assert COMMAND.main([*words, *wide]) == 0
    given = [*TINY, f"data.root={photos}", f"data.text={tmp_path / 'text'}", f"run_dir={tmp_path / 'run'}"]
    assert TRAIN.main(given) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: data.text holds features of width 32, but the model wants 16")


def test_the_ablation_without_prompts_pins_the_null_text(compose: Callable[..., DictConfig]) -> None:
    cfg = compose("train", "+experiment=ablation_no_prompt", "data.root=x")
    base = compose("train", "+experiment=dmd_div2k", "data.root=x")
    assert cfg.data.text is None
    assert cfg.stages == base.stages and cfg.trainer == base.trainer


def test_captions_may_begin_with_a_mark_and_a_broken_one_is_its_own_failure(tmp_path: Path, caplog):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa dog")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")  # not UTF-8
    (tmp_path / "c.txt").write_text("a cat")
    assert given_captions(tmp_path, ["a.png", "b.png", "c.png"]) == {"a.png": "a dog", "c.png": "a cat"}
    assert "b.txt" in caplog.text
    (tmp_path / "given.json").write_bytes(b'\xef\xbb\xbf{"a.png": "a dog"}')
    assert given_captions(tmp_path / "given.json", ["a.png"]) == {"a.png": "a dog"}
