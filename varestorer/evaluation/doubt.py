"""Whether a model knows where it guesses: calibration of its symbols, and what its doubt is good for.

Calibration compares the probability that the model gave to the symbols (bits or codes) it chose with the share of them
that the photograph has too. The other question is that of risk and coverage: how much better do images get where the
most doubtful area is given up for the restorer's, or the enlarged input's, than where any area of that size is?

Shapes: `B` batch, `K` scales, `H W` pixels; images in [0, 1].
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from varestorer.evaluation.evaluator import Evaluator
from varestorer.evaluation.processes import ALONE, Processes
from varestorer.evaluation.results import Pair, paired
from varestorer.evaluation.tables import Column, Table, TableRow, write_tables
from varestorer.systems.base import Request, System
from varestorer.systems.fidelity import SQUARE, blend, doubt_of, smooth
from varestorer.tokenizer import ScaleSchedule
from varestorer.utils.device import to_device
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.files import atomic_write, write_json
from varestorer.utils.images import is_gray, load_image
from varestorer.utils.seeds import derive_seed
from varestorer.utils.tiling import ENLARGE, enlarged_tile, restore_to_sizes

log = logging.getLogger(__name__)

FALLBACKS = {"restorer": "the restorer", "bicubic": "the enlarged input"}
METRICS = ("psnr", "lpips")
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the area that falls back: values of `fidelity`."""
ORDERS = {
    "doubt": "the area first where an unsure network changed most, as restore's fidelity= does",
    "entropy": "the area first where its entropy is highest, as restore's uncertainty= shows it",
    "blind": "the maps of doubt upside down: areas of the same form, anywhere",
    "oracle": "the area first where the fallback is nearer to the photograph",
}
BINS = 20
BATCH = 8


@dataclass(frozen=True)
class Measured:
    """What one image says.

    Attributes:
        name: of the pair.
        bins: for each scale and each of `BINS` of the probability: symbols, their summed probability, how many are
            right; (K, BINS, 3).
        follows: correlation of each scale's map with the squared error of the result, and of their mean, K + 1 numbers.
        scores: metric -> order -> score at each of `SHARES`.
    """

    name: str
    bins: np.ndarray
    follows: np.ndarray
    scores: dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class DoubtReport:
    """What a data set says of a model's doubt.

    Attributes:
        fallback: one of `FALLBACKS`.
        scales: sides of the scales, such as `8 x 8`.
        images: of the data set.
        failures: name -> reason.
    """

    fallback: str
    scales: tuple[str, ...]
    images: tuple[Measured, ...]
    failures: dict[str, str]

    @property
    def bins(self) -> np.ndarray:
        """Of all images, see `Measured`."""
        return np.sum([image.bins for image in self.images], axis=0)


def check_doubt(system: System, pairs: Sequence[Pair], evaluator: Evaluator, fallback: str) -> None:
    """Refuse, before hours are spent, what `measure_doubt` cannot do.

    Raises:
        UsageError: no metric to judge by, no references, or a fallback that the system has not.
    """
    if not set(METRICS) & evaluator.image_metrics.keys():
        raise UsageError(f"doubt= needs {' or '.join(METRICS)} among the metrics")
    if any(hq is None for _, _, hq in pairs):
        raise UsageError("doubt= needs a data set with references")
    if fallback == "restorer" and getattr(system, "restorer", None) is None:
        raise UsageError("this model has no restorer: give doubt=bicubic")


def measure_doubt(
    system: System,
    pairs: Sequence[Pair],
    evaluator: Evaluator,
    fallback: str,
    scale: int = 4,
    seed: int = 0,
    processes: Processes = ALONE,
) -> DoubtReport:
    """Restore a data set and compare its doubts with its photographs; an image that fails is named, the rest goes on.

    Args:
        system: what is judged, by the restorations that `eval` scores.
        pairs: name, low-quality file, high-quality file.
        evaluator: has PSNR or LPIPS.
        fallback: "restorer" or "bicubic": what takes the place of doubtful areas.
        scale, seed: as of `SystemSource`.
        processes: that share the work; all get the whole report.
    """
    done: list[Measured | tuple[str, str]] = []
    for name, lq, hq in processes.share(pairs):
        assert hq is not None
        try:
            images = load_image(lq), load_image(hq)
            done.append(_measure(name, system, *images, evaluator, fallback, scale, derive_seed(seed, name)))
        except UserError as error:
            log.warning("doubt of %s: %s", name, error)
            done.append((name, str(error)))
    found = processes.gather(done)
    scales = tuple(f"{h} x {w}" for h, w in system.schedule.scales)
    measured = sorted((one for one in found if isinstance(one, Measured)), key=lambda one: one.name)
    return DoubtReport(fallback, scales, tuple(measured), dict(one for one in found if isinstance(one, tuple)))


