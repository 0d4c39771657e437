"""The restorer: a network, frozen outside its own stage, that cleans a degraded image before it is tokenized.

VARestorer uses DiffBIR's general SwinIR. The network itself comes from spandrel, which reads its size from
the weights; any 1x RGB restoration network that spandrel knows fits as well. A small model trains its own, an RCAN
that works at a quarter of the size (`new_restorer`).
"""

import re
from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from varestorer.utils.errors import UserError
from varestorer.utils.images import pad_reflect
from varestorer.utils.seeds import derive_seed, isolated_rng
from varestorer.utils.watch import watch

PUBLISHED_SIZES = {
    "img_size": 64,
    "embed_dim": 180,
    "depths": [6] * 8,
    "num_heads": [6] * 8,
    "mlp_ratio": 2.0,
    "window_size": 8,
    "upscale": 8,
    "upsampler": "nearest+conv",
    "start_unshuffle": 8,
}
FEWEST_FEATURES = 16  # of an RCAN, whose attention looks at a sixteenth of them
MOST_MASKS = 4  # two for each size of image


class Restorer(nn.Module):
    """A 1x restoration network that takes any image size, frozen unless `training.tasks.restorer` trains it.

    Attributes:
        network: the network; always in evaluation mode.
        multiple: sides the network sees are multiples of this (pixels).
        minimum: and at least this (pixels).
        use_bf16: make its matrix products in bfloat16, as the released restoration does.
    """

    def __init__(self, network: nn.Module, multiple: int = 1, minimum: int = 1) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        share_masks(network)
        self.multiple = multiple
        self.minimum = max(minimum, 1)
        self.use_bf16 = False

    def train(self, mode: bool = True) -> "Restorer":
        """Stay in evaluation mode: the network must not drop paths because its owner trains."""
        return super().train(False)

    @watch("restorer")
    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Restore RGB images in [0, 1] of any size; the result is not clamped, as the released code hands it on."""
        height, width = image_B3HW.shape[-2:]
        down, right = self._missing(height), self._missing(width)
        padded_B3HW = pad_reflect(image_B3HW, 0, down, 0, right)
        with torch.autocast(image_B3HW.device.type, torch.bfloat16) if self.use_bf16 else nullcontext():
            return self.network(padded_B3HW)[..., :height, :width].to(image_B3HW.dtype)

    def published_state_dict(self) -> dict[str, Tensor]:
        """Tensors by the names that `load_restorer` reads, derived ones included."""
        # where pixels are folded into channels first, the first convolution is the second of two published layers
        first = "conv_first.1." if getattr(self.network, "start_unshuffle", 1) > 1 else "conv_first."
        state = self.network.state_dict()
        return {re.sub(r"^conv_first\.", first, name): tensor for name, tensor in state.items()}

    def _missing(self, length: int) -> int:
        """Pixels to add to a side of `length` pixels."""
        wanted = max(length, self.minimum)
        return -(-wanted // self.multiple) * self.multiple - length


def share_masks(network: nn.Module) -> None:
    """Let a SwinIR's blocks share the masks of their windows, kept where the network is.

    For images of another size than it was trained on, each block makes its own on the host in every pass, and the
    device waits for it.
    """
    kept: dict[Any, Tensor] = {}

    def shared(block: Any, make: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        def mask(size: Any) -> Tensor:
            device = block.norm1.weight.device
            key = tuple(size), block.window_size, block.shift_size, device
            if key not in kept:
                if len(kept) >= MOST_MASKS:
                    kept.clear()
                kept[key] = make(size).to(device)
            return kept[key]

        return mask

    for block in network.modules():
        if isinstance(make := getattr(block, "calculate_mask", None), MethodType):
            block.calculate_mask = shared(block, make)  # type: ignore[assignment]


def new_restorer(num_features: int = 64, num_groups: int = 2, num_blocks: int = 5, seed: int = 0) -> Restorer:
    """A restorer to be trained: an RCAN (Zhang et al. 2018) that folds squares of 4 pixels into channels first.

    Args:
        num_features: channels, 16 or more.
        num_groups: residual groups.
        num_blocks: residual blocks of a group, two convolutions each.
        seed: of the random weights; the global generators are left as they were.
    Raises:
        UserError: too few channels.
    """
    from spandrel.architectures.RCAN import RCAN

    if num_features < FEWEST_FEATURES:
        raise UserError(f"model.restorer.num_features must be {FEWEST_FEATURES} or more, got {num_features}")
    sizes = {"n_feats": num_features, "n_resgroups": num_groups, "n_resblocks": num_blocks}
    with isolated_rng(derive_seed(seed, "restorer")):
        return Restorer(RCAN(scale=1, norm=False, unshuffle_mod=True, **sizes))
