"""`prepare_data` as a whole: what it explains, checks and makes, and its exit statuses."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from varestorer.commands.entry import compose
from varestorer.commands.prepare_data import COMMAND
from varestorer.data import BicubicDegradation, quality_crops
from varestorer.data.testsets.known import BENCHMARKS
from varestorer.utils.images import load_image, resize, save_image

pytestmark = pytest.mark.smoke


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two smooth photographs, 48 x 64."""
    for seed in range(2):
        picture = torch.from_numpy(np.random.default_rng(seed).random((3, 6, 8), dtype=np.float32))
        save_image(tmp_path / "photos" / f"{seed}.png", resize(picture, (48, 64)))
    return tmp_path / "photos"


def make(root: Path, photos: Path, *words: str) -> int:
    return COMMAND.main([f"make={root}", f"source={photos}", "count=3", "crop=32", "workers=0", *words])


def test_without_words_it_lists_the_sets_and_says_what_to_type(capsys: pytest.CaptureFixture[str]):
    assert COMMAND.main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in BENCHMARKS) and "prepare_data.py dataset=realsr data.root=" in text


def test_help_names_every_key_and_the_sets(capsys: pytest.CaptureFixture[str]):
    assert COMMAND.main(["--help"]) == 0
    text = capsys.readouterr().out
    keys = ["data.root" if key == "data" else key for key in compose("prepare_data")]
    assert not [key for key in keys if f"{key}=" not in text]
    assert "reallr200" in text and "Exit status" in text


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_set_is_explained(name: str, capsys: pytest.CaptureFixture[str]):
    assert COMMAND.main([f"dataset={name}"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{name}: ") and "license" in text and f"dataset={name} data.root=" in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_a_set_is_made_checked_and_found_out_when_it_changes(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
):
    root = tmp_path / "made"
    (photos / "broken.png").write_bytes(b"no picture")
    assert make(root, photos) == 0
    made = capsys.readouterr().out
    assert "skipped: cannot read the image" in made and "3 pairs in" in made and "computed with varestorer" in made
    digests = json.loads((root / "manifest.json").read_text())["digests"]
    assert all(f"pixels of {side}: sha256 {digests[side]}" in made for side in ("lr", "hr"))

    assert COMMAND.main(["dataset=folder", f"data.root={root}"]) == 0
    good = capsys.readouterr().out
    assert "lr (lr): 3 images read: 3 PNG, 8-bit RGB, 8x8" in good and digests["hr"] in good
    assert "verdict: good" in good and f"eval.py dataset=folder data.root={root}" in good

    save_image(root / "lr" / "00001.png", torch.zeros(3, 8, 8))
    (root / "hr" / "00002.png").unlink()
    assert COMMAND.main(["dataset=folder", f"data.root={root}"]) == 1
    bad = capsys.readouterr().out
    assert "lr/00001.png: has other pixels than the manifest says" in bad
    assert "lr/00002.png: has no partner" in bad and "problem: 00002 is in the manifest" in bad
    assert bad.splitlines()[-1] == "verdict: NOT usable as folder; problems named above: 1 of the folder, 2 of files"


def test_a_photograph_that_was_replaced_is_found_out(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    assert make(tmp_path / "set", photos) == 0
    replaced = photos / "1.png"
    save_image(replaced, 0.5 * load_image(replaced))
    os.utime(replaced, (1.5e9, 1.5e9))
    assert make(tmp_path / "set", photos, "count=4") == 1
    assert f"the photographs changed since make={tmp_path / 'set'} was begun: {replaced}" in capsys.readouterr().err


def test_two_machines_can_compare_by_a_manifest(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    assert make(tmp_path / "here", photos) == 0 and make(tmp_path / "there", photos, "seed=1") == 0
    words = ["dataset=folder", f"data.root={tmp_path / 'here'}"]
    assert COMMAND.main([*words, f"manifest={tmp_path / 'there' / 'manifest.json'}"]) == 1
    assert "has other pixels than the manifest says" in capsys.readouterr().out
    assert COMMAND.main([*words, f"manifest={tmp_path / 'here' / 'manifest.json'}"]) == 0


def test_settings_of_the_degradation_count_as_options(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    assert make(tmp_path / "made", photos) == 0
    assert make(tmp_path / "made", photos, "degradation.jpeg1=[30,40]") == 1
    assert "begun with other options: degradation=" in capsys.readouterr().err


def test_the_released_pixels_are_recognized(shared: Path, capsys: pytest.CaptureFixture[str]):
    assert COMMAND.main(["dataset=realsr", f"data.root={shared / 'benchmarks' / 'realsr'}"]) == 0
    text = capsys.readouterr().out
    assert "100 PNG, 8-bit RGB, 512x512" in text and "  the same as in the copy" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset=realsrr"], "realsrr"),
        (["dataset=realsr", "data.root=/nowhere"], "data.root=/nowhere is no folder"),
        (["data.root=."], "needs dataset="),
        (["dataset=realsr", "manifest=x"], "needs data.root="),
        (["make=x"], "go together"),
        (["source=."], "go together"),
        (["make=x", "source=/nowhere"], "source=/nowhere is no folder"),
        (["make=x", "source=.", "dataset=div2k"], "leave out dataset="),
        (["make=x", "source=."], "lies in the folder of photographs"),
        (["make=/tmp/x", "source=.", "crop=30"], "multiple of scale 4"),
        (["make=/tmp/x", "source=.", "degradation=bicubic"], "degradation=realesrgan"),
        (["make=x", "shard=y", "source=."], "give one of them"),
        (["shard=x"], "go together"),
        (["shard=x", "source=."], "lies in the folder of photographs"),
        (["shard=x", "source=.", "data.root=."], "leave out dataset="),
        (["text=x"], "text= goes with shard="),
        (["shard=/tmp/x", "source=.", "shard_mb=0"], "shard_mb must be at least 1"),
        (["count=0"], "count must be at least 1"),
        (["count=many"], "many"),
    ],
)
def test_wrong_commands(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert COMMAND.main(words) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_photographs_are_packed_into_shards(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    (photos / "broken.png").write_bytes(b"no picture")
    root = tmp_path / "shards"
    for _ in range(2):
        assert COMMAND.main([f"shard={root}", f"source={photos}"]) == 0
        text = capsys.readouterr().out
        assert "skipped: cannot read the image" in text and f"2 photographs in 1 shards in {root}" in text
        assert f"data=shards data.root={root}" in text
    assert sorted(path.name for path in root.iterdir()) == ["index.json", "shard-000000.tar"]
    assert COMMAND.main([f"shard={root}", f"source={photos}", f"text={tmp_path}"]) == 1
    assert "index.json" in capsys.readouterr().err


def test_a_folder_with_another_layout_fails_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert COMMAND.main(["dataset=realsr", f"data.root={tmp_path}"]) == 1
    assert "verdict: NOT usable as realsr; problems named above: 1 of the folder" in capsys.readouterr().out


def scored(tmp_path: Path, rows: list[str]) -> list[str]:
    for name in ("a.jpg", "b.png", "c.jpg", "d.jpg"):
        save_image(tmp_path / "iqa" / "sub" / name, torch.rand(3, 8, 8))
    (tmp_path / "scores.csv").write_text("\n".join(["image,sd,MOS", *rows]) + "\n")
    return [f"split={tmp_path / 'lists'}", f"source={tmp_path / 'iqa'}", f"scores={tmp_path / 'scores.csv'}"]


def test_good_and_bad_pictures_are_told_apart_by_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    # least 10, largest 100: with a share of 0.6 what is below 70 is bad, 70 itself is good
    words = scored(tmp_path, ["a.jpg,1,10", "sub/b.png,1,69.9", "c,1,70", "d.jpg,1,100", "e.jpg,1,20", "f.jpg,1,none"])
    assert COMMAND.main([*words, "set=koniq"]) == 0
    out = capsys.readouterr().out
    assert "2 good, 2 bad (score below 70)" in out and "1 of" in out and "e.jpg" in out and "f.jpg" in out
    links = {kind: sorted(p.name for p in (tmp_path / "lists" / kind).rglob("*.*")) for kind in ("good", "bad")}
    assert links == {"good": ["c.jpg", "d.jpg"], "bad": ["a.jpg", "b.png"]}
    data = quality_crops(str(tmp_path / "lists/good"), str(tmp_path / "lists/bad"), 8, BicubicDegradation(), seed=0)
    assert {data[number]["label"] for number in range(40)} == {0, 1}
    assert COMMAND.main([*words, "set=koniq"]) == 0  # again: the same links
    assert COMMAND.main([*words, "column=MOS", "share=0.7"]) == 1  # b is good then
    assert "of an earlier split" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["set=koniq2"], 2, "set must be one of spaq"),
        (["set=livec"], 2, "give column=NAME"),
        (["column=mos", "share=0.5"], 1, "has no column 'mos'; it has image, sd, MOS"),
        (["column=image", "share=0.5"], 1, "no number in the column of scores"),
        (["column=MOS", "share=0"], 1, "2 good and 0 bad pictures"),
        (["set=koniq", "make=x"], 2, "make= and split= are two commands"),
    ],
)
def test_scores_that_cannot_be_used(
    tmp_path: Path, more: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
):
    words = scored(tmp_path, ["a.jpg,1,10", "b.png,1,90"])
    assert COMMAND.main([*words, *more]) == status
    assert message in capsys.readouterr().err
