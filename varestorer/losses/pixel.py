"""Pixel losses: pure functions of two images of one shape."""

from __future__ import annotations

import torch
from einops import reduce
from torch import Tensor, nn


def mse_loss(pred_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
    """Mean squared error over every pixel and channel, in the images' own range ([-1, 1] inside networks).

    Args:
        pred_B3HW: what the network made.
        target_B3HW: what it should have made; same shape.
    Returns:
        A scalar, float32.
    Raises:
        ValueError: the shapes differ (broadcasting would hide it).
    """
    check_same_shape(pred_B3HW, target_B3HW)
    return nn.functional.mse_loss(pred_B3HW.float(), target_B3HW.float())


def l1_loss(pred_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
    """Mean absolute error over every pixel and channel; arguments and errors as `mse_loss`."""
    check_same_shape(pred_B3HW, target_B3HW)
    return nn.functional.l1_loss(pred_B3HW.float(), target_B3HW.float())


def mesh_loss(pred_B3HW: Tensor, target_B3HW: Tensor, period: int = 4, repeats: int = 8) -> Tensor:
    """Mean absolute error of what repeats every `period` pixels: the mesh that pixel shuffling and patches leave.

    In windows of `repeats` periods, pixels of one phase are averaged, which leaves of a picture's own texture little
    and of a mesh all. Other losses hardly notice one: it is faint, and where structure is, networks overlook it.

    Args:
        pred_B3HW: what the network made; sides of a window or more (pixels), what is over is left out.
        target_B3HW: what it should have made; same shape.
        period: of the mesh (pixels).
        repeats: periods along each side of a window.
    Returns:
        A scalar, float32, in the images' own range.
    """
    check_same_shape(pred_B3HW, target_B3HW)
    error = (pred_B3HW - target_B3HW).float()
    rows, columns = (side // (period * repeats) for side in error.shape[-2:])
    error = error[..., : rows * period * repeats, : columns * period * repeats]
    phases = reduce(error, "b c (h n p) (w m q) -> b c h w p q", "mean", n=repeats, m=repeats, p=period, q=period)
    return (phases - phases.mean(dim=(-2, -1), keepdim=True)).abs().mean()


def check_same_shape(pred: Tensor, target: Tensor) -> None:
    """Raise ValueError unless both tensors have one shape."""
    if pred.shape != target.shape:
        wanted, got = tuple(target.shape), tuple(pred.shape)
        raise ValueError(f"prediction must have the target's shape {wanted}, got {got}")


def float32_pair(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors as float32, checked to be B3HW of one shape; for losses that are useless in bf16."""
    check_same_shape(pred, target)
    if pred.ndim != 4 or pred.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W), got {tuple(pred.shape)}")
    return pred.to(torch.float32), target.to(torch.float32)
