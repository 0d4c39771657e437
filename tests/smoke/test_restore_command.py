"""`restore` from the command line, with a stand-in for the network or a tiny one."""

import gc
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import skimage.data
import torch
from PIL import Image
from text_models import save_blip, save_t5
from torch import Tensor

from varestorer.commands.restore import COMMAND
from varestorer.conditioning.captioner import Captioner
from varestorer.conditioning.text_encoder import TextEncoder
from varestorer.systems.acceleration import Acceleration
from varestorer.systems.varestorer import StudentConfig, VARestorer
from varestorer.utils.images import load_image
from varestorer.weights import DEFAULT

pytestmark = pytest.mark.smoke


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VARESTORER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Enlarger:
    """Takes the place of a restoration system and remembers how it was called."""

    restorer = None
    tile, tiles, schedule = 64, (32, 64), range(10)
    source: Path | None = None
    weak: dict[str, str] = {}
    check_source, check_official = VARestorer.check_source, VARestorer.check_official
    restore_official = VARestorer.restore_official

    def __init__(self, text_width: int = 2048) -> None:
        self.calls: list[dict] = []
        self.is_merged = False
        self.acceleration: Acceleration | None = None
        self.student_config = StudentConfig()
        self.transformer = SimpleNamespace(config=SimpleNamespace(text_width=text_width, num_classes=0))

    def to(self, device: torch.device) -> "Enlarger":
        return self

    def accelerate(self, acceleration: Acceleration) -> None:
        self.acceleration, self.is_merged = acceleration.on(torch.device("cpu")), acceleration.merge

    def restore(self, image_3HW: Tensor, scale: float, **options) -> SimpleNamespace:
        self.calls.append({"scale": scale} | options)
        image = image_3HW.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        maps_KHW = torch.stack([torch.zeros_like(image[0]), torch.ones_like(image[0])])
        maps = maps_KHW if options["uncertainty"] else None
        return SimpleNamespace(image=image, uncertainty_KHW=maps, warnings=())


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Enlarger:
    enlarger = Enlarger()
    monkeypatch.setattr(VARestorer, "from_pretrained", lambda ckpt, device, merge: enlarger)
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
    for name, color in (("a.png", (200, 100, 50)), ("sub/b.png", (10, 30, 250))):
        Image.new("RGB", (5, 3), color).save(folder / name)
    return folder


@pytest.fixture
def bundle(tiny_system: VARestorer, tmp_path: Path) -> Path:
    """A tiny system that reads text features of width 16."""
    tiny_system.save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture(scope="module")
