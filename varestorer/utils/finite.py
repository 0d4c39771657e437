"""Numbers that are not finite (NaN, infinite): found before a clamp, a cast or a choice of bits hides them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from varestorer.utils.errors import UserError

MASKS = ("attn_bias_for_masking",)
"""Tensors of published files that hold minus infinity on purpose: where attention must not look."""


def is_finite(x: Tensor) -> bool:
    """Whether all values are finite; the host waits for the device. Whole numbers always are."""
    if x.numel() == 0 or not x.is_floating_point():
        return True
    x = x.float() if x.itemsize == 1 else x  # float8 has no extremes in torch
    low, high = x.aminmax()  # of a NaN both are NaN; fifty times as fast as `isfinite` on a CPU
    return bool(low.isfinite() & high.isfinite())


def check_finite(x: Tensor, what: str) -> None:
    """Refuse numbers that are not finite: a UserError that names `what`."""
    if not is_finite(x):
        raise UserError(
            f"{what} is not finite (NaN or infinite numbers): the weights are of no use, or they overflow in this "
            "precision; take other weights, or precision=fp32"
        )


def check_weights(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that are not finite; tensors on the meta device have no values and pass.

    UserError: names the file and the first such tensor, in the order of their names.
    """
    looked_at = {name: t for name, t in tensors.items() if not t.is_meta and not name.endswith(MASKS)}
    broken = [name for name in sorted(looked_at) if not is_finite(looked_at[name])]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UserError(
            f"{source}: the tensor {broken[0]}{more} holds NaN or infinite numbers (a damaged copy, or a training that "
            "overflowed); give a good copy or an earlier checkpoint"
        )


def spread_nan(x: Tensor, *sources: Tensor) -> Tensor:
    """NaN for each sample of `x` (B, ...) that was made of sources (B, ...) which are not all finite.

    Bits are chosen by comparing logits, and comparing with NaN gives bits too. The host does not wait for the device.
    """
    for source in sources:
        is_whole_B = source.isfinite().flatten(1).all(dim=1)
        x = torch.where(is_whole_B.view(-1, *[1] * (x.ndim - 1)), x, torch.nan)
    return x
