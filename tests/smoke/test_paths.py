"""Paths of every command: any text arrives as it was typed, and what cannot be written is said first."""

import json
import os
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from omegaconf import OmegaConf

from varestorer.commands import COMMANDS
from varestorer.commands.entry import Command, compose, config_dir, hydra_words
from varestorer.commands.options import OPTIONS
from varestorer.commands.words import expand_home
from varestorer.systems.varestorer import VARestorer
from varestorer.utils.errors import UsageError
from varestorer.utils.images import save_image
from varestorer.utils.locks import locked

pytestmark = pytest.mark.smoke
ALL: dict[str, Command] = {name: import_module(f"varestorer.commands.{name}").COMMAND for name in COMMANDS}
NEEDED = {"eval": ["dataset=folder"], "train": ["+experiment=dmd_div2k"], "prepare_data": ["dataset=folder"]}
PATHS = [
    "/mnt/donn\u00e9es/\u65e5\u672c",
    "/mnt/a,b",
    "a, b",
    "/mnt/runs (old)",
    "[old]",
    "{a}",
    "key=value",
    "it's",
    'the "best"',
    "#1 & 2; 50% $x!",
    "2024_01",
    "1e3",
    "007",
    "true",
    " spaces ",
    "Mu\udcf1oz",
    "tab\tand\nline",
    "C:\\photos\\",
]
NESTED = [  # of training: its config is made of constructors
    "run_dir",
    "weights_dir",
    "data.root",
    "data.text",
    "heldout.root",
    "model.restorer",
    "model.weights.transformer",
    "model.weights.tokenizer",
    "stages.student.task.teacher",
    "+stages.student.data.root",
]


def text_keys(schema: type, prefix: str = "") -> list[str]:
    """The keys of a dataclass that hold texts."""
    types = get_type_hints(schema)
    found = []
    for option in fields(schema):
        kind = types[option.name]
        if is_dataclass(kind):
            found += text_keys(kind, f"{option.name}.")
        elif kind in (str, str | None):
            found.append(f"{prefix}{option.name}")
    return found


KEYS = [(name, key) for name in ALL if name != "train" for key in text_keys(OPTIONS[name])]
KEYS += [("train", key) for key in NESTED]


@pytest.mark.parametrize(("name", "key"), KEYS)
def test_paths_arrive_as_they_were_typed_in_every_key_of_every_command(name: str, key: str):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    words = [f"{key}={path}" for path in PATHS]
    seen = hydra_words(ALL[name], [*NEEDED.get(name, []), *words], config_dir())[-len(words) :]
    for path, override in zip(PATHS, OverridesParser.create().parse_overrides(seen), strict=True):
        assert OmegaConf.create({"key": override.value()}).key == path


def test_lists_of_paths_numbers_and_choices():

    def runs(value: str) -> list[str]:
        return list(compose("tables", ["table=1", f"runs={value}"]).runs)

    assert runs("[ours=a b/(c), /mnt/donn\u00e9es, 2024_01]") == ["ours=a b/(c)", "/mnt/donn\u00e9es", "2024_01"]
    assert runs("['w/o KL=a, b','c']") == ["w/o KL=a, b", "c"]
    assert runs("one folder") == ["one folder"]
    cfg = compose("train", ["+experiment=dmd_div2k", "data.root=x", "trainer.max_steps=2", "data.downscale=[1,2]"])
    assert cfg.trainer.max_steps == 2 and list(cfg.data.downscale) == [1, 2]
    assert compose("eval", ["dataset=folder", "data.root=x", "metrics=[psnr,ssim]", "limit=3"]).limit == 3


@pytest.mark.parametrize(("word", "stays"), [("color=none,adain", True), ("ckpt=a,b", False), ("output=a, b", False)])
def test_a_sweep_over_words_stays_one(word: str, stays: bool):
    assert (word in hydra_words(ALL["restore"], ["-m", word], config_dir())) is stays
    assert word not in hydra_words(ALL["restore"], [word], config_dir())


