"""`restore` from the command line, with a stand-in for the network."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

from varestorer.commands.restore import COMMAND
from varestorer.conditioning.text_encoder import TextEncoder

pytestmark = pytest.mark.smoke


class Enlarger:
    """Takes the place of a restoration system and remembers how it was called."""

    device = torch.device("cpu")

    def __init__(self, text_width: int = 2048) -> None:
        self.calls: list[dict] = []
        self.transformer = SimpleNamespace(config=SimpleNamespace(text_width=text_width))

    def restore(self, image_3HW: Tensor, **options) -> SimpleNamespace:
        self.calls.append(options)
        scale = options["scale"]
        return SimpleNamespace(image=image_3HW.repeat_interleave(scale, 1).repeat_interleave(scale, 2))


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Enlarger:
    enlarger = Enlarger()
    module = ModuleType("varestorer.systems.loading")
    module.load_system = lambda ckpt, device, merge: enlarger
    monkeypatch.setitem(sys.modules, "varestorer.systems.loading", module)
    return enlarger


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Takes the place of the text encoder: the prompts it was given; the features tell their length."""
    seen: list[str] = []

    def encode(encoder: TextEncoder, prompts: list[str]) -> list[Tensor]:
        seen.extend(prompts)
        return [torch.full((3, 2048), float(len(prompts[0])))]

    monkeypatch.setattr(TextEncoder, "encode", encode)
    return seen


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "my photos, (old)"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (5, 3), (200, 100, 50)).save(folder / name)
    return folder


def words(source: Path, output: Path, *more: str) -> list[str]:
    return [f"input={source}", f"output={output}", "ckpt=any", "device=cpu", *more]


def test_a_folder_with_awkward_names(
    system: Enlarger, prompts: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out, [1]"
    assert COMMAND.main(words(photos, output, "scale=2", "steps=2", "prompt=a dog, on (green) grass")) == 0
    with Image.open(output / "sub/b.png") as image:
        assert image.size == (10, 6)
    entries = json.loads((output / "restore.json").read_text())
    assert set(entries) == {"a.png", "sub/b.png"}
    assert entries["a.png"]["prompt"] == "a dog, on (green) grass"
    first, second = system.calls
    assert prompts == ["a dog, on (green) grass"] and first["prompt"][0, 0] == len(prompts[0])
    assert first["scale"] == 2 and first["steps"] == "2"
    assert first["seed"] != second["seed"] and "batch" not in first
    captured = capsys.readouterr()
    assert "2 restored" in captured.out and str(output) in captured.out
    assert "images/s" in captured.err


def test_a_broken_file_is_named_and_ends_with_one(
    system: Enlarger, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "broken.jpg").write_bytes(b"no jpeg")
    assert COMMAND.main(words(photos, tmp_path / "out")) == 1
    captured = capsys.readouterr().out
    assert "failed: broken.jpg" in captured and "2 restored, 1 failed" in captured
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.*")) == ["a.png", "b.png", "restore.json"]


def test_results_are_left_alone_unless_overwritten(system: Enlarger, photos: Path, tmp_path: Path) -> None:
    for more, calls in [((), 2), ((), 2), (("overwrite=true",), 4)]:
        assert COMMAND.main(words(photos, tmp_path / "out", *more)) == 0
        assert len(system.calls) == calls


def test_a_model_without_text_says_that_the_prompt_changes_nothing(
    system: Enlarger, prompts: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system.transformer.config.text_width = 8
    assert COMMAND.main(words(photos, tmp_path / "out", "prompt=a dog")) == 0
    assert prompts == [] and "prompt" not in system.calls[0]
    entry = json.loads((tmp_path / "out/restore.json").read_text())["a.png"]
    assert (entry["prompt"], entry["prompt_used"]) == ("a dog", False)
    assert "trained without text" in "".join(capsys.readouterr())


def test_an_encoder_of_another_width_is_refused(
    system: Enlarger, prompts: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system.transformer.config.text_width = 8
    assert COMMAND.main(words(photos, tmp_path / "out", "prompt=a dog", "text_encoder=any")) == 1
    assert "width 2048" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("input=/nowhere/at all", "nowhere/at all does not exist"),
        ("ckpt=null", "+experiment=quickstart"),
        ("select=best", "select must be argmax or sample"),
        ("steps=few", "steps must be one, multi or a number"),
        ("scale=0", "scale must be above 0"),
        ("scale=big", "big"),
        ("batch=0", "batch must be at least 1"),
        ("overlap=-1", "overlap must be at least 0"),
        ("colour=red", "colour"),
    ],
)
def test_wrong_commands_end_with_two_and_load_nothing(
    wrong: str, message: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word for word in words(photos, tmp_path / "out") if word.split("=")[0] != wrong.split("=")[0]]
    assert COMMAND.main([*given, wrong]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_input_and_output_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMAND.main([]) == 2
    assert "input=" in capsys.readouterr().err


def test_help_names_every_key_of_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    from varestorer.commands.entry import compose

    assert COMMAND.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for key in compose("restore"):
        assert f"{key}=" in shown
