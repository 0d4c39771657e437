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
    """What the image of a pair says.

    Of each scale and each of `BINS` of the probability `bins` (K, BINS, 3) holds symbols, their summed probability, and
    how many are right.
    """

    name: str
    bins: np.ndarray
    follows: np.ndarray  # (K + 1,) correlations of the scales' maps, and of their mean, with the result's squared error
    scores: dict[str, dict[str, list[float]]]  # metric -> order -> score at each of `SHARES`


@dataclass(frozen=True)
class DoubtReport:
    """What a data set says of a model's doubt."""

    fallback: str  # one of `FALLBACKS`
    scales: tuple[str, ...]  # such as `8 x 8`
    images: tuple[Measured, ...]
    failures: dict[str, str]  # name -> reason

    @property
    def bins(self) -> np.ndarray:
        """Of all images, see `Measured`."""
        return np.sum([image.bins for image in self.images], axis=0)

    def curves(self) -> dict[str, dict[str, list[float]]]:
        """Metric -> order -> mean score over the images at each of `SHARES`."""
        scores = [image.scores for image in self.images]
        return {m: {o: np.mean([s[m][o] for s in scores], axis=0).tolist() for o in ORDERS} for m in scores[0]}


def check_doubt(system: System, pairs: Sequence[Pair], evaluator: Evaluator, fallback: str) -> None:
    """Refuse, before hours are spent, what `measure_doubt` cannot do: a UsageError."""
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
        pairs: all with references.
        evaluator: has PSNR or LPIPS.
        fallback: one of `FALLBACKS`: what takes the place of doubtful areas.
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
    curves = report.curves()
    rows = []
    for number, share in enumerate(SHARES):
        cells: dict[str, Any] = {f"{m}, {o}": curve[number] for m, of in curves.items() for o, curve in of.items()}
        for metric in curves:
            doubt, blind = (
                {image.name: image.scores[metric][order][number] for image in report.images}
                for order in ("doubt", "blind")
            )
            found = paired(doubt, blind, metric == "lpips") if 0 < share < 1 else None
            if found is not None:
                cells[f"{metric}, doubt less blind"] = f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"
        rows.append(TableRow({"falls back": f"{share:.0%}", **cells}))
    columns = [Column("falls back", is_text=True)]
    columns += [Column(f"{metric}, {order}") for metric in curves for order in (*ORDERS, "doubt less blind")]
    notes = [f"{order}: {meaning}." for order, meaning in ORDERS.items()]
    notes.append(f"{len(report.images)} images; the brackets are 95 % intervals.")
    title = f"What is left where an area falls back to {FALLBACKS[report.fallback]}"
    return Table(tuple(columns), tuple(rows), title, tuple(notes))


def write_doubt(report: DoubtReport, out: Path, title: str) -> list[Path]:
    """Write `doubt.md`, `.tex`, `.html`, `.json` (all numbers of the curves) and `.png`.

    UserError: no image could be measured, or a file cannot be written.
    """
    if not report.images:
        raise UserError("doubt= found no image that could be measured")
    tables = [calibration_table(report), coverage_table(report)]
    written = write_tables(tables, f"Doubt: {title}", out, "doubt")
    content = {
        "n": len(report.images),
        "failures": report.failures,
        "fallback": report.fallback,
        "bins": {scale: bins.tolist() for scale, bins in zip(report.scales, report.bins, strict=True)},
        "shares": SHARES,
        "curves": report.curves(),
    }
    write_json(out / "doubt.json", content, indent=2)
    _draw(report, out / "doubt.png", title)
    return [*written, out / "doubt.json", out / "doubt.png"]


def _draw(report: DoubtReport, path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    curves, bins = report.curves(), report.bins.sum(axis=0)
    figure = Figure(figsize=(5 * (1 + len(curves)), 4.6), dpi=110, layout="constrained")
    first, *others = figure.subplots(1, 1 + len(curves))
    looks: list[dict[str, Any]] = 3 * [{"marker": ".", "linewidth": 1}] + [{"marker": "o", "color": "black"}]
    shown = [*[*zip(report.scales, report.bins, strict=True)][-3:], ("all scales", bins)]
    for (scale, of_scale), look in zip(shown, looks[-len(shown) :], strict=True):
        count, probability, right = of_scale[of_scale[:, 0] >= 100].T
        first.plot(probability / count, right / count, label=scale, **look)
    first.bar((np.arange(BINS) + 0.5) / BINS, bins[:, 0] / bins[:, 0].sum(), 0.9 / BINS, color="0.85", zorder=0)
    first.plot([0, 1], [0, 1], linestyle=":", color="0.4")
    first.set(xlabel="probability of the chosen symbol", ylabel="share that is right (bars: share of symbols)")
    first.legend(fontsize=8)
    for axes, (metric, of_orders) in zip(others, curves.items(), strict=True):
        for (order, curve), style in zip(of_orders.items(), ("-", "-.", "--", ":"), strict=True):
            axes.plot([100 * share for share in SHARES], curve, style, marker=".", label=order)
        axes.set(xlabel=f"% of the area from {FALLBACKS[report.fallback]}", ylabel=metric)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    figure.suptitle(f"{title}, {len(report.images)} images", fontsize=10)
    with atomic_write(path) as temporary:
        figure.savefig(temporary)
