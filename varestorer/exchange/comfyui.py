"""A node for ComfyUI: copy this file into `ComfyUI/custom_nodes`, with varestorer in ComfyUI's Python.

It restores by any checkpoint (`ckpt=` of `varestorer restore`), stops when ComfyUI is told to, and shows its progress.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

import varestorer


@lru_cache(maxsize=1)
def _system(checkpoint: str, device: str) -> Any:
    """The model last used; a checkpoint is read once, however many images follow."""
    return varestorer.load(checkpoint or None, device=device, merge=True, precision="auto")


class VARestorerUpscale:
    """One-step super-resolution of the images of a batch."""

    CATEGORY = "image/upscaling"
    FUNCTION = "restore"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  # ComfyUI's name
        """What the node's fields are."""
        return {
            "required": {
                "image": ("IMAGE",),
                "checkpoint": ("STRING", {"default": "nano"}),
                "scale": ("FLOAT", {"default": 4.0, "min": 1.0, "max": 8.0, "step": 0.5}),
                "color": (["none", "adain", "wavelet"],),
            }
        }

    def restore(self, image: Tensor, checkpoint: str, scale: float, color: str) -> tuple[Tensor]:
        """Restore images (B, H, W, C) in [0, 1], as ComfyUI has them; of four channels the first three are taken."""
        system = _system(checkpoint, str(comfy.model_management.get_torch_device()))
        bar = comfy.utils.ProgressBar(len(image))
        restored: list[Tensor] = []

        def show(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(len(restored) * total + done, len(image) * total)

        for picture_HWC in image:
            picture = picture_HWC[..., :3].movedim(-1, 0).clamp(0, 1)
            result = system.restore_picture(picture, scale, color=color, progress=show)
            restored.append(result.image.movedim(0, -1).cpu())
        return (torch.stack(restored),)


NODE_CLASS_MAPPINGS = {"VARestorerUpscale": VARestorerUpscale}
NODE_DISPLAY_NAME_MAPPINGS = {"VARestorerUpscale": "VARestorer (one-step upscale)"}
