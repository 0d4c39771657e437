"""Which convention gives a published figure: every known way to compute it, nearest first.

Papers seldom say on which channel PSNR and SSIM were computed, whether a border was left out, or which weights a
metric had; the same pictures then score up to 2 dB apart (see `protocols`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from varestorer.evaluation.protocols import LUMA_BT601, PAPERS, PROTOCOLS
from varestorer.evaluation.results import Pair
from varestorer.evaluation.samples import check_sizes
from varestorer.evaluation.sources import KnownSource
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.images import load_image, to_uint8
from varestorer.utils.iqa import METRIC_ERRORS, Metric, MetricUnavailableError, create_metric

LOG = logging.getLogger(__name__)
CHANNELS: dict[str, dict[str, Any]] = {
    "RGB": {"test_y_channel": False},
    "luma of BT.601": dict(LUMA_BT601),
    "luma of YIQ": {"test_y_channel": True, "color_space": "yiq"},
}
VARIANTS = {
    "lpips": ("lpips", "lpips-vgg", "lpips+", "lpips-vgg+"),
    "dists": ("dists",),
    "niqe": ("niqe", "niqe_matlab"),
    "musiq": ("musiq", "musiq-spaq", "musiq-paq2piq", "musiq-ava"),
    "maniqa": ("maniqa", "maniqa-pipal", "maniqa-kadid"),
    "clipiqa": ("clipiqa", "clipiqa+"),
    "liqe": ("liqe", "liqe_mix"),
}
"""Metrics of pyiqa that papers call by one name."""
JPEG_QUALITIES = (75, 95)
CROP = 128  # pixels of LQ, of the test sets of StableSR
SHOWN = 5

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Convention:
    """One way to compute a figure.

    Attributes:
        metric: of pyiqa, with its options.
        words: what it is called.
        options: of pyiqa.
        change: done to the restored image before, and to the reference too if `both`.
        both: see there.
    """

    metric: str
    words: str
    options: Mapping[str, Any]
    change: Change | None = None
    both: bool = False


@dataclass(frozen=True)
class Answer:
    """What a convention gives.

    Attributes:
        convention: which.
        mean: over all images.
        difference: to the figure asked for.
        fits: whether it is the figure, to one unit of its last digit.
    """

    convention: Convention
    mean: float
    difference: float
    fits: bool


def read_figures(text: str) -> dict[str, str]:
    """`psnr=25.15,ssim=0.7341` as metric -> the figure as it is printed.

    Raises:
        UsageError: it cannot be read.
    """
    figures = {}
    for part in text.split(","):
        name, _, figure = (side.strip() for side in part.partition("="))
        if not name or not re.fullmatch(r"-?\d+(\.\d+)?", figure):
            raise UsageError(f"explain must be like 'psnr=25.15,ssim=0.7341', got {part.strip()!r} in it")
        figures[name.lower()] = figure
    return figures


def conventions(metric: str, scale: int) -> Iterator[Convention]:
    """The known ways to compute a metric.

    Args:
        metric: as papers call it.
        scale: between LQ and reference: some leave out a border of so many pixels.
    """
    if metric not in ("psnr", "ssim"):
        for name in VARIANTS.get(metric, (metric,)):
            yield Convention(name, name, {})
            yield Convention(name, f"{name}, centre of {CROP} pixels of LQ", {}, _centre(CROP * scale), both=True)
            for quality in JPEG_QUALITIES:
                yield Convention(name, f"{name}, saved as JPEG {quality}", {}, _jpeg(quality))
        return
    for channel, options in CHANNELS.items():
        for border in sorted({0, 4, scale}):
            edge = f", without a border of {border}" if border else ""
            yield Convention(metric, channel + edge, options | {"crop_border": border})
            crop = _centre(CROP * scale)
            words = f"{channel}{edge}, centre of {CROP} pixels of LQ"
            yield Convention(metric, words, options | {"crop_border": border}, crop, both=True)
        for quality in JPEG_QUALITIES:
            yield Convention(metric, f"{channel}, saved as JPEG {quality}", options, _jpeg(quality))
    rounded = {"test_y_channel": False}  # of one channel three times: its own
    yield Convention(metric, "luma of BT.601 rounded to 8 bits", rounded, _rounded_luma, both=True)


def explain(
    pairs: Sequence[Pair], source: KnownSource, figures: Mapping[str, str], scale: int
) -> dict[str, list[Answer]]:
    """Compute every figure in every known way.

    Args:
        pairs: of the data set; those without a reference are left out.
        source: of the restored images.
        figures: metric -> the figure, as printed.
        scale: between LQ and reference.

    Returns:
        metric -> its answers, nearest first.

    Raises:
        UserError: an image cannot be read, or no metric can be computed.
    """
    known = {name: _available(name, scale) for name in figures}
    scores: dict[tuple[str, str], list[float]] = {}
    for name, lq_path, hq_path in tqdm(pairs, desc="explaining", unit="image"):
        if hq_path is None:
            continue
        image, reference = source(name, lq_path).image, load_image(hq_path)
        check_sizes(image, reference)
        image = to_uint8(image).float() / 255
        for figure, ways in known.items():
            for way, metric in ways:
                value = _score(way, metric, image, reference)
                if value is not None:
                    scores.setdefault((figure, way.words), []).append(value)
    return {
        figure: sorted(
            (
                _answer(way, fmean(found), printed)
                for way, _ in known[figure]
                if (found := scores.get((figure, way.words)))
            ),
            key=lambda answer: abs(answer.difference),
        )
        for figure, printed in figures.items()
    }


def report(figures: Mapping[str, str], answers: Mapping[str, Sequence[Answer]]) -> str:
    """The answers in words, nearest first, and the papers whose convention it is."""
    lines = []
    for name, figure in figures.items():
        found = answers[name]
        fitting = [answer for answer in found if answer.fits]
        ways = f"{len(found)} conventions"
        lines.append(
            f"{name} {figure}: " + (f"given by {len(fitting)} of {ways}" if fitting else f"none of {ways} gives it")
        )
        for answer in [*fitting, *(answer for answer in found if not answer.fits)][: max(SHOWN, len(fitting))]:
            mark = "=" if answer.fits else " "
            lines.append(f"  {mark} {answer.mean:9.4f}  {answer.difference:+.4f}  {answer.convention.words}")
    protocols = [p for p in PROTOCOLS if all(_agrees(p, name, answers[name]) for name in figures)]
    for protocol in protocols:
        lines.append(f"all together: protocol {protocol}, of {', '.join(PAPERS[protocol])}")
    if not protocols:
        lines.append("no protocol of a known paper gives all of them (protocol=list shows these)")
    return "\n".join(lines)


def _agrees(protocol: str, name: str, answers: Sequence[Answer]) -> bool:
    """Whether a protocol's own way to compute a metric gives the figure."""
    spec = next((spec for spec in PROTOCOLS[protocol].metrics if spec.name == name), None)
    if spec is None:
        return False
    default = {"psnr": CHANNELS["RGB"], "ssim": CHANNELS["luma of YIQ"]}.get(name, {})
    own = dict(spec.options) or default
    for answer in answers:
        options = {key: value for key, value in answer.convention.options.items() if value != 0 or key != "crop_border"}
        if answer.convention.change is None and answer.convention.metric == spec.pyiqa_name and options == own:
            return answer.fits
    return False


