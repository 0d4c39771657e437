"""Perceptual losses by name."""

from __future__ import annotations

from torch import Tensor, nn

from varestorer.losses.perceptual import DISTSLoss, LPIPSLoss, MSSSIMLoss, PerceptualLoss

WITH_WEIGHTS = ("lpips", "lpips-vgg", "dists")
NAMES = (*WITH_WEIGHTS, "ms_ssim")


class SumLoss(nn.Module):
    """The sum of some perceptual losses."""

    def __init__(self, losses: list[PerceptualLoss]) -> None:
        super().__init__()
        self.losses = losses
        self.networks = nn.ModuleList(loss for loss in losses if isinstance(loss, nn.Module))  # to move with this one

    def forward(self, pred_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
        """Sum of the distances, each a mean over the batch: a float32 scalar."""
        return sum((loss(pred_B3HW, target_B3HW) for loss in self.losses), pred_B3HW.new_zeros(()))


def perceptual_loss(name: str) -> PerceptualLoss:
    """The perceptual loss a config names.

    Args:
        name: "lpips" (Alex), "lpips-vgg" or "dists", which need published weights; "ms_ssim", which needs none; or the
            sum of several, as "lpips+dists".
    Raises:
        UserError: weights that are missing.
        ValueError: an unknown name.
    """
    if "+" in name:
        return SumLoss([perceptual_loss(part) for part in name.split("+")])
    if name in ("lpips", "lpips-vgg"):
        return LPIPSLoss(net="vgg" if name.endswith("vgg") else "alex")
    if name == "dists":
        return DISTSLoss()
    if name == "ms_ssim":
        return MSSSIMLoss()
    raise ValueError(f"perceptual must be one of {', '.join(NAMES)}, got {name!r}")
