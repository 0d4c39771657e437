"""Behind the page of `demo`: what happens without a browser, and without gradio."""

import dataclasses
from pathlib import Path
from threading import Event, Thread
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from PIL import ExifTags, Image
from tiny_sizes import HVAR_SIZES, VARSR_SIZES

from varestorer.commands import run
from varestorer.commands.demo import studio as room
from varestorer.commands.demo.studio import CancelledError, Result, Studio
from varestorer.commands.options import DemoOptions
from varestorer.systems import system_class
from varestorer.systems.varestorer import VARestorer
from varestorer.utils.errors import UserError
from varestorer.utils.images import load_image, resize, save_image

WISHES: dict[str, Any] = {"scale": 4.0, "uncertainty": True}


@pytest.fixture
def bundle(tiny_system: VARestorer, tmp_path: Path) -> str:
    tiny_system.save_pretrained(tmp_path / "models" / "tiny")
    return str(tmp_path / "models" / "tiny")


@pytest.fixture
def studio(bundle: str, tmp_path: Path) -> Studio:
    options = DemoOptions(ckpt=bundle, models=str(tmp_path / "models"), precision="fp32", device="cpu")
    (tmp_path / "work").mkdir()
    return Studio(options, tmp_path / "work")


def photo(path: Path, height: int = 10, width: int = 12, **options: Any) -> str:
    save_image(path, torch.rand(3, height, width), **options)
    return str(path)


def restored(studio: Studio, *files: str, tell: Any = None, **wishes: Any) -> list[Result | str]:
    tell = tell or (lambda share, text: None)
    return [*studio.restore(files, studio.first, WISHES | wishes, Event(), tell)]


def test_models_of_the_folder_can_be_chosen(studio: Studio, bundle: str) -> None:
    assert studio.choices == {"varestorer": [bundle, "nano"]}
    model = studio.model(bundle)
    assert model is studio.model(bundle) and model.ways == ["one", "2", "3", "multi"] and not model.reads_text
    assert model.system.ways == ["one"]  # its adapters are merged; those of the other ways are not
    assert studio.model(bundle, "multi").system.ways == model.ways
    studio.model("nano")
    assert studio.model(bundle) is not model  # which made room


def test_progress_tells_squares_and_the_time_left(studio: Studio, tmp_path: Path) -> None:
    told: list[tuple[float, str]] = []
    file = photo(tmp_path / "a.png")
    assert studio.preview(file, studio.first, 4.0) == "a.png: 12 x 10 to 48 x 40 pixels, squares: 4"
    (result,) = restored(studio, file, tell=lambda *now: told.append(now))
    assert [share for share, _ in told] == [0, 0.25, 0.5, 0.75, 1]
    assert told[0][1] == "a.png: square 0 of 4" and told[-1][1] == "a.png: square 4 of 4, 0 s left"
    assert isinstance(result, Result) and result.size == "48 x 40" and result.picture.name == "a_x4.png"
    assert result.overlay is not None and 0 <= result.span[0] < result.span[1] <= 1
    assert studio.preview(file, studio.first, 1.5).endswith("to 18 x 15 pixels, squares: 4, about 0 s")
    assert studio.preview(file, studio.first, 1, 2).endswith("to 12 x 10 pixels, squares: 1, about 0 s")


def test_what_fails_is_a_line_without_folders(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"no picture")
    studio.options.max_megapixels = 0.002
    files = str(tmp_path / "b.png"), photo(tmp_path / "c.png", 40, 40), photo(tmp_path / "d.png")
    broken, large, good = restored(studio, *files)
    assert str(broken).startswith("cannot read the image b.png") and str(tmp_path) not in str(broken)
    assert large == "c.png: the result would have 160 x 160 pixels, above 0.002 megapixels; choose a smaller scale"
    assert isinstance(good, Result)
    assert studio.preview(files[0], studio.first, 4.0) == broken
    with pytest.raises(UserError, match="color must be one of none, adain, wavelet"):
        restored(studio, files[2], color="red")


def test_large_photographs_are_suggested_their_own_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LARGE", 120)
    (tmp_path / "b.png").write_bytes(b"no picture")
    small, large = photo(tmp_path / "a.png"), photo(tmp_path / "c.png", 11, 12)
    assert room.suggested([small, str(tmp_path / "b.png")]) is None
    assert room.suggested([small, large]) == (1, 2)


