"""Perceptual losses by name."""

from __future__ import annotations

from varestorer.losses.perceptual import (
    EncoderFeatureLoss,
    FeatureExtractor,
    LPIPSLoss,
    MSSSIMLoss,
    PerceptualLoss,
)

NAMES = ("lpips", "lpips-vgg", "features", "ms_ssim")


def perceptual_loss(name: str, encoder: FeatureExtractor) -> PerceptualLoss:
    """The perceptual loss a config names.

    Args:
        name: "lpips" (Alex) or "lpips-vgg", which need published weights; "features" of the given frozen encoder;
            "ms_ssim".
        encoder: images in [-1, 1] to feature maps, for "features".

    Raises:
        UserError: weights that are missing.
        ValueError: an unknown name.
    """
    if name in ("lpips", "lpips-vgg"):
        return LPIPSLoss(net="vgg" if name.endswith("vgg") else "alex")
    if name == "features":
        return EncoderFeatureLoss(encoder)
    if name == "ms_ssim":
        return MSSSIMLoss()
    raise ValueError(f"perceptual must be one of {', '.join(NAMES)}, got {name!r}")
