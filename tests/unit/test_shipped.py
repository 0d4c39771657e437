"""The model that comes with the package: whole, small, in the wheel, the default, and better than enlarging."""

import tomllib
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from varestorer.data.datasets import embedded_photographs
from varestorer.systems.varestorer import VARestorer
from varestorer.utils.images import resize
from varestorer.utils.iqa import create_metric, missing_weights
from varestorer.weights import DEFAULT
from varestorer.weights.bundle import (
    ASSETS,
    adapter_tensors,
    named_or_default,
    read_config,
    shipped,
    student_of,
)
from varestorer.weights.restorers import load_restorer

BUNDLE = ASSETS / DEFAULT
MOST_BYTES = 24e6


@pytest.fixture(scope="module")
def nano() -> VARestorer:
    return VARestorer.from_pretrained(merge=True)


def test_all_of_it_is_small_and_packed_into_the_wheel() -> None:
    files = [path for path in BUNDLE.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    root = Path(__file__).parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["varestorer"]
    packed = {path for pattern in patterns for path in (root / "varestorer").glob(pattern)}
    assert {root / "varestorer" / path.relative_to(ASSETS.parent) for path in files} <= packed


def test_its_card_says_how_it_was_made_and_what_it_is_worth() -> None:
    card = (BUNDLE / "README.md").read_text(encoding="utf-8")
    for heading in ("Data", "Training", "Measured", "Limits", "Licenses"):
        assert f"\n## {heading}\n" in card
    assert "license: mit" not in card.splitlines()[:3]  # the photographs' terms are named instead


def test_a_name_is_the_shipped_model_unless_a_file_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shipped(DEFAULT) == BUNDLE
    assert shipped("other") == Path("other") and shipped(f"x/{DEFAULT}") == Path("x", DEFAULT)
    assert shipped(f"./{DEFAULT}") == Path(DEFAULT)  # a place is meant, where nothing is
    (tmp_path / DEFAULT).mkdir()
    monkeypatch.chdir(tmp_path)
    assert shipped(DEFAULT) == BUNDLE  # what holds no model is not meant
    for name in ("transformer.safetensors", "config.json"):
        (tmp_path / DEFAULT / name).touch()
    assert shipped(DEFAULT) == named_or_default(DEFAULT) == Path(DEFAULT)
    assert named_or_default(None) == BUNDLE


def test_it_is_the_default_and_has_teacher_student_and_restorer(nano: VARestorer) -> None:
    config = read_config(BUNDLE)
    assert nano.config["transformer"] == config["transformer"] and nano.student_config.merged
    apart = VARestorer.from_pretrained(DEFAULT)
    assert apart.student_config.lora_rank and not apart.student_config.merged
    square = torch.rand(1, 3, apart.tile, apart.tile)
    one, multi = (apart.restore_batch(square, steps=steps).images_B3HW for steps in ("one", "multi"))
    assert not torch.equal(one, multi)
    assert apart.restorer is not None
    assert torch.equal(load_restorer(DEFAULT)(square), apart.restorer(square))


def test_its_files_tell_the_same_student() -> None:
    assert student_of(BUNDLE / "adapters.safetensors") == read_config(BUNDLE)["student"]


def test_its_teacher_may_be_taken_without_its_student() -> None:
    config = {**read_config(BUNDLE), "weights": {"tokenizer": DEFAULT, "transformer": DEFAULT}}
    options = {name: config[name] for name in ("schedule", "tokenizer", "transformer", "student", "weights")}
    taken, fresh = VARestorer(**options), VARestorer(**options, new_adapters=True)
    other_rank = {**options, "student": {**config["student"], "lora_rank": 2, "lora_targets": ["ffn"]}}
    for system, has_student in ((taken, True), (fresh, False), (VARestorer(**other_rank, new_adapters=True), False)):
        ups = [tensor for name, tensor in adapter_tensors(system).items() if name.endswith("lora_up.weight")]
        assert ups and any(tensor.any() for tensor in ups) == has_student
        assert torch.equal(system.transformer.head.weight, taken.transformer.head.weight)


@pytest.fixture(scope="module", params=["china", "coffee"])
def restored(nano: VARestorer, request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A photograph, and what the model and bicubic interpolation make of its blurred quarter."""
    photo = dict(embedded_photographs("heldout"))[request.param][:, 100:356, 150:406]
    small = resize(gaussian_blur(photo, [17, 17], 2.0), (64, 64), "area")
    return photo, nano.restore(small, 4).image, resize(small, (256, 256), "bicubic").clamp(0, 1)


@pytest.mark.parametrize("metric", ["ms_ssim", "lpips"])
def test_it_restores_better_than_bicubic(restored: tuple[torch.Tensor, ...], metric: str) -> None:
    if missing := missing_weights(metric):
        pytest.skip(f"weights of {metric} are missing: {missing}")
    score = create_metric(metric)
    photo, image, bicubic = (picture[None] for picture in restored)
    ours, enlarged = score(image, photo), score(bicubic, photo)
    assert ours < 0.75 * enlarged if score.lower_is_better else ours > enlarged


def test_what_the_shipped_model_is_poor_at_goes_with_it(tmp_path: Path) -> None:
    nano = VARestorer.from_pretrained()
    assert {"select=sample", "steps=multi", "faces"} <= nano.weak.keys()
    nano.save_pretrained(tmp_path / "copy")
    assert VARestorer.from_pretrained(tmp_path / "copy").weak == nano.weak
