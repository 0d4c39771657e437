"""Other people's super-resolution models, through spandrel: what a user would pick instead."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from varestorer.evaluation.sources import Candidate, timed
from varestorer.utils.errors import UsageError
from varestorer.utils.files import expand_user
from varestorer.utils.images import load_image
from varestorer.utils.tiling import restore_tiled

TILE, OVERLAP = 256, 32
"""Side of the squares that larger images are cut into, and what neighbours share; pixels of the LQ image."""


class SpandrelSource:
    """Enlarges the low-quality image with a model file that spandrel knows.

    Weights of any precision run in float32, so that a figure does not depend on the machine.

    Args:
        model_path: the file (.pth, .safetensors, ...).
        scale: that is wanted.
        device: where it runs.
    Raises:
        UsageError: no such file, no model that spandrel knows, or one of another kind or scale.
    """

    def __init__(self, model_path: str | Path, scale: int = 4, device: torch.device | str = "cpu") -> None:
        self.path = expand_user(model_path)
        self.device = torch.device(device)
        self.model = _load(self.path, self.device)
        if self.model.scale != scale:
            known = f"{self.path.name} ({self.model.architecture.name}) enlarges {self.model.scale} times"
            raise UsageError(f"{known}, and scale={scale} was asked for; use scale={self.model.scale}")
        self.scale = scale
        self.method = f"{self.path.stem} ({self.model.architecture.name})"
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.settings: dict[str, Any] = {
            "method": "spandrel",
            "model_path": f"{self.path.name} (SHA-256 {digest[:16]})",
        }
        self.runs_ahead = self.device.type != "cpu"

    def __call__(self, name: str, lq_path: Path) -> Candidate:
        """Enlarge one image, whole or in tiles.

        Raises:
            UserError: unreadable file, or too little memory for this image.
        """
        lq_3hw = load_image(lq_path)
        return timed(lambda: self.enlarge(lq_3hw), lq_path)

    def enlarge(self, lq_3hw: Tensor) -> Tensor:
        """(3, h, w) in [0, 1] to (3, h * scale, w * scale) on the CPU."""
        height, width = lq_3hw.shape[-2:]
        if max(height, width) <= TILE:
            return self._run(lq_3hw[None])[0]

        def run(tiles_B3tt: Tensor, numbers: list[int]) -> Tensor:
            # the tiles are blended at the size of the input: there an output pixel is a channel
            return pixel_unshuffle(self._run(tiles_B3tt), self.scale)

        blended = restore_tiled(lq_3hw, (height, width), TILE, OVERLAP, 1, run)
        return pixel_shuffle(blended, self.scale).clamp(0, 1)

    def _run(self, lq_B3hw: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.model(lq_B3hw.to(self.device)).float().cpu()


def _load(path: Path, device: torch.device) -> Any:
    """Spandrel's description of a model of RGB images, in float32."""
    from safetensors import SafetensorError
    from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError

    if not path.is_file():
        raise UsageError(f"model_path must be the file of a super-resolution model, and {path} is no file")
    try:
        model = ModelLoader("cpu").load_from_file(path)
    except UnsupportedModelError as error:
        raise UsageError(f"spandrel knows no model of the form of {path}; its page lists those it loads") from error
    except (OSError, ValueError, RuntimeError, LookupError, SafetensorError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"model_path={path} cannot be read as a model: {reason}") from error
    if not isinstance(model, ImageModelDescriptor) or (model.input_channels, model.output_channels) != (3, 3):
        raise UsageError(f"{path.name} ({model.architecture.name}) does not turn an RGB image into another")
    return model.to(device).float().eval()
