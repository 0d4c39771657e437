"""Image metrics of held-out pictures while a stage trains, by the same door as the evaluation's."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from varestorer.utils.errors import UsageError, reason
from varestorer.utils.finite import is_finite
from varestorer.utils.images import to_uint8
from varestorer.utils.iqa import DATASET_METRICS, METRIC_ERRORS, Metric, MetricUnavailableError, create_metric

LOG = logging.getLogger(__name__)


class ImageScores:
    """Metrics of pyiqa by name. Those that cannot run here are one warning, and have no figures: training goes on.

    Args:
        names: such as `psnr`, `lpips`, `musiq`.
        device: where they run.
        is_main: whether this process warns.
    Attributes:
        names: of all that were asked for.
        metrics: those that run.
    Raises:
        UsageError: a name that pyiqa does not know, or a metric of whole folders (FID).
    """

    def __init__(self, names: Sequence[str] = (), device: torch.device | str = "cpu", is_main: bool = True) -> None:
        self._level = logging.WARNING if is_main else logging.DEBUG
        self.names = tuple(dict.fromkeys(names))
        self.metrics: dict[str, Metric] = {}
        lacking: dict[str, str] = {}
        for name in self.names:
            if name in DATASET_METRICS:
                raise UsageError(f"scores={name} compares folders of pictures: leave it to varestorer eval")
            try:
                self.metrics[name] = create_metric(name, device=device)
            except MetricUnavailableError as error:
                lacking[name] = str(error)
        if lacking:
            LOG.log(
                self._level, "training goes on without val/%s: %s", ", val/".join(lacking), "; ".join(lacking.values())
            )

    def __call__(self, images: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Mean of each metric over a batch, in float32 under any autocast; NaN for images with NaN.

        Args:
            images: what is put behind a metric's name -> (pictures, references), both (B,3,h,w) in [0, 1]; they are
                rounded to 8 bits first, as when saved.
        Returns:
            scalars, such as `psnr` and, of the pictures `_64`, `psnr_64`.
        """
        found: dict[str, Tensor] = {}
        for suffix, (pictures, references) in images.items():
            finite = is_finite(pictures)  # 8 bits would show NaN as black
            pair = [to_uint8(x).float() / 255 for x in (pictures, references)] if finite else []
            for name in [*self.metrics]:
                with torch.autocast(pictures.device.type, enabled=False):
                    score = self._score(name, *pair) if finite else torch.tensor(torch.nan)
                if score is not None:
                    found[f"{name}{suffix}"] = score
        return found

    def name_of(self, key: str) -> str | None:
        """The metric asked for whose figure is called `psnr`, or `psnr_64`; None if there is none."""
        return next((name for name in (key, key.rpartition("_")[0]) if name in self.names), None)

    def _score(self, name: str, image_B3HW: Tensor, reference_B3HW: Tensor) -> Tensor | None:
        """None, and the metric is given up, where it does not take these images."""
        pairs = zip(image_B3HW.split(1), reference_B3HW.split(1), strict=True)
        try:
            return torch.cat([self.metrics[name](*pair) for pair in pairs]).mean().float()
        except METRIC_ERRORS as error:
            LOG.log(self._level, "training goes on without val/%s: %s", name, reason(error))
            del self.metrics[name]
            return None