def test_a_tilde_is_the_users_folder_wherever_a_path_may_stand(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cfg = OmegaConf.create({"a": {"b": "~/x"}, "c": ["~", "a~/b"], "prompt": "~/x", "d": "${a.b}/y", "e": None})
    expand_home(cfg)
    assert (cfg.a.b, list(cfg.c), cfg.prompt, cfg.d) == ("/home/me/x", ["/home/me", "a~/b"], "~/x", "/home/me/x/y")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME and passwd entry
    with pytest.raises(UsageError, match="a.b=~/x: no home folder is known"):
        expand_home(OmegaConf.create({"a": {"b": "~/x"}}))


@pytest.fixture
def photos(tmp_path: Path, monkeypatch) -> Path:
    """Pairs; and models must not be loaded."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(VARestorer, "from_pretrained", refuse)
    generator = torch.Generator().manual_seed(0)
    for number in range(2):
        save_image(tmp_path / f"set/hr/{number}.png", torch.rand(3, 64, 64, generator=generator))
        save_image(tmp_path / f"set/lr/{number}.png", torch.rand(3, 16, 16, generator=generator))
    (tmp_path / "taken").touch()
    return tmp_path / "set"


WRITING = {
    "restore": "input={set}/lr output={out}",
    "eval": "dataset=folder data.root={set} metrics=[psnr] out={out}",
    "convert": "input=nano output={out}",
    "tables": "table=2 ckpt=nano out={out}",
    "benchmark": "what=restore ckpt=nano device=cpu out={out}",
    "train": "+experiment=smoke data=folder data.root={set}/hr data.crop=32 run_dir={out}",
    "precompute_text": "data.root={set}/hr out={out}",
    "prepare_data make": "make={out} source={set}/hr count=2 crop=32 workers=0",
    "prepare_data shard": "shard={out} source={set}/hr",
}


def words_of(case: str, photos: Path, out: Path) -> list[str]:
    return [word.format(set=photos, out=out) for word in WRITING[case].split()]


@pytest.mark.parametrize("case", WRITING)
def test_what_cannot_be_written_is_said_before_anything_is_computed(photos: Path, case: str, capsys):
    out = photos.parent / "taken" / "out"  # below a file: root may write everywhere else
    assert ALL[case.split()[0]].main(words_of(case, photos, out)) != 0
    told = capsys.readouterr().err
    assert f"{out.parent}" in told and "cannot write" in told and "Traceback" not in told


@pytest.mark.parametrize("case", sorted(set(WRITING) - {"restore", "convert", "tables", "benchmark"}))
def test_a_second_command_is_kept_out_of_the_folder(photos: Path, case: str, capsys):
    out = photos.parent / "out"
    with locked(out):
        assert ALL[case.split()[0]].main(words_of(case, photos, out)) == 1
        assert sorted(path.name for path in out.iterdir()) == [".varestorer.lock"]
    assert f"{out} is being written by another command" in capsys.readouterr().err


def test_names_that_no_terminal_can_show_do_not_end_an_evaluation(photos: Path, capfd):
    """Twice: the second takes the scores of the first."""
    for number, name in enumerate((b"Mu\xf1oz.png", b"\x1b[31m\n.png")):
        for side in ("hr", "lr"):
            os.rename(photos / side / f"{number}.png", os.fsencode(photos / side) + b"/" + name)
    out = photos.parent / os.fsdecode(b"o\xfct")
    words = ["method=bicubic", "dataset=folder", f"data.root={photos}", "metrics=[psnr]", f"out={out}"]
    for _ in range(2):
        assert ALL["eval"].main(words) == 0
    shown = capfd.readouterr()
    assert "2 images scored" in shown.out and "\x1b[31m" not in shown.out + shown.err
    assert (out / "per_image.csv").read_text(encoding="utf-8").count(r"Mu\udcf1oz") == 1
    assert json.loads((out / "summary.json").read_text(encoding="utf-8"))["n"] == 2
    assert "Mu%F1oz" in (out / "gallery.html").read_text(encoding="utf-8")