def test_what_a_model_says_of_a_picture_comes_with_its_result(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("varestorer.commands.restore.shows_face", lambda image: True)
    studio.model(studio.first).system.weak = {"faces": "it squints"}
    (result,) = restored(studio, photo(tmp_path / "a.png"))
    assert isinstance(result, Result)
    assert result.warnings == ("it seems to show a face, which this model is poor at: it squints",)


def test_fidelity_stays_with_the_input(studio: Studio, tmp_path: Path) -> None:
    file = photo(tmp_path / "a.png")
    own, faithful = (load_image(restored(studio, file, fidelity=share)[0].picture) for share in (0.0, 1.0))
    enlarged = resize(load_image(file), (40, 48)).clamp(0, 1)  # this model has no restorer
    assert (faithful - enlarged).abs().max() < 0.01 < (own - enlarged).abs().max()


def test_a_way_that_knows_no_uncertainty_has_no_overlay(studio: Studio, tmp_path: Path) -> None:
    (result,) = restored(studio, photo(tmp_path / "a.png"), steps="multi", prompt="of no use to this model")
    assert isinstance(result, Result) and result.overlay is None


def test_visitors_take_turns_and_may_give_up(studio: Studio, tmp_path: Path) -> None:
    file, inside, told, stop = photo(tmp_path / "a.png"), Event(), [], Event()
    go_on = Event()

    def first(share: float, text: str) -> None:
        inside.set()
        go_on.wait(30)

    def second(share: float, text: str) -> None:
        told.append(text)
        stop.set()

    thread = Thread(target=restored, args=(studio, file), kwargs={"tell": first})
    thread.start()
    assert inside.wait(30)
    with pytest.raises(CancelledError):
        next(studio.restore([file], studio.first, WISHES, stop, second))
    assert told == ["a.png: another visitor's picture comes first"]
    go_on.set()
    thread.join()
    assert len(restored(studio, file)) == 1  # the turn was given back


def test_downloads_keep_what_the_photograph_says(studio: Studio, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = "a telephone"
    folders = [tmp_path / "x", tmp_path / "y"]
    for folder in folders:
        folder.mkdir()
        Image.new("RGB", (6, 5), "teal").save(folder / "a.jpg", exif=exif)
    results = [
        one for one in restored(studio, *(str(folder / "a.jpg") for folder in folders)) if isinstance(one, Result)
    ]
    path = studio.download(results[:1], "webp", 80)
    with Image.open(path) as file:
        assert (path.name, file.format, file.size) == ("a_x4.webp", "WEBP", (24, 20))
        assert file.getexif()[ExifTags.Base.Model] == "a telephone"
    assert studio.download(results[:1], "png", None) == results[0].picture
    with ZipFile(studio.download(results, "tif", None)) as file:
        assert file.namelist() == ["1_a_x4.tif", "2_a_x4.tif"]
    studio.forget(results)
    assert not any(studio.folder.iterdir())


@pytest.mark.parametrize("name", ["hvar", "varsr"])
def test_systems_of_the_other_papers_restore_in_all_their_ways(studio: Studio, tmp_path: Path, name: str) -> None:
    sizes = {"hvar": HVAR_SIZES, "varsr": VARSR_SIZES}[name]
    ckpt, file = str(tmp_path / "models" / name), photo(tmp_path / "a.png")
    system_class(name)(**sizes, student={"lora_rank": 2}).eval().save_pretrained(ckpt)
    assert Studio(studio.options, studio.folder).choices[name] == [ckpt]
    assert studio.model(ckpt).ways == ["one", "multi"] and not studio.model(ckpt).reads_text
    for steps in ("one", "multi"):
        (result,) = studio.restore([file], ckpt, WISHES | {"steps": steps}, Event(), lambda share, text: None)
        assert isinstance(result, Result) and result.size == "48 x 40" and result.overlay is not None


def test_large_results_get_no_map(studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAP_PIXELS", 100)
    monkeypatch.setattr(room, "VIEW", 12)
    (result,) = restored(studio, photo(tmp_path / "a.png"))
    assert isinstance(result, Result) and result.overlay is None
    with Image.open(result.before) as before, Image.open(result.picture) as whole:
        assert before.size == (12, 10) and whole.size == (48, 40)


def test_without_gradio_a_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    monkeypatch.delitem(__import__("sys").modules, "varestorer.commands.demo.page", raising=False)
    assert run("demo", []) == 1
    assert 'the page needs gradio 6: pip install "varestorer[demo]"' in capsys.readouterr().err


def test_the_options_are_for_this_machine_alone_at_first() -> None:
    assert DemoOptions().host == "127.0.0.1" and not dataclasses.asdict(DemoOptions())["browser"]
