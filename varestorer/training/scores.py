"""Image metrics of held-out pictures while a stage trains, by the same door as the evaluation's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from varestorer.utils.finite import is_finite
from varestorer.utils.images import to_uint8

if TYPE_CHECKING:
    from varestorer.utils.iqa import Metric


class ImageScores:
    """Metrics of pyiqa by name, built when they are first asked for.

    Args:
        names: such as `psnr`, `ssim`, `lpips`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._metrics: dict[tuple[str, torch.device], Metric] = {}

    def __call__(self, image_B3HW: Tensor, reference_B3HW: Tensor) -> dict[str, Tensor]:
        """Means over the batch, in float32 under any autocast: scalars on the images' device; NaN for images with NaN.

        Args:
            image_B3HW: in [0, 1]; rounded to 8 bits first, as when saved.
            reference_B3HW: the same.
        Raises:
            MetricUnavailableError: a metric cannot run here (one line: what is missing).
        """
        if not is_finite(image_B3HW):  # 8 bits would show it as black
            return {name: image_B3HW.new_full((), torch.nan, dtype=torch.float32) for name in self.names}
        image, reference = (to_uint8(images).float() / 255 for images in (image_B3HW, reference_B3HW))
        with torch.autocast(image.device.type, enabled=False):
            return {name: self._score(name, image, reference) for name in self.names}

    def _score(self, name: str, image_B3HW: Tensor, reference_B3HW: Tensor) -> Tensor:
        from varestorer.utils.iqa import create_metric

        key = name, image_B3HW.device
        if key not in self._metrics:
            self._metrics[key] = create_metric(name, device=image_B3HW.device)
        pairs = zip(image_B3HW.split(1), reference_B3HW.split(1), strict=True)
        return torch.cat([self._metrics[key](*pair) for pair in pairs]).mean().float().to(image_B3HW.device)
