"""The node for ComfyUI, with stubs of the parts of ComfyUI that it calls."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import varestorer
from varestorer.systems.varestorer import VARestorer


class InterruptError(Exception):
    """What ComfyUI raises where the user stops the work."""


class ProgressBar:
    """Keeps what it was told; as `comfy.utils.ProgressBar`."""

    shown: list[tuple[int, int]] = []

    def __init__(self, total: int) -> None:
        self.total = total

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        self.shown.append((value, total or self.total))


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The node's file as ComfyUI imports it: copied into its folder of custom nodes."""
    management, utils, comfy = (ModuleType(f"comfy{name}") for name in (".model_management", ".utils", ""))
    management.get_torch_device = lambda: torch.device("cpu")  # type: ignore[attr-defined]
    management.throw_exception_if_processing_interrupted = lambda: None  # type: ignore[attr-defined]
    utils.ProgressBar = ProgressBar  # type: ignore[attr-defined]
    comfy.model_management, comfy.utils = management, utils  # type: ignore[attr-defined]
    for module in (comfy, management, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(ProgressBar, "shown", [])
    copied = tmp_path / "varestorer_node.py"
    copied.write_text((Path(varestorer.__file__).parent / "exchange" / "comfyui.py").read_text())
    spec = importlib.util.spec_from_file_location("varestorer_node", copied)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_node_restores_a_batch_as_the_package_does(
    node: ModuleType, tiny_system: VARestorer, tmp_path: Path
) -> None:
    tiny_system.save_pretrained(tmp_path / "tiny")
    made = node.NODE_CLASS_MAPPINGS["VARestorerUpscale"]
    assert node.NODE_DISPLAY_NAME_MAPPINGS.keys() == node.NODE_CLASS_MAPPINGS.keys()
    fields = made.INPUT_TYPES()["required"]
    given = {name: options[0] for name, (_, *options) in fields.items() if options}
    assert given == {"checkpoint": {"default": "nano"}, "scale": {"default": 4.0, "min": 1.0, "max": 8.0, "step": 0.5}}
    images = torch.rand(2, 5, 7, 4, generator=torch.Generator().manual_seed(0))
    words = {"checkpoint": str(tmp_path / "tiny"), "scale": 4.0, "color": fields["color"][0][0]}
    (result,) = getattr(made(), made.FUNCTION)(images, **words)
    assert result.shape == (2, 20, 28, 3) and made.RETURN_TYPES == ("IMAGE",)
    system = varestorer.load(tmp_path / "tiny", merge=True, precision="auto")
    for image, restored in zip(images, result, strict=True):
        wanted = system.restore_picture(image[..., :3].permute(2, 0, 1)).image
        torch.testing.assert_close(restored.permute(2, 0, 1), wanted)
    values = [value / total for value, total in ProgressBar.shown]
    assert values == sorted(values) and values[0] == 0 and values[-1] == 1 and 0.5 in values


def test_the_node_stops_when_comfyui_says_so(
    node: ModuleType, tiny_system: VARestorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise InterruptError

    tiny_system.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(sys.modules["comfy.model_management"], "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(InterruptError):
        node.VARestorerUpscale().restore(torch.rand(1, 5, 5, 3), str(tmp_path / "tiny"), 4.0, "none")
