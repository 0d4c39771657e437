"""Other people's models through spandrel, on a tiny one that is made here."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from varestorer.evaluation import sources as module
from varestorer.evaluation.sources import SpandrelSource, source_keys
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.images import load_image, resize, save_image
from varestorer.weights.bundle import shipped
from varestorer.weights.restorers import load_restorer


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of one convolution that enlarges twice, in half precision."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"0": (8, 3, 3, 3), "2": (8, 8, 3, 3), "4": (12, 8, 3, 3)}  # body of a Real-ESRGAN Compact
    tensors = {f"body.{i}.weight": torch.randn(shape, generator=generator) / 20 for i, shape in shapes.items()}
    tensors |= {f"body.{i}.bias": torch.zeros(shape[0]) for i, shape in shapes.items()}
    tensors |= {f"body.{i}.weight": torch.full((8,), 0.25) for i in (1, 3)}
    path = tmp_path_factory.mktemp("model") / "tiny_x2.safetensors"
    save_file({name: tensor.half() for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture
def lq(tmp_path: Path) -> Path:
    path = tmp_path / "lq.png"
    save_image(path, torch.rand(3, 21, 34, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25)
    return path


def test_a_half_precision_file_runs_in_float32(model_path: Path, lq: Path) -> None:
    source = SpandrelSource(model_path, 2)
    assert {p.dtype for p in source.model.model.parameters()} == {torch.float32}
    candidate = source("lq", lq)
    assert candidate.image.shape == (3, 42, 68) and candidate.image.dtype == torch.float32
    assert candidate.seconds is not None and candidate.path is None
    assert source.settings["model_path"].startswith("tiny_x2.safetensors (SHA-256 ")


def test_tiles_agree_with_the_whole(model_path: Path, lq: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SpandrelSource(model_path, 2)
    whole = source("lq", lq).image
    monkeypatch.setattr(module, "TILE", 16)
    monkeypatch.setattr(module, "OVERLAP", 8)
    sizes = []
    run = source._run
    monkeypatch.setattr(source, "_run", lambda x: sizes.append(tuple(x.shape)) or run(x))
    tiled = source("lq", lq).image
    assert set(sizes) == {(1, 3, 16, 16)} and tiled.shape == whole.shape
    # a tile knows nothing of what lies around it: at its edges the two differ a little
    assert (tiled - whole).abs().mean() < 2e-3


def test_a_model_of_scale_one_cleans_the_enlarged_image(lq: Path) -> None:
    source = SpandrelSource(shipped("nano") / "restorer.safetensors", 4)
    enlarged = resize(load_image(lq), (84, 136), mode="bicubic")
    wanted = load_restorer(source.path)(enlarged[None])[0].clamp(0, 1)
    assert torch.allclose(source("lq", lq).image.clamp(0, 1), wanted, atol=1e-3)


def test_the_scale_must_be_the_models(model_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tiny_x2.safetensors \(RealESRGAN Compact\) enlarges 2 times.*use scale=2"):
        SpandrelSource(model_path, 4)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [({"a": torch.zeros(2)}, "spandrel knows no model of the form of"), (None, "cannot be read as a model")],
)
def test_files_that_are_no_models(tensors: dict[str, Tensor] | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"nothing of the kind")
    if tensors:
        save_file(tensors, path)
    with pytest.raises(UsageError, match=message):
        SpandrelSource(path)
    with pytest.raises(UsageError, match="is no file"):
        SpandrelSource(tmp_path)


def test_too_little_memory_is_a_user_error(model_path: Path, lq: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, image: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    source = SpandrelSource(model_path, 2)
    monkeypatch.setattr(source, "make", fail)
    with pytest.raises(UserError, match=r"not enough GPU memory for .*lq\.png"):
        source("lq", lq)


def test_a_broken_image_is_a_user_error(model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot read the image"):
        SpandrelSource(model_path, 2)("x", tmp_path / "x.png")


def test_what_a_word_of_compare_stands_for(tmp_path: Path, model_path: Path) -> None:
    save_image(tmp_path / "plain" / "a.png", torch.rand(3, 8, 8))
    for folder, settings in (("made", {}), ("scored", {"predictions": "/there"}), ("odd", {})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "summary.json").write_text("{}")
        (tmp_path / folder / "settings.json").write_text(json.dumps(settings))
    save_image(tmp_path / "made" / "images" / "a.png", torch.rand(3, 8, 8))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    save_image(tmp_path / "run" / "samples" / "a.png", torch.rand(3, 8, 8))
    (tmp_path / "varestorer.pth").write_bytes(b"")
    for what, keys in [
        ("bicubic", {"method": "bicubic"}),
        ("nano", {"ckpt": "nano"}),
        ("owner/name", {"ckpt": "owner/name"}),
        (f"{tmp_path}/run", {"ckpt": f"{tmp_path}/run"}),
        (f"{tmp_path}/varestorer.pth", {"ckpt": f"{tmp_path}/varestorer.pth"}),
        (str(model_path), {"method": "spandrel", "model_path": str(model_path)}),
        (f"{tmp_path}/plain", {"predictions": f"{tmp_path}/plain"}),
        (f"{tmp_path}/made", {"predictions": f"{tmp_path}/made/images"}),
        (f"{tmp_path}/scored", {"predictions": "/there"}),
    ]:
        assert source_keys(what) == keys
    for what, message in (("odd", "does not say where the images are"), ("none", "is not here")):
        with pytest.raises(UsageError, match=message):
            source_keys(f"{tmp_path}/{what}")
