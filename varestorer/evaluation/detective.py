"""Which convention gives a published figure: every known way to compute it, nearest first.

Papers seldom say on which channel PSNR and SSIM were computed, whether a border was left out, or which weights a
metric had; the same pictures then score up to 2 dB apart (see `protocols`).

PSNR and SSIM are pyiqa's, from maps that all crops of a channel share: a hundredth of the time of asking pyiqa anew.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor
from tqdm.auto import tqdm

from varestorer.evaluation.protocols import LUMA_BT601, PAPERS, PROTOCOLS
from varestorer.evaluation.results import Pair
from varestorer.evaluation.samples import check_sizes
from varestorer.evaluation.sources import Source
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.images import load_image, to_levels, to_uint8
from varestorer.utils.iqa import METRIC_ERRORS, Metric, MetricUnavailableError, create_metric

LOG = logging.getLogger(__name__)
RGB, BT601, YIQ = "RGB", "luma of BT.601", "luma of YIQ"
LUMAS = {BT601: ([65.481, 128.553, 24.966], 16), YIQ: ([76.245, 149.685, 29.07], 0)}  # of RGB in [0, 1]
OPTIONS: dict[str, dict[str, Any]] = {
    RGB: {"test_y_channel": False},
    BT601: dict(LUMA_BT601),
    YIQ: {"test_y_channel": True, "color_space": "yiq"},
}
"""What pyiqa calls a channel."""
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
JPEG = "JPEG"
FLOAT = "image not rounded to 8 bits"
FILES = ("", f"{JPEG} 75", f"{JPEG} 95", FLOAT)
CROP = 128  # pixels of LQ, of the test sets of StableSR
WINDOW = 5  # pixels that SSIM sees around each
SHOWN = 5


@dataclass(frozen=True)
class Convention:
    """One way to compute a figure by a metric of pyiqa."""

    metric: str
    channel: str = ""  # of PSNR and SSIM, one of `OPTIONS`
    is_rounded: bool = False  # the luma, as Matlab's rgb2ycbcr gives it for 8-bit images
    border: int = 0  # left out, pixels
    is_cropped: bool = False  # only the middle of the image is seen, see `CROP`
    file: str = ""  # what the restored image was saved as, one of `FILES`; "" for PNG

    @property
    def words(self) -> str:
        """What it is called."""
        saved = self.file if self.file in ("", FLOAT) else f"saved as {self.file}"
        parts = (
            (self.channel or self.metric) + (", rounded" if self.is_rounded else ""),
            f"without a border of {self.border}" if self.border else "",
            f"center of {CROP} pixels of LQ" if self.is_cropped else "",
            saved,
        )
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class Answer:
    """What a convention gives: the mean over all images, and its difference to the figure asked for."""

    convention: Convention
    mean: float
    difference: float
    fits: bool  # it is the figure, to one unit of its last digit


def read_figures(text: str) -> dict[str, str]:
    """`psnr=25.15,ssim=0.7341` as metric -> the figure as it is printed; UsageError if it cannot be read."""
    figures = {}
    for part in text.split(","):
        name, _, figure = (side.strip() for side in part.partition("="))
        if not name or not re.fullmatch(r"-?\d+(\.\d+)?", figure):
            raise UsageError(f"explain must be like 'psnr=25.15,ssim=0.7341', got {part.strip()!r} in it")
        figures[name.lower()] = figure
    return figures


def conventions(metric: str, scale: int) -> Iterator[Convention]:
    """The known ways to compute a metric; some leave out a border of `scale` (LQ to reference) pixels."""
    if metric not in ("psnr", "ssim"):
        for name in VARIANTS.get(metric, (metric,)):
            yield from (Convention(name, file=file) for file in FILES)
            yield Convention(name, is_cropped=True)
        return
    for channel, is_rounded in [(RGB, False), *((luma, rounded) for luma in LUMAS for rounded in (False, True))]:
        for border in sorted({0, 4, scale}):
            yield from (Convention(metric, channel, is_rounded, border, crop) for crop in (False, True))
        yield from (Convention(metric, channel, is_rounded, file=file) for file in FILES if file)


def explain(
    pairs: Sequence[Pair], source: Source, figures: Mapping[str, str], scale: int
) -> tuple[dict[str, list[Answer]], int]:
    """Compute every figure (metric -> as printed) in every known way; `scale` is that between LQ and reference.

    An image that cannot be read is named in the log and left out; UserError if none can be, or a figure cannot be
    computed at all.

    Returns:
        metric -> its answers, nearest first; and the number of images they are means over.
    """
    metrics = {name: _available(name, scale) for name in figures}
    scores: dict[str, dict[Convention, list[float]]] = {name: {} for name in figures}
    count = 0
    for name, lq_path, hq_path in tqdm(pairs, desc="explaining", unit="image", disable=None):
        try:
            image = source(name, lq_path).image
            reference = load_image(hq_path) if hq_path is not None else None
            check_sizes(image, reference)
        except UserError as error:
            LOG.warning("%s is left out: %s", name, error)
            continue
        count += 1
        views = _Views(image, reference, CROP * scale)
        for figure, ways in metrics.items():
            for way, metric in ways.items():
                value = views.score(way, metric)
                if value is not None:
                    scores[figure].setdefault(way, []).append(value)
    if not count:
        raise UserError("no image could be read (see above): nothing to explain")
    answers = {}
    for figure, printed in figures.items():
        unit = 10.0 ** -len(printed.partition(".")[2])
        means = {way: fmean(values) for way, values in scores[figure].items() if len(values) == count}
        if not means:
            has_references = any(hq is not None for _, _, hq in pairs)
            why = "it could not be computed on all images" if has_references else "the data set has no references"
            raise UserError(f"no convention of {figure} gives a figure here: {why}; leave it out of explain=")
        gaps = {way: mean - float(printed) for way, mean in means.items()}
        nearest = sorted(gaps, key=lambda way: abs(gaps[way]))
        answers[figure] = [Answer(way, means[way], gaps[way], abs(gaps[way]) <= unit) for way in nearest]
    return answers, count


def report(figures: Mapping[str, str], answers: Mapping[str, Sequence[Answer]], count: int) -> str:
    """The answers to the figures as printed, in words, nearest first, and the papers whose convention it is."""
    lines = [f"means over {count} images; = is the figure, to one unit of its last digit"]
    for name, figure in figures.items():
        found = answers[name]
        fitting = sum(answer.fits for answer in found)
        ways = f"{len(found)} conventions"
        lines.append(
            f"{name} {figure}: " + (f"given by {fitting} of {ways}" if fitting else f"none of {ways} gives it")
        )
        for answer in found[: max(SHOWN, fitting)]:
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
    options = dict(spec.options) or {"psnr": OPTIONS[RGB], "ssim": OPTIONS[YIQ]}.get(spec.pyiqa_name, {})
    channel = next((channel for channel in OPTIONS if OPTIONS[channel] == options), "")
    own = Convention(spec.pyiqa_name, channel, is_rounded=spec.pyiqa_name == "ssim" and channel != RGB)
    return any(answer.fits and answer.convention == own for answer in answers)


def _available(name: str, scale: int) -> dict[Convention, Metric | None]:
    """The conventions of a metric that can be computed here, None for maps; why others cannot is logged once.

    UserError: none can.
    """
    ways: dict[Convention, Metric | None] = {}
    metrics: dict[str, Metric | None] = {}
    for way in conventions(name, scale):
        if not way.channel and way.metric not in metrics:
            try:
                metrics[way.metric] = create_metric(way.metric)
            except MetricUnavailableError as error:
                metrics[way.metric] = None
                LOG.warning("%s", error)
        if way.channel or metrics[way.metric]:
            ways[way] = metrics.get(way.metric)
    if not ways:
        raise UserError(f"{name} cannot be computed here (see above); leave it out of explain=")
    return ways


class _Views:
    """One restored image in [0, 1] as the conventions see it; what several of them share is computed once.

    Some look at a square in the middle of `side` pixels.
    """

    def __init__(self, image_3HW: Tensor, reference_3HW: Tensor | None, side: int) -> None:
        self.images: dict[str, Tensor] = {"": to_uint8(image_3HW).float() / 255, FLOAT: image_3HW.float().clamp(0, 1)}
        self.reference, self.side = reference_3HW, side
        self.maps: dict[tuple[str, ...], np.ndarray] = {}

    def score(self, way: Convention, metric: Metric | None) -> float | None:
        """The score; None where the convention changes nothing, or does not fit the image."""
        image, place = self._image(way.file), self._place(way)
        if place is None or (way.file == FLOAT and torch.equal(image, self.images[""])):
            return None
        if metric is None:
            return self._mean(way, place)
        if metric.needs_reference and self.reference is None:
            return None
        reference = self.reference[:, *place][None] if self.reference is not None and metric.needs_reference else None
        try:
            return float(metric(image[:, *place][None], reference)[0])
        except METRIC_ERRORS:
            return None

    def _place(self, way: Convention) -> tuple[slice, slice] | None:
        """Rows and columns that are seen."""
        height, width = self.images[""].shape[-2:]
        top, left = (height - self.side) // 2, (width - self.side) // 2
        if way.is_cropped and (min(top, left) < 0 or top == left == 0):
            return None
        if not way.is_cropped:
            top = left = 0
        top, left = top + way.border, left + way.border
        return slice(top, height - top), slice(left, width - left)

    def _image(self, file: str) -> Tensor:
        """As a file keeps it."""
        if file not in self.images:
            buffer = BytesIO()
            Image.fromarray(to_levels(self.images[""])).save(buffer, JPEG, quality=int(file.removeprefix(JPEG)))
            self.images[file] = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1).float() / 255
        return self.images[file]

    def _mean(self, way: Convention, place: tuple[slice, slice]) -> float | None:
        """PSNR or SSIM of a place, as pyiqa has them."""
        if self.reference is None:
            return None
        key = (way.metric, way.channel, "rounded" if way.is_rounded else "", way.file)
        if key not in self.maps:
            planes = [_planes(view, way) for view in (self._image(way.file), self.reference)]
            maps = [MAPS[way.metric](one, other) for one, other in zip(*planes, strict=True)]
            self.maps = {key: np.mean(maps, axis=0)}  # one at a time: of large images all are gigabytes
        margin = WINDOW if way.metric == "ssim" else 0
        rows, columns = (slice(side.start + margin, side.stop - margin) for side in place)
        seen = self.maps[key][rows, columns]
        if not seen.size:
            return None
        return float(seen.mean() if way.metric == "ssim" else -10 * np.log10(seen.mean() / 255**2 + 1e-8))


def _planes(image_3HW: Tensor, way: Convention) -> np.ndarray:
    """A channel, or three, with values to 255; (C, H, W) float64."""
    image = image_3HW.double().numpy()
    if way.channel == RGB:
        return image * 255
    weights, offset = LUMAS[way.channel]
    luma = np.tensordot(np.array([weights]), image, 1) + offset
    return luma.round() if way.is_rounded else luma


def _ssim_map(one_HW: np.ndarray, other_HW: np.ndarray) -> np.ndarray:
    """SSIM around each pixel (Wang et al. 2004: Gaussian of 11 x 11); right from `WINDOW` pixels inside."""
    blur = partial(gaussian_filter, sigma=1.5, radius=WINDOW)
    mean, other_mean, product = blur(one_HW), blur(other_HW), blur(one_HW * other_HW)
    variances = blur(one_HW**2) - mean**2 + blur(other_HW**2) - other_mean**2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    structure = (2 * (product - mean * other_mean) + c2) / (variances + c2)
    return (2 * mean * other_mean + c1) / (mean**2 + other_mean**2 + c1) * structure.clip(min=0)


MAPS = {"psnr": lambda one_HW, other_HW: (one_HW - other_HW) ** 2, "ssim": _ssim_map}