def _available(name: str, scale: int) -> list[tuple[Convention, Metric]]:
    """The conventions of a metric that can be computed here; why others cannot is logged once.

    Raises:
        UserError: none can.
    """
    metrics: dict[str, Metric] = {}
    ways, missing = [], []
    for way in conventions(name, scale):
        key = f"{way.metric} {way.options}"
        if way.metric in missing:
            continue
        try:
            metrics[key] = metrics.get(key) or create_metric(way.metric, way.options)
        except MetricUnavailableError as error:
            missing.append(way.metric)
            LOG.warning("%s", error)
            continue
        ways.append((way, metrics[key]))
    if not ways:
        raise UserError(f"{name} cannot be computed here (see above); leave it out of explain=")
    return ways


def _score(way: Convention, metric: Metric, image: Tensor, reference: Tensor) -> float | None:
    """The score of one image; None where the convention changes nothing, or does not fit its size."""
    if way.change is not None:
        try:
            changed = way.change(image)
        except ValueError:
            return None
        image, reference = changed, way.change(reference) if way.both else reference
    try:
        return float(metric(image[None], reference[None] if metric.needs_reference else None)[0])
    except METRIC_ERRORS:
        return None


def _answer(way: Convention, mean: float, printed: str) -> Answer:
    digits = len(printed.partition(".")[2])
    difference = mean - float(printed)
    return Answer(way, mean, difference, abs(difference) <= 10.0**-digits)


def _centre(side: int) -> Change:
    """The square in the middle; of an image no larger than it ValueError, for that is the whole."""

    def cut(image_3HW: Tensor) -> Tensor:
        height, width = image_3HW.shape[-2:]
        if min(height, width) < side or (height, width) == (side, side):
            raise ValueError("the whole image")
        top, left = (height - side) // 2, (width - side) // 2
        return image_3HW[:, top : top + side, left : left + side]

    return cut


def _jpeg(quality: int) -> Change:
    """As a JPEG file keeps it."""

    def save(image_3HW: Tensor) -> Tensor:
        file = BytesIO()
        Image.fromarray(to_uint8(image_3HW).permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / 255

    return save


def _rounded_luma(image_3HW: Tensor) -> Tensor:
    """BT.601 luma of 16 to 235 in whole steps, as Matlab's rgb2ycbcr gives it for 8-bit images; three times."""
    weights = torch.tensor([65.481, 128.553, 24.966])
    luma_HW = (16 + (weights[:, None, None] * image_3HW).sum(0)).round() / 255
    return luma_HW.expand(3, -1, -1)