def text_models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words of the command that name a real captioner and a real encoder of tiny size."""
    folder = tmp_path_factory.mktemp("text models")
    return [f"captioner={save_blip(folder / 'blip')}", f"text_encoder={save_t5(folder / 't5')}"]


def words(source: Path, output: Path, *more: str) -> list[str]:
    given = {word.split("=")[0] for word in more}
    usual = [f"input={source}", f"output={output}", "ckpt=any", "device=cpu"]
    return [*(word for word in usual if word.split("=")[0] not in given), *more]


def entries_of(output: Path) -> dict[str, dict]:
    return json.loads((output / "restore.json").read_text())


def test_a_folder_with_awkward_names(
    system: Enlarger, prompts: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out, [1]"
    assert COMMAND.main(words(photos, output, "scale=2", "steps=2", "prompt=a dog, on (green) grass")) == 0
    with Image.open(output / "sub/b.png") as image:
        assert image.size == (10, 6)
    entries = entries_of(output)
    assert set(entries) == {"a.png", "sub/b.png"}
    assert entries["a.png"]["prompt"] == "a dog, on (green) grass"
    first, second = system.calls
    assert prompts == ["a dog, on (green) grass"] and first["prompt"][0, 0] == len(prompts[0])
    assert first["scale"] == 2 and first["steps"] == "2" and not system.is_merged
    assert first["seed"] != second["seed"] and "batch" not in first
    captured = capsys.readouterr()
    assert "2 restored" in captured.out and str(output) in captured.out
    assert "images/s" in captured.err


def test_options_reach_the_system(system: Enlarger, photos: Path, tmp_path: Path) -> None:
    more = [
        "select=sample",
        "color=wavelet",
        "tile=32",
        "overlap=8",
        "batch=3",
        "scale=3.0",
        "fidelity=0.25",
        "reduce=2",
    ]
    assert COMMAND.main(words(photos, tmp_path / "out", *more)) == 0
    wanted = {"select": "sample", "color": "wavelet", "tile": 32, "overlap": 8, "batch": 3, "scale": 3}
    wanted |= {"prompt": None, "uncertainty": False, "fidelity": 0.25, "reduce": 2}
    assert wanted.items() <= system.calls[0].items() and "steps" not in system.calls[0]  # the system's own way
    assert system.is_merged
    entry = entries_of(tmp_path / "out")["a.png"]
    assert entry["prompt"] is None and entry["fidelity"] == 0.25 and entry["reduce"] == 2


@pytest.mark.parametrize(("word", "times"), [("scale=1", 1), ("reduce=2", 0)])
def test_large_photographs_are_told_once_how_they_are_done_sooner(
    system: Enlarger,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    word: str,
    times: int,
) -> None:
    monkeypatch.setattr("varestorer.commands.restore.LARGE", 4)
    assert COMMAND.main(words(photos, tmp_path / "out", word)) == 0
    assert len(system.calls) > 1 and capsys.readouterr().err.count("scale=1 reduce=2 keeps their size") == times


def test_a_model_says_what_it_is_poor_at_when_it_is_asked_for(
    system: Enlarger, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system.weak = {"select=sample": "it guesses", "color=adain": "it blushes"}
    assert COMMAND.main(words(photos, tmp_path / "out", "select=sample")) == 0
    shown = capsys.readouterr()
    text = shown.out + shown.err
    assert "this model is poor at select=sample: it guesses" in text and "blushes" not in text


def test_a_face_is_told_of_where_the_model_draws_faces_badly(
    system: Enlarger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = {"person.png": skimage.data.astronaut()[:256, 100:356], "cat.png": skimage.data.chelsea()}
    (tmp_path / "in").mkdir()
    for name, levels in pictures.items():
        Image.fromarray(levels).save(tmp_path / "in" / name)
    system.weak = {"faces": "it squints"}
    assert COMMAND.main(words(tmp_path / "in", tmp_path / "out", "scale=1")) == 0
    told = "it seems to show a face, which this model is poor at: it squints"
    assert capsys.readouterr().err.count(told) == 1
    entries = entries_of(tmp_path / "out")
    assert entries["person.png"]["warnings"] == [told] and "warnings" not in entries["cat.png"]


def test_uncertainty_is_the_mean_over_scales_beside_the_result(system: Enlarger, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert COMMAND.main(words(photos, output, "uncertainty=true")) == 0
    entry = entries_of(output)["sub/b.png"]
    heat = load_image(output / entry["uncertainty"])
    assert heat.shape == load_image(output / entry["output"]).shape
    assert torch.equal(heat, heat[:, :1, :1].expand_as(heat)) and 0.1 < heat.mean() < 0.9


def test_a_broken_file_is_named_and_ends_with_one(
    system: Enlarger, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "broken.jpg").write_bytes(b"no jpeg")
    assert COMMAND.main(words(photos, tmp_path / "out")) == 1
    captured = capsys.readouterr().out
    assert "failed: broken.jpg" in captured and "2 restored, 1 failed" in captured
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.*")) == ["a.png", "b.png", "restore.json"]


def test_an_image_over_max_pixels_is_named(
    system: Enlarger, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (50, 30)).save(photos / "large.png")
    assert COMMAND.main(words(photos, tmp_path / "out", "max_pixels=1000")) == 1
    assert "failed: large.png" in capsys.readouterr().out
    assert len(system.calls) == 2


def test_results_are_left_alone_unless_overwritten(
    system: Enlarger, prompts: list[str], photos: Path, tmp_path: Path
) -> None:
    for more, calls in [(("prompt=a",), 2), (("prompt=b",), 2), (("prompt=c", "overwrite=true"), 4)]:
        assert COMMAND.main(words(photos, tmp_path / "out", *more)) == 0
        assert len(system.calls) == calls
    assert prompts == ["a", "c"]  # nothing is encoded where nothing is restored
    assert entries_of(tmp_path / "out")["a.png"]["prompt"] == "c"


def test_entries_say_what_made_them_and_results_of_other_settings_are_named(
    system: Enlarger, prompts: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert COMMAND.main(words(photos, output, "tile=32", "color=adain")) == 0
    usual = {"ckpt": "any", "scale": 4, "select": "argmax", "steps": "one", "overlap": None, "compat": None}
    assert (usual | {"tile": 32, "color": "adain", "prompt": None}).items() <= entries_of(output)["a.png"].items()
    Image.new("RGB", (5, 3)).save(photos / "new.png")
    capsys.readouterr()
    assert COMMAND.main(words(photos, output, "tile=32", "scale=2", "prompt=a dog")) == 0
    captured = capsys.readouterr()
    made = (
        "sub/b.png was made with scale=4 color=adain prompt=null, not scale=2 color=none prompt=a dog; overwrite=true"
    )
    assert made in captured.err + captured.out
    assert "1 restored, 2 had a result already, 2 of them of other settings (overwrite=true" in captured.out
    assert entries_of(output)["a.png"]["scale"] == 4 and entries_of(output)["new.png"]["scale"] == 2
    assert COMMAND.main(words(photos / "new.png", output, "tile=32", "scale=2", "prompt=a dog")) == 0
    assert "1 had a result already (overwrite" in capsys.readouterr().out


def test_a_tilde_is_the_users_folder(
    system: Enlarger, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert COMMAND.main(words(Path("~") / photos.name, Path("~/out"))) == 0
    assert (tmp_path / "out/sub/b.png").is_file() and not (tmp_path / "~").exists()


def test_a_published_teacher_is_no_student(
    system: Enlarger, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system.student_config = StudentConfig(lora_rank=0)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "teacher.pth")
    system.source = tmp_path / "teacher.pth"
    assert COMMAND.main(words(photos, tmp_path / "out", f"ckpt={tmp_path / 'teacher.pth'}")) == 2
    assert "is a teacher without adapters; use steps=multi" in capsys.readouterr().err
    assert COMMAND.main(words(photos, tmp_path / "out", f"ckpt={tmp_path / 'teacher.pth'}", "steps=multi")) == 0
    system.source = tmp_path
    assert COMMAND.main(words(photos, tmp_path / "other", f"ckpt={tmp_path}")) == 0


def test_a_model_without_text_says_that_the_prompt_changes_nothing(
    system: Enlarger, prompts: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system.transformer.config.text_width = 8
    assert COMMAND.main(words(photos, tmp_path / "out", "prompt=a dog")) == 0
    assert prompts == [] and system.calls[0]["prompt"] is None
    entry = entries_of(tmp_path / "out")["a.png"]
    assert (entry["prompt"], entry["prompt_used"]) == ("a dog", False)
    assert "trained without text: the prompt is recorded" in "".join(capsys.readouterr())


def test_a_model_without_text_gets_no_captions(
    system: Enlarger, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    system.transformer.config.text_width = 8
    monkeypatch.setattr(Captioner, "caption", lambda captioner, images: pytest.fail("nobody would read it"))
    assert COMMAND.main(words(photos, tmp_path / "out", "caption=auto")) == 0
    assert entries_of(tmp_path / "out")["a.png"]["prompt"] is None
    assert "trained without text: no captions are made" in "".join(capsys.readouterr())


def test_an_encoder_of_another_width_is_refused(
    system: Enlarger, prompts: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system.transformer.config.text_width = 8
    assert COMMAND.main(words(photos, tmp_path / "out", "prompt=a dog", "text_encoder=any")) == 1
    assert "width 2048" in capsys.readouterr().err
    assert system.calls == []


def test_captions_of_a_folder_end_to_end(
    bundle: Path, text_models: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "broken.jpg").write_bytes(b"no jpeg")
    output, plain = tmp_path / "out", tmp_path / "plain"
    assert COMMAND.main(words(photos, output, f"ckpt={bundle}", "caption=auto", *text_models)) == 1
    entries = entries_of(output)
    captions = [entries[name]["prompt"] for name in ("a.png", "sub/b.png")]
    assert all(captions) and "prompt_used" not in entries["a.png"]
    assert "broken.jpg" in entries["broken.jpg"]["error"]
    assert "2 restored, 1 failed" in capsys.readouterr().out
    assert COMMAND.main(words(photos / "a.png", plain, f"ckpt={bundle}")) == 0
    assert not torch.equal(load_image(output / "a.png"), load_image(plain / "a.png"))
    given = [f"prompt={captions[0]}", text_models[1]]
    assert COMMAND.main(words(photos / "a.png", plain, f"ckpt={bundle}", "overwrite=true", *given)) == 0
    assert torch.equal(load_image(output / "a.png"), load_image(plain / "a.png"))


def test_captioner_and_encoder_are_gone_before_the_transformer_runs(
    bundle: Path, text_models: list[str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BlipForConditionalGeneration, T5EncoderModel

    events: list[tuple[str, set[str]]] = []

    def record(owner: type, name: str) -> None:
        real: Callable = getattr(owner, name)

        def recorded(self, *args, **kwargs):
            alive = {type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, networks)}
            events.append((f"{owner.__name__}.{name}", alive))
            return real(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)

    networks = (BlipForConditionalGeneration, T5EncoderModel)
    for owner, name in [(Captioner, "caption"), (TextEncoder, "encode"), (VARestorer, "to"), (VARestorer, "restore")]:
        record(owner, name)
    loading = len(events)
    assert COMMAND.main(words(photos, tmp_path / "out", f"ckpt={bundle}", "caption=auto", *text_models)) == 0
    names = [name for name, _ in events[loading:]]
    start = names.index("Captioner.caption")
    assert list(dict.fromkeys(names[start:])) == [
        "Captioner.caption",
        "TextEncoder.encode",
        "VARestorer.to",
        "VARestorer.restore",
    ]
    alive = dict(reversed(events))  # at the first call of each
    assert all("BlipForConditionalGeneration" not in alive[name] for name in names if name != "Captioner.caption")
    assert alive["VARestorer.restore"] == set()
    assert dict(events)["Captioner.caption"] == {"BlipForConditionalGeneration"}


def test_a_second_run_needs_no_text_encoder(
    bundle: Path, text_models: list[str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [f"ckpt={bundle}", "prompt=a dog", "overwrite=true", text_models[1]]
    assert COMMAND.main(words(photos, tmp_path / "out", *more)) == 0
    first = (tmp_path / "out/a.png").read_bytes()
    monkeypatch.setattr(TextEncoder, "_load", lambda encoder: pytest.fail("the features are on the disk"))
    assert COMMAND.main(words(photos, tmp_path / "out", *more)) == 0
    assert (tmp_path / "out/a.png").read_bytes() == first


def test_captions_describe_the_preview_that_the_restorer_cleaned(
    tiny_system: VARestorer, text_models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    tiny_system.restorer = torch.nn.Threshold(2.0, 0.25)  # everything becomes 0.25
    monkeypatch.setattr(VARestorer, "from_pretrained", lambda ckpt, device, merge: tiny_system)
    monkeypatch.setattr(Captioner, "caption", lambda captioner, images: seen.append(images) or ["a dog"])
    sizes = {"tall.png": (5, 50), "small.png": (2, 3)}
    for name, size in sizes.items():
        Image.new("RGB", size, (200, 100, 50)).save(tmp_path / name)
        more = ["caption=auto", "scale=2", *text_models]
        assert COMMAND.main(words(tmp_path / name, tmp_path / "out", *more)) == 0
    longest = tiny_system.tile
    assert [tuple(image.shape) for image in seen] == [(1, 3, longest, round(5 * longest / 50)), (1, 3, 6, 4)]
    assert all(torch.equal(image, torch.full_like(image, 0.25)) for image in seen)
    assert entries_of(tmp_path / "out")["small.png"]["prompt"] == "a dog"


def test_compat_draws_what_the_seed_of_the_file_says(bundle: Path, photos: Path, tmp_path: Path) -> None:
    def restore(name: str, *more: str) -> Tensor:
        assert COMMAND.main(words(photos, tmp_path / name, f"ckpt={bundle}", "compat=official", *more)) == 0
        return load_image(tmp_path / name / "sub/b.png")

    first = restore("first")
    assert first.shape == (3, 12, 20)
    (photos / "a.png").unlink()  # the seed is the file's own: what else there is does not matter
    assert torch.equal(first, restore("again"))
    assert not torch.equal(first, restore("other", "seed=1"))


def test_without_ckpt_it_is_the_shipped_model_which_compat_refuses(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word for word in words(photos, tmp_path / "out", "scale=2") if not word.startswith("ckpt=")]
    assert COMMAND.main(given) == 0
    assert load_image(tmp_path / "out" / "sub/b.png").shape == (3, 6, 10)
    assert entries_of(tmp_path / "out")["a.png"]["ckpt"] == DEFAULT
    assert COMMAND.main([*given, "compat=official", "overwrite=true"]) == 2
    assert "for students like the released one, and this has student.lora_targets" in capsys.readouterr().err


def test_compat_gets_prompt_tiles_and_both_global_generators_seeded(
    system: Enlarger, prompts: list[str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple] = []
    drawn: list[tuple[float, float]] = []

    def restore_official(system: Enlarger, image_3HW: Tensor, scale: float, *, prompt: Tensor, tiled: bool) -> Tensor:
        calls.append((scale, prompt.shape, tiled))
        drawn.append((random.random(), torch.rand(1).item()))
        return image_3HW

    monkeypatch.setattr("varestorer.systems.official.restore_official", restore_official)
    for number, more in enumerate([[], ["tile=64"]]):
        given = words(photos, tmp_path / str(number), "compat=official", "prompt=a dog", "scale=2", *more)
        assert COMMAND.main(given) == 0
    assert calls == [(2, (3, 2048), False)] * 2 + [(2, (3, 2048), True)] * 2
    assert drawn[:2] == drawn[2:]
    assert drawn[0][0] != drawn[1][0] and drawn[0][1] != drawn[1][1]
    assert not system.is_merged and system.calls == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("input=/nowhere/at all", "nowhere/at all does not exist"),
        ("select=best", "select must be one of argmax, sample, got select=best"),
        ("steps=few", "steps must be one, multi or a number"),
        ("scale=0", "scale must be above 0"),
        ("scale=nan", "scale must be a finite number"),
        ("scale=big", "big"),
        ("batch=0", "batch must be at least 1"),
        ("overlap=-1", "overlap must be at least 0"),
        ("tile=0", "tile must be at least 1"),
        ("color=lab", "color must be one of none, adain, wavelet, got color=lab"),
        ("caption=yes please", "caption"),
        ("caption=blip", "caption must be one of none, auto, got caption=blip"),
        ("compat=exact", "compat must be one of official, got compat=exact"),
        ("max_pixels=0", "max_pixels must be at least 1"),
        ("uncertainty=maybe", "uncertainty"),
        ("device=tpu", "device must be auto, cpu, cuda, cuda:N or mps, got"),
        ("prompt=a dog caption=auto", "prompt and caption=auto contradict"),
        ("steps=multi uncertainty=true", "uncertainty= and fidelity="),
        ("fidelity=1.5", "fidelity must be"),
        ("fidelity=0.5 sizes=[1,4]", "fidelity= and reduce= are for one size"),
        ("reduce=2 sizes=[1,4]", "fidelity= and reduce= are for one size"),
        ("reduce=0", "reduce must be at least 1"),
        ("compat=official reduce=2", "leave out reduce=2"),
        ("compat=official select=sample", "leave out select=sample"),
        ("compat=official steps=2 color=adain", "leave out steps=2 color=adain"),
        ("compat=official uncertainty=true batch=4", "leave out batch=4 uncertainty=True"),
        ("precision=half", "precision must be one of auto, fp32, bf16, got precision=half"),
        ("linears=int4", "linears must be one of none, int8, fp8, got linears=int4"),
        ("linears=int8 steps=2", "linears=int8 is for one step, got steps=2"),
        ("compat=official precision=bf16", "leave out precision=bf16"),
        ("colur=red", "colur"),
    ],
)
def test_wrong_commands_end_with_two_and_load_nothing(
    wrong: str,
    message: str,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(VARestorer, "from_pretrained", lambda ckpt, device, merge: pytest.fail("something was loaded"))
    more = [wrong] if wrong.startswith(("input", "caption=yes")) else wrong.replace(" dog", "_dog").split()
    assert COMMAND.main(words(photos, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("tile=48", "tile must be 32 or 64 pixels for this model, got tile=48"),
        ("overlap=64", "overlap must be below the tile's 64 pixels, got overlap=64"),
        ("overlap=40 tile=32", "below the tile's 32 pixels"),
        ("steps=11", "steps must be one, multi or 1 to 10 for this model, got steps=11"),
        ("compat=official tile=32", "tile must be 64 pixels for compat=official"),
    ],
)
def test_what_the_model_cannot_do_ends_with_two(
    wrong: str, message: str, system: Enlarger, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert COMMAND.main(words(photos, tmp_path / "out", *wrong.split())) == 2
    assert message in capsys.readouterr().err
    assert system.calls == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("steps", "is_merged"), [("one", True), ("2", False)])
def test_the_means_are_the_users_and_the_report_names_what_rounds(
    steps: str, is_merged: bool, system: Enlarger, photos: Path, tmp_path: Path
) -> None:
    assert COMMAND.main(words(photos, tmp_path / "out", "precision=bf16", "compile=true", f"steps={steps}")) == 0
    assert system.acceleration == Acceleration(merge=is_merged, precision="bf16", compile=True)
    assert {(e["precision"], e["linears"]) for e in entries_of(tmp_path / "out").values() if "output" in e} == {
        ("bf16", "none")
    }


def test_a_merged_model_has_no_teacher(
    system: Enlarger, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system.student_config = StudentConfig(merged=True)
    assert COMMAND.main(words(photos, tmp_path / "out", "steps=2")) == 2
    assert "steps must be one for a model whose adapters are merged" in capsys.readouterr().err
    assert COMMAND.main(words(photos, tmp_path / "out")) == 0


def test_input_and_output_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMAND.main([]) == 2
    assert "input=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "size"),
    [
        ("scale=2", (10, 6)),
        ("reduce=2", (20, 12)),
        ("width=30", (30, 18)),
        ("height=9", (15, 9)),
        ("megapixels=0.00006", (10, 6)),
    ],
)
def test_the_size_that_is_asked_for_comes_out_as_a_file(
    bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, size: tuple[int, int]
) -> None:
    result = tmp_path / "new" / "better.webp"
    given = [f"input={photos / 'a.png'}", f"output={result}", f"ckpt={bundle}", "device=cpu", "quality=80", word]
    assert COMMAND.main(given) == 0
    with Image.open(result) as file:
        assert file.format == "WEBP" and file.size == size
    assert [path.name for path in result.parent.iterdir()] == ["better.webp"]
    assert f"a.png: 5 x 3 -> {size[0]} x {size[1]} pixels, squares: 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["width=9", "scale=2"], "width says the size of the result, and so do scale"),
        (["width=9", "megapixels=1"], "megapixels and width contradict"),
        (["height=0"], "height must be at least 1"),
        (["format=gif"], "format must be one of png, jpg, webp, avif, tif, got format=gif"),
        (["quality=80"], "quality=80 is for jpg, webp and avif, and results are png"),
        (["quality=101", "format=jpg"], "quality must be at least 1 and at most 100"),
    ],
)
def test_impossible_sizes_and_formats_leave_nothing_behind(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert COMMAND.main(words(photos, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
