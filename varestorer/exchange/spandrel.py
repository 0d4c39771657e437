"""For spandrel, and chaiNNer, ComfyUI and others that load models by it.

`save_enlarging` writes a restorer as a plain model that enlarges four times; nothing of this package is needed to load
it. `save_whole` writes a one-step model as a single file; who loads it calls `install` before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from varestorer.systems import system_class
from varestorer.transformer.adapters import assign_plain
from varestorer.utils.errors import UserError
from varestorer.utils.images import resize
from varestorer.weights.bundle import FORMAT, RESTORER
from varestorer.weights.files import check_names_and_shapes, save_tensors
from varestorer.weights.restorers import restorer_from_state_dict

SCALE = 4
ARCHITECTURE = "VARestorer"
CONFIG = "varestorer.config"  # JSON as bytes in a tensor: spandrel hands on tensors alone
LEVELS = 255  # by which spandrel's RCAN multiplies an image before its mean is taken off, and divides the result
DARK = -0.1  # a gray beyond the edges with which the rim comes out too bright
NEIGHBORS, CHANNELS, NOISE = 0.97, 0.9, 3e-4  # correlations of photographs' pixels and of their colors, and their noise


def save_enlarging(system: Any, path: Path) -> None:
    """Write a system's restorer as an RCAN that takes the small image itself.

    The restorer folds squares of 4 pixels of the image enlarged (bicubic) into channels before its first convolution.
    Enlarging, folding and that convolution are together one of 7 x 7 pixels of the small image. An RCAN has kernels of
    one size, so this is the 3 x 3 that comes nearest to it on average over photographs. Inside three pictures of RealSR
    the result was 0.7 to 0.8 levels (root mean square) from the restorer's, and as near to the photographs. With all
    kernels 7 x 7 it would be 0.01 to 0.2 levels, at four times the cost. At a picture's rim, 8 pixels wide, it is 2.9
    levels. UserError: the system has none, or one of another kind.
    """
    network: Any = getattr(system.restorer, "network", None)
    sizes = getattr(network, "hyperparameters", {})
    if type(network).__name__ != "RCAN" or not sizes["unshuffle_mod"] or sizes["norm"] or sizes["kernel_size"] != 3:
        raise UserError(f"scale={SCALE} is for a restorer that folds pixels into channels (an RCAN, as nano's)")
    tensors = dict(network.state_dict())
    tensors["head.0.weight"] = _nearest_head(tensors.pop("head.1.weight"))
    tensors["head.0.bias"] = tensors.pop("head.1.bias")
    low, high = (_rim_error(_beyond(tensors, gray), system.restorer) for gray in (DARK, 0.0))
    save_tensors(path, _beyond(tensors, DARK * high / (high - low)))


def _beyond(tensors: dict[str, Tensor], gray: float) -> dict[str, Tensor]:
    """An RCAN that sees `gray` beyond the edges of its image, where convolutions see 0: it is taken off first."""
    unit = torch.eye(3).reshape(3, 3, 1, 1)
    head = tensors["head.0.weight"]
    return tensors | {
        "sub_mean.weight": unit / LEVELS,
        "sub_mean.bias": torch.full((3,), -gray),
        "head.0.bias": tensors["head.0.bias"] + gray * head.sum(dim=(1, 2, 3)),
        "add_mean.weight": unit * LEVELS,
        "add_mean.bias": torch.zeros(3),
    }


@torch.inference_mode()
def _rim_error(tensors: dict[str, Tensor], restorer: Any) -> float:
    """How much brighter than the restorer's the rim of an enlarged image is, on average over noise like photographs.

    The nearest 3 x 3 head takes some of what the bicubic kernel sees inside from beyond the edge. With black there, the
    rim is darker by some 3 levels of 255, and a viewer sees a frame; it changes in proportion to the gray.
    """
    from spandrel import ModelLoader

    enlarging = ModelLoader(device="cpu").load_from_state_dict(dict(tensors))
    noise = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    frequencies = torch.hypot(torch.fft.fftfreq(64)[:, None], torch.fft.rfftfreq(64)[None])
    field = torch.fft.irfft2(torch.fft.rfft2(noise) * frequencies.clamp(min=1 / 64) ** -1.5, s=(64, 64))
    small = (0.5 + 0.15 * field / field.std()).clamp(0, 1)
    difference = enlarging(small.clone()) - restorer(resize(small, (SCALE * 64, SCALE * 64)))
    difference[..., 2 * SCALE : -2 * SCALE, 2 * SCALE : -2 * SCALE] = 0
    return float(difference.mean())


def _nearest_head(folded: Tensor) -> Tensor:
    """The convolution (out, 3, 3, 3) of the small image that is nearest to one (out, 48, 3, 3) of the folded large one.

    Nearest in the mean square over images whose pixels correlate as those of a photograph: linear regression with
    the covariances of a first-order field.
    """
    reach = 3  # pixels of the small image on each side: two by the bicubic kernel, one by the convolution
    impulse = torch.zeros(3, 3, 4 * reach + 3, 4 * reach + 3, dtype=torch.float64)
    impulse[range(3), range(3), 2 * reach + 1, 2 * reach + 1] = 1
    size = SCALE * impulse.shape[-1]
    large = nn.functional.interpolate(impulse, (size, size), mode="bicubic", antialias=True)  # as `images.resize`
    answer = nn.functional.conv2d(nn.functional.pixel_unshuffle(large, SCALE), folded.double(), padding=1)
    inside = slice(reach + 1, -reach - 1)
    exact = rearrange(answer.flip(-2, -1)[..., inside, inside], "c o h w -> o (c h w)")

    def places(side: int) -> Tensor:
        offsets = torch.arange(side, dtype=torch.float64) - side // 2
        return torch.cartesian_prod(torch.arange(3, dtype=torch.float64), offsets, offsets)

    def covariance(one: Tensor, other: Tensor) -> Tensor:
        distance = torch.cdist(one[:, 1:], other[:, 1:])
        is_same_color = one[:, None, 0] == other[None, :, 0]
        return NEIGHBORS**distance * torch.where(is_same_color, 1.0, CHANNELS) + NOISE * (
            is_same_color & (distance == 0)
        )

    near = places(3)
    weights = torch.linalg.solve(covariance(near, near), covariance(near, places(2 * reach + 1)) @ exact.T).T
    return weights.reshape(-1, 3, 3, 3).to(folded.dtype)


def save_whole(system: Any, path: Path) -> None:
    """Write a one-step model, its adapters folded in, as one file that spandrel loads after `install`.

    UserError: not a one-step student of VARestorer.
    """
    if system.name != "varestorer" or system.student_config.conditioning == "prefix":
        raise UserError("part=whole is for one-step students of varestorer; this model restores in several steps")
    system.merge_adapters()
    parts = system.parts()
    tensors = {f"{part}.{name}": tensor for part, of_part in parts.items() for name, tensor in of_part.items()}
    config = json.dumps({"format": FORMAT, **system.config}).encode()
    save_tensors(path, tensors | {CONFIG: torch.frombuffer(bytearray(config), dtype=torch.uint8)})


class Whole(nn.Module):
    """A system as spandrel calls a network: images (B, 3, H, W) in [0, 1] to images four times as large."""

    def __init__(self, system: Any) -> None:
        super().__init__()
        self.system = system

    def forward(self, image_B3HW: Tensor) -> Tensor:
        restored = (self.system.restore_picture(image.clamp(0, 1), SCALE).image for image in image_B3HW)
        return torch.stack(list(restored)).to(image_B3HW)


def open_whole(tensors: Mapping[str, Tensor]) -> Whole:
    """The model in the tensors of a file that `save_whole` wrote; UserError if the format or a tensor differs."""
    config = json.loads(bytes(tensors[CONFIG].cpu().tolist()))
    if (found := config.pop("format")) != FORMAT:
        raise UserError(f"the model is of format {found}, this version of varestorer reads {FORMAT}: update it")
    given: dict[str, dict[str, Tensor]] = {"tokenizer": {}, "transformer": {}, RESTORER: {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part in given:
            given[part][rest] = tensor
    with torch.device("meta"):
        system = system_class("varestorer")(**config)
    for part, network in (("tokenizer", system.tokenizer), ("transformer", system.transformer)):
        check_names_and_shapes(system.parts()[part], given[part], part)
        network.to_empty(device="cpu")
        assign_plain(network, given[part])
    if given[RESTORER]:
        system.restorer = restorer_from_state_dict(given[RESTORER])
    return Whole(system.eval().requires_grad_(False))


def install() -> None:
    """Register the one-step model with spandrel's registry, so that `spandrel.ModelLoader` knows its files.

    A second call does nothing. ComfyUI and chaiNNer load by that registry too, where they run in this Python.
    """
    from spandrel import MAIN_REGISTRY, Architecture, ArchSupport, ImageModelDescriptor, ModelTiling

    class VARestorerArch(Architecture[Whole]):
        def __init__(self) -> None:
            super().__init__(id=ARCHITECTURE, detect=lambda tensors: CONFIG in tensors)

        def load(self, state_dict: Mapping[str, Any]) -> ImageModelDescriptor[Whole]:
            model = open_whole(state_dict)
            width = model.system.transformer.config.width
            return ImageModelDescriptor(
                model,
                model.state_dict(),
                architecture=self,
                purpose="SR",
                tags=[f"{width}w", "one step"],
                supports_half=False,
                supports_bfloat16=False,
                scale=SCALE,
                input_channels=3,
                output_channels=3,
                tiling=ModelTiling.INTERNAL,
            )

    if not any(support.architecture.id == ARCHITECTURE for support in MAIN_REGISTRY):
        first = tuple(support.architecture.id for support in MAIN_REGISTRY)
        MAIN_REGISTRY.add(ArchSupport.from_architecture(VARestorerArch(), before=first))
