"""The one-step student as an ONNX file, run by onnxruntime beside torch."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from varestorer.commands.convert import COMMAND
from varestorer.exchange.onnx import OneStep, export
from varestorer.systems.varestorer import VARestorer
from varestorer.utils.errors import UserError
from varestorer.utils.seeds import torch_generator
from varestorer.weights import DEFAULT
from varestorer.weights.bundle import ASSETS, read_config

LEVEL = 1 / 255
SMALL = {
    "schedule": {"sides": [1, 2, 4]},
    "tokenizer": {"channels": 32, "num_decoder_blocks": 1},
    "transformer": {"width": 64, "depth": 2, "num_heads": 2},
    "student": {"lora_rank": 4},
    "restorer": {"num_features": 16, "num_groups": 1, "num_blocks": 1},
}


def small_bundle(folder: Path) -> Path:
    """The shipped model's parts and choices with fewer and smaller layers, of random weights that are not idle."""
    given = read_config(ASSETS / DEFAULT)
    system = VARestorer(**{part: (given[part] if part != "restorer" else {}) | sizes for part, sizes in SMALL.items()})
    generator = torch_generator(0, "test")
    with torch.no_grad():
        for name, parameter in system.transformer.named_parameters():
            if name.endswith(("bias", "lora_B.student.weight", "head.weight")):
                parameter.normal_(std=0.3, generator=generator)
    system.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["small", pytest.param("nano", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A bundle, and the file that the command makes of it."""
    folder = tmp_path_factory.mktemp("onnx")
    bundle = str(small_bundle(folder / "bundle")) if request.param == "small" else request.param
    assert COMMAND.main([f"input={bundle}", f"output={folder / 'model.onnx'}"]) == 0
    return bundle, folder / "model.onnx"


def squares(count: int, side: int) -> Tensor:
    """Smooth squares with edges: noise would not show whether bits near zero agree."""
    noise = torch.rand(count, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(count))
    return torch.nn.functional.interpolate(noise, (side, side), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("count", [1, 3])
def test_bits_are_equal_and_pixels_within_a_level_of_torch(model: tuple[str, Path], count: int) -> None:
    system = VARestorer.from_pretrained(model[0], merge=True)
    session = onnxruntime.InferenceSession(model[1])
    assert session.get_modelmeta().custom_metadata_map["tile"] == str(system.tile)
    image = squares(count, system.tile)
    restored, bits = session.run(["restored", "bits"], {"image": image.numpy()})
    with torch.inference_mode():
        wanted, wanted_bits = OneStep(system)(image)
    assert bits.shape == (count, system.schedule.num_tokens, system.transformer.config.latent_width)
    assert bits.dtype == bool and 0.1 < bits.mean() < 0.9
    assert np.array_equal(bits, wanted_bits.numpy())
    np.testing.assert_allclose(restored, wanted.numpy(), rtol=0, atol=LEVEL)
    whole = system.restore_batch(image)
    np.testing.assert_allclose(restored, whole.images_B3HW.numpy(), rtol=0, atol=LEVEL)


def test_models_that_are_no_single_pass_are_refused(tiny_system: VARestorer, tmp_path: Path) -> None:
    prefixed = tiny_system.config | {"student": {"lora_rank": 0, "conditioning": "prefix"}}
    with pytest.raises(UserError, match="restores in several steps"):
        export(VARestorer(**prefixed), tmp_path / "x.onnx")


def test_options_that_do_not_go_with_the_file_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in [
        (["output=x.onnx", "dtype=bf16"], "always merged and in fp32; leave out dtype="),
        (["output=x.onnx", "part=tokenizer"], "leave out part="),
        (["output=x.safetensors", "scale=4"], "scale=4 goes with part=restorer"),
        (["output=x.pth", "part=whole"], "part=whole write a .safetensors file, got output=x.pth"),
        (["output=x.safetensors", "scale=3", "part=restorer"], "got scale=3"),
    ]:
        assert COMMAND.main(["input=nano", *words]) == 2
        assert message in capsys.readouterr().err