@torch.inference_mode()
def _measure(
    name: str,
    system: System,
    lq_3hw: Tensor,
    hq_3HW: Tensor,
    evaluator: Evaluator,
    fallback: str,
    scale: int,
    seed: int,
) -> Measured:
    height, width = lq_3hw.shape[-2] * scale, lq_3hw.shape[-1] * scale
    size = (height, width)
    if (given := tuple(hq_3HW.shape[-2:])) != size:
        raise UserError(f"its reference has {given} pixels, and x{scale} gives {size}")
    enlarged = enlarged_tile(lq_3hw, size, 0, 0, max(size), ENLARGE[system.enlarge])[:, :height, :width]
    asked = system.accept(Request(seed=seed, sides=(system.tile,)), True)
    bins = np.zeros((len(system.schedule), BINS, 3))

    def run(tiles_B6tt: Tensor, numbers: list[int]) -> list[Tensor]:
        lq, hq = to_device(tiles_B6tt, system.device).split(3, dim=1)
        restored = system.restore_squares(lq, numbers, asked)
        assert restored.logits is not None
        bins[:] += _binned(restored.logits, system.encode(hq).labels(), system.schedule)
        faithful = system.faithful(lq) if fallback == "restorer" else lq
        channels = [restored.images_B3HW, faithful, system.uncertainty(restored.logits)]
        return [to_device(torch.cat(channels, dim=1), tiles_B6tt.device)]

    both, results = torch.cat([enlarged, hq_3HW]), [(size, system.tile)]
    (whole,) = restore_to_sizes(both, size, system.tile, system.tile // 4, BATCH, run, results, system.step)
    image, faithful, maps_KHW = whole[:3].clamp(0, 1), whole[3:6].clamp(0, 1), whole[6:]
    if is_gray(lq_3hw):  # as restore keeps it
        image, faithful = (one.mean(dim=0).expand(3, -1, -1) for one in (image, faithful))
    maps_KHW = torch.cat([maps_KHW, maps_KHW.mean(dim=0, keepdim=True)])
    error_HW = (image - hq_3HW).square().mean(dim=0)
    gain_HW = error_HW - (faithful - hq_3HW).square().mean(dim=0)
    doubt_HW = doubt_of(image, faithful, maps_KHW[-1])
    maps = {"doubt": doubt_HW, "entropy": maps_KHW[-1], "blind": doubt_HW.flip(0, 1), "oracle": smooth(gain_HW)}
    scores: dict[str, dict[str, list[float]]] = {m: {} for m in METRICS if m in evaluator.image_metrics}
    for order, map_HW in maps.items():
        for share in SHARES:
            mixed = blend(image, faithful, map_HW, share)
            found = evaluator.score_batch([mixed], [hq_3HW], scores)[0]
            for metric, why in found.errors.items():
                raise UserError(f"{metric}: {why}")
            for metric, of_orders in scores.items():
                of_orders.setdefault(order, []).append(found.values[metric])
    return Measured(name, bins, _correlations(maps_KHW, error_HW), scores)


def _binned(logits: Tensor, labels: Tensor, schedule: ScaleSchedule) -> np.ndarray:
    """See `Measured.bins`; the likeliest symbol of each bit or token is the one that counts."""
    probability, chosen = logits.float().softmax(dim=-1).max(dim=-1)
    right = (chosen == labels.to(chosen)).double()
    bins = []
    for tokens in schedule.slices:
        p, hit = probability[:, tokens].flatten().double().cpu(), right[:, tokens].flatten().cpu()
        place = (p * BINS).long().clamp(max=BINS - 1)
        of_bins = (torch.bincount(place, weights, BINS) for weights in (torch.ones_like(p), p, hit))
        bins.append(torch.stack([*of_bins], dim=-1))
    return torch.stack(bins).numpy()


def _correlations(maps_KHW: Tensor, error_HW: Tensor) -> np.ndarray:
    """Pearson's correlation of each map with the error, both averaged over squares; NaN where one is flat."""
    squares = F.avg_pool2d(torch.cat([maps_KHW, error_HW[None]]), SQUARE, ceil_mode=True).flatten(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.corrcoef(squares.double().cpu().numpy())[:-1, -1]


def calibration_error(bins: np.ndarray) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3) of bins (..., 3): |share right - probability|."""
    return float(np.abs(bins[..., 2] - bins[..., 1]).sum() / bins[..., 0].sum())


def calibration_table(report: DoubtReport) -> Table:
    """A row for each scale and one for all of them."""
    bins_KB3 = report.bins
    # the sum over scales in each bin first: that is what a reader of all symbols sees
    rows_of = [*zip(report.scales, bins_KB3, strict=True), ("all", bins_KB3.sum(axis=0))]
    follows = np.nanmean(np.stack([image.follows for image in report.images]), axis=0)
    rows = []
    for (scale, bins), follow in zip(rows_of, follows, strict=True):
        count, probability, right = bins.sum(axis=0)
        cells = {"scale": scale, "symbols": int(count), "probability": probability / count, "right": right / count}
        rows.append(
            TableRow({**cells, "calibration error": calibration_error(bins), "follows the error": float(follow)})
        )
    columns = (Column("scale", is_text=True), *(Column(name) for name in [*rows[0].cells][1:]))
    notes = (
        "probability: what the model gave to the symbols it chose; right: the share of them that the photograph has.",
        "follows the error: correlation of a scale's entropies with the squared error of the result, over squares of "
        f"{SQUARE} pixels, mean over images; of all: of the mean map, which restore's uncertainty= shows.",
    )
    return Table(columns, tuple(rows), "Calibration", notes)


def coverage_table(report: DoubtReport) -> Table:
    """A row for each share of the area that falls back."""
    metrics = [*report.images[0].scores]
    names = [(metric, order) for metric in metrics for order in ORDERS]
    rows = []
    for number, share in enumerate(SHARES):
        cells: dict[str, Any] = {f"{m}, {order}": _mean(report, m, order)[number] for m, order in names}
        for metric in metrics:
            doubt, blind = (
                {image.name: image.scores[metric][order][number] for image in report.images}
                for order in ("doubt", "blind")
            )
            found = paired(doubt, blind, metric == "lpips") if 0 < share < 1 else None
            if found is not None:
                cells[f"{metric}, doubt less blind"] = f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"
        rows.append(TableRow({"falls back": f"{share:.0%}", **cells}))
    columns = [Column("falls back", is_text=True)]
    for metric in metrics:
        columns += [Column(f"{metric}, {order}") for order in ORDERS] + [Column(f"{metric}, doubt less blind")]
    notes = [f"{order}: {meaning}." for order, meaning in ORDERS.items()]
    notes.append(f"{len(report.images)} images; the brackets are 95 % intervals.")
    title = f"What is left where an area falls back to {FALLBACKS[report.fallback]}"
    return Table(tuple(columns), tuple(rows), title, tuple(notes))


def _mean(report: DoubtReport, metric: str, order: str) -> list[float]:
    return [float(x) for x in np.mean([image.scores[metric][order] for image in report.images], axis=0)]


def write_doubt(report: DoubtReport, out: Path, title: str) -> list[Path]:
    """Write `doubt.md`, `.tex`, `.html`, `.json` (all numbers of the curves) and `.png`.

    Raises:
        UserError: no image could be measured, or a file cannot be written.
    """
    if not report.images:
        raise UserError("doubt= found no image that could be measured")
    tables = [calibration_table(report), coverage_table(report)]
    written = write_tables(tables, f"Doubt: {title}", out, "doubt")
    metrics = [*report.images[0].scores]
    content = {
        "n": len(report.images),
        "failures": report.failures,
        "fallback": report.fallback,
        "bins": {scale: bins.tolist() for scale, bins in zip(report.scales, report.bins, strict=True)},
        "shares": SHARES,
        "curves": {metric: {order: _mean(report, metric, order) for order in ORDERS} for metric in metrics},
    }
    write_json(out / "doubt.json", content, indent=2)
    _draw(report, metrics, out / "doubt.png", title)
    return [*written, out / "doubt.json", out / "doubt.png"]


def _draw(report: DoubtReport, metrics: Sequence[str], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * (1 + len(metrics)), 4.6), dpi=110, layout="constrained")
    first, *others = figure.subplots(1, 1 + len(metrics))
    for scale, bins in [*zip(report.scales, report.bins, strict=True)][-3:]:
        seen = bins[bins[:, 0] >= 100]
        first.plot(seen[:, 1] / seen[:, 0], seen[:, 2] / seen[:, 0], marker=".", linewidth=1, label=scale)
    bins = report.bins.sum(axis=0)
    seen = bins[bins[:, 0] >= 100]
    first.plot(seen[:, 1] / seen[:, 0], seen[:, 2] / seen[:, 0], marker="o", color="black", label="all scales")
    first.bar((np.arange(BINS) + 0.5) / BINS, bins[:, 0] / bins[:, 0].sum(), 0.9 / BINS, color="0.85", zorder=0)
    first.plot([0, 1], [0, 1], linestyle=":", color="0.4")
    first.set(xlabel="probability of the chosen symbol", ylabel="share that is right (bars: share of symbols)")
    first.legend(fontsize=8)
    for axes, metric in zip(others, metrics, strict=True):
        for order, style in zip(ORDERS, ("-", "-.", "--", ":"), strict=True):
            axes.plot([100 * share for share in SHARES], _mean(report, metric, order), style, marker=".", label=order)
        axes.set(xlabel=f"% of the area from {FALLBACKS[report.fallback]}", ylabel=metric)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    figure.suptitle(f"{title}, {len(report.images)} images", fontsize=10)
    with atomic_write(path) as temporary:
        figure.savefig(temporary)
