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

LEVEL = 1 / 255


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model by the command, as a file."""
    path = tmp_path_factory.mktemp("onnx") / "nano.onnx"
    assert COMMAND.main(["input=nano", f"output={path}"]) == 0
    return path


def squares(count: int, side: int) -> Tensor:
    """Smooth squares with edges: noise would not show whether bits near zero agree."""
    noise = torch.rand(count, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(count))
    return torch.nn.functional.interpolate(noise, (side, side), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("count", [1, 3])
def test_bits_are_equal_and_pixels_within_a_level_of_torch(nano: Path, count: int) -> None:
    system = VARestorer.from_pretrained(merge=True)
    session = onnxruntime.InferenceSession(nano)
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
