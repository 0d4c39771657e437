"""The general SwinIR through spandrel against the golden tensors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from varestorer.parity.infinity import restorer_intermediates
from varestorer.weights.restorers import restorer_from_state_dict

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "fixtures/infinity/swinir.safetensors")


def test_output_and_intermediates_match(golden: dict[str, Tensor]) -> None:
    weights = {name.removeprefix("sd/"): tensor for name, tensor in golden.items() if name.startswith("sd/")}
    names = set(weights)
    restorer = restorer_from_state_dict(weights)
    assert set(weights) == names
    got = restorer_intermediates(restorer, golden["input/image01"])
    assert (got["conv_first"] - golden["mid/conv_first"]).abs().max() < 1e-5
    assert (got["layer0"] - golden["mid/layer0"]).abs().max() < 1e-4
    assert (got["image01"] - golden["out/image01"]).abs().max() < 1e-5
    torch.testing.assert_close(restorer(golden["input/image01"]), got["image01"])
