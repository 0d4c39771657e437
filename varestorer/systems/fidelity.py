"""Giving up what the network guessed: the most doubtful share of a result is taken from the image before it.

Shapes: `H W` pixels; images (3, H, W).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from varestorer.utils.errors import UserError

SOFT = 0.2
"""Width of the soft border between what stays and what falls back, as a share of the area."""
MOST_SORTED = 2**16  # pixels that stand for all when doubts are ranked
SQUARE = 16  # pixels, over which pictures are compared


def smooth(map_HW: Tensor) -> Tensor:
    """The map averaged over a square of `SQUARE` pixels around each pixel."""
    return F.avg_pool2d(map_HW[None], SQUARE + 1, stride=1, padding=SQUARE // 2, count_include_pad=False)[0]


def doubt_of(image: Tensor, faithful: Tensor, entropy_HW: Tensor) -> Tensor:
    """How much a network that was not sure has changed the faithful picture, (H, W): entropy times the local change.

    The entropy, a mean over the scales, alone says little: flat areas hold many undecided bits that hardly show.
    """
    return entropy_HW * smooth((image - faithful).abs().mean(dim=0))


def ranks(doubt_HW: Tensor) -> Tensor:
    """How many of the image's pixels are less doubtful than each one, 0 to 1, (H, W); halfway among equals."""
    flat = doubt_HW.flatten()
    known = flat[:: -(-len(flat) // MOST_SORTED)].sort().values
    below, above = (torch.searchsorted(known, doubt_HW.contiguous(), right=right) for right in (False, True))
    return (below + above) / (2 * len(known))


def blend(image: Tensor, faithful: Tensor, doubt_HW: Tensor, fidelity: float) -> Tensor:
    """The image with its most doubtful area replaced by the faithful one: a share of it from 0 (none) to 1 (all).

    Of the doubts (H, W) only the order counts.
    """
    border = min(SOFT, 2 * fidelity, 2 * (1 - fidelity))
    if border == 0:
        return faithful if fidelity else image
    weight_HW = ((ranks(doubt_HW) - (1 - fidelity)) / border + 0.5).clamp(0, 1)
    return torch.lerp(image, faithful, weight_HW)


def check_fidelity(fidelity: float, sizes: Sequence[float] | None) -> None:
    """Refuse a fidelity out of range, or with several sizes (UserError)."""
    if not 0 <= fidelity <= (1 if sizes is None else 0):
        raise UserError(f"fidelity must be from 0 to 1, and 0 with sizes, got {fidelity} and sizes={sizes}")


def give_up(channels_CHW: Tensor, fidelity: float) -> Tensor:
    """A result of image, faithful image and K entropies without the second; for fidelity 0 as it is."""
    if not fidelity:
        return channels_CHW
    image, faithful, entropy_KHW = channels_CHW[:3].clamp(0, 1), channels_CHW[3:6].clamp(0, 1), channels_CHW[6:]
    blended = blend(image, faithful, doubt_of(image, faithful, entropy_KHW.mean(dim=0)), fidelity)
    return torch.cat([blended, entropy_KHW])
