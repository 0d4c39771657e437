"""Models for spandrel, loaded by its own loader: nano's restorer from the small image, and the whole one-step model."""

import math
from pathlib import Path

import pytest
import spandrel
import torch
from torch import Tensor

import varestorer
from varestorer.exchange.spandrel import CONFIG, open_whole, save_enlarging, save_whole
from varestorer.systems.varestorer import VARestorer
from varestorer.utils.errors import UserError
from varestorer.utils.images import resize
from varestorer.weights.files import read_tensors


def smooth_picture(side: int, seed: int = 0) -> Tensor:
    """(1, 3, side, side) in [0, 1]: noise whose power falls as that of photographs does."""
    noise = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed))
    rows, columns = torch.fft.fftfreq(side), torch.fft.rfftfreq(side)
    falling = torch.hypot(rows[:, None], columns[None]).clamp(min=1 / side) ** -1.5
    picture = torch.fft.irfft2(torch.fft.rfft2(noise - 0.5) * falling, s=(side, side))
    return (0.5 + picture / picture.std() * 0.15).clamp(0, 1)


def psnr(one: Tensor, other: Tensor) -> float:
    return -10 * math.log10(float((one - other).square().mean()))


def test_spandrel_knows_nanos_restorer_and_enlarges_by_it(tmp_path: Path) -> None:
    nano, path = VARestorer.from_pretrained(), tmp_path / "nano_4x.safetensors"
    save_enlarging(nano, path)
    model = spandrel.ModelLoader(device="cpu").load_from_file(path)
    assert isinstance(model, spandrel.ImageModelDescriptor)
    assert (model.architecture.id, model.purpose, model.scale) == ("RCAN", "SR", 4)
    image = smooth_picture(40)
    with torch.inference_mode():
        wanted = nano.restorer(resize(image, (160, 160))).clamp(0, 1)
        got = model(image.clone())
    assert got.shape == wanted.shape
    inside = slice(16, -16)
    assert psnr(got[..., inside, inside], wanted[..., inside, inside]) > 45
    assert psnr(got, wanted) > psnr(resize(image, (160, 160)), wanted) + 6  # it restores, and not by enlarging alone
    rim = (got - wanted).clone()
    rim[..., 8:-8, 8:-8] = 0
    pixels = 160 * 160 - 144 * 144
    assert abs(float(rim.sum()) / 3 / pixels) < 1 / 255  # no dark frame, though convolutions see black beyond the edge


def test_a_restorer_of_another_kind_or_none_is_refused(tiny_system: VARestorer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scale=4 is for a restorer that folds pixels"):
        save_enlarging(tiny_system, tmp_path / "x.safetensors")


def test_the_whole_model_is_one_file_that_spandrel_loads_once_installed(
    tiny_system: VARestorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spandrel, "MAIN_REGISTRY", registry := spandrel.MAIN_REGISTRY.copy())
    path = tmp_path / "whole.safetensors"
    image = smooth_picture(9)
    save_whole(tiny_system, path)
    wanted = tiny_system.restore_picture(image[0]).image
    loader = spandrel.ModelLoader(device="cpu", registry=registry)
    with pytest.raises(spandrel.UnsupportedModelError):
        loader.load_from_file(path)
    for _ in range(2):
        varestorer.spandrel.install()
    model = loader.load_from_file(path)
    assert isinstance(model, spandrel.ImageModelDescriptor)
    assert (model.architecture.id, model.scale, model.tiling) == ("VARestorer", 4, spandrel.ModelTiling.INTERNAL)
    torch.testing.assert_close(model(image)[0], wanted)


def test_files_of_another_format_or_that_do_not_fit_are_refused(tiny_system: VARestorer, tmp_path: Path) -> None:
    save_whole(tiny_system, path := tmp_path / "whole.safetensors")
    tensors = read_tensors(path)
    with pytest.raises(UserError, match="transformer does not fit the model; 1 missing: head.weight"):
        open_whole({name: tensor for name, tensor in tensors.items() if name != "transformer.head.weight"})
    later = bytes(tensors[CONFIG].tolist()).replace(b'"format": 1', b'"format": 9')
    with pytest.raises(UserError, match="the model is of format 9"):
        open_whole(tensors | {CONFIG: torch.tensor(list(later), dtype=torch.uint8)})
