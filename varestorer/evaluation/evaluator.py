"""The evaluator: scores of each image under a protocol, and what they add up to."""

from __future__ import annotations

import logging
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varestorer.evaluation.protocols import Protocol
from varestorer.evaluation.sources import Candidate, Source
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.images import load_image, save_image, to_uint8
from varestorer.utils.iqa import (
    DATASET_METRICS,
    METRIC_ERRORS,
    Metric,
    MetricUnavailableError,
    create_metric,
    metric_config,
)

log = logging.getLogger(__name__)

Pair = tuple[str, Path, Path]
"""Name, low-quality file, high-quality file."""


@dataclass(frozen=True)
class Scores:
    """Scores of one image: column -> value, and column -> reason where a metric refused the image."""

    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One image of an evaluation.

    Attributes:
        name: of the pair.
        scores: column -> value; columns that failed are absent.
        seconds: that generating it took; None when it was given.
        errors: what went wrong, one line each.
        image: the file that was scored, where there is one.
        reference: the high-quality file.
    """

    name: str
    scores: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    errors: tuple[str, ...] = ()
    image: Path | None = None
    reference: Path | None = None


@dataclass(frozen=True)
class Evaluation:
    """Scores of a data set under a protocol.

    Attributes:
        dataset: name of the data set.
        protocol: name of the protocol.
        columns: the metrics asked for -> whether lower is better, in the order of the table.
        metrics: the metrics that ran.
        rows: one per pair.
        dataset_scores: metrics of the whole set (FID) -> value.
        unavailable: metrics that did not run -> reason.
    """

    dataset: str
    protocol: str
    columns: dict[str, bool]
    metrics: dict[str, Metric]
    rows: tuple[Row, ...]
    dataset_scores: dict[str, float]
    unavailable: dict[str, str]

    @property
    def failures(self) -> list[str]:
        """One line for everything that went wrong with an image."""
        return [f"{row.name}: {error}" for row in self.rows for error in row.errors]

    @property
    def seconds_per_image(self) -> float | None:
        """Mean time of generating an image; None when the images were given."""
        times = [row.seconds for row in self.rows if row.seconds is not None]
        return statistics.fmean(times) if times else None

    def summary(self) -> dict[str, Any]:
        """What `summary.json` holds; `std` is the population's, null for metrics of the whole set."""
        unavailable = dict(self.unavailable)
        metrics: dict[str, Any] = {}
        for name, metric in self.metrics.items():
            values = [row.scores[name] for row in self.rows if name in row.scores]
            entry = {"id": metric.id, "weights_sha256": metric.weights}
            if name in self.dataset_scores:
                scored = sum(row.image is not None and not row.errors for row in self.rows)
                metrics[name] = {"mean": self.dataset_scores[name], "std": None, "n": scored, **entry}
            elif values:
                mean, std = statistics.fmean(values), statistics.pstdev(values)
                metrics[name] = {"mean": mean, "std": std, "n": len(values), **entry}
            else:
                unavailable.setdefault(name, "no image could be scored")
        return {
            "dataset": self.dataset,
            "protocol": self.protocol,
            "n": sum(bool(row.scores) or not row.errors for row in self.rows),
            "metrics": metrics,
            "unavailable": unavailable,
        }


class Evaluator:
    """Scores images under a protocol.

    Images go through an 8-bit round trip first and are never resized. Metrics that cannot run on this machine
    are found out here, at once, and listed in `unavailable`; the others run.

    Args:
        protocol: which metrics, with which options.
        metrics: a subset of the protocol's columns, or other metrics of pyiqa by name; default: all columns.
        device: where the metrics run; on MPS, which lacks float64, they run on the CPU.
        weights_folder: searched for weight files before torch's hub folder.
        offline: never touch the network; default: when HF_HUB_OFFLINE is set.
        seed: of metrics that draw random patches.
    Raises:
        UsageError: a metric that pyiqa does not know.
    """

    def __init__(
        self,
        protocol: Protocol,
        metrics: Sequence[str] | None = None,
        *,
        device: torch.device | str = "cpu",
        weights_folder: str | Path | None = None,
        offline: bool | None = None,
        seed: int = 0,
    ) -> None:
        self.protocol = protocol
        self.device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        self.metrics: dict[str, Metric] = {}
        self.unavailable: dict[str, str] = {}
        self.columns: dict[str, bool] = {}
        for spec in protocol.select(metrics):
            self.columns[spec.name] = bool(metric_config(spec.pyiqa_name).get("lower_better", False))
            try:
                self.metrics[spec.name] = create_metric(
                    spec.pyiqa_name,
                    spec.options,
                    device=self.device,
                    weights_folder=weights_folder,
                    offline=offline,
                    seed=seed,
                )
            except MetricUnavailableError as error:
                log.warning("%s", error)
                self.unavailable[spec.name] = str(error)

    def score(self, image_3HW: Tensor, reference_3HW: Tensor | None = None) -> Scores:
        """Score one image.

        Args:
            image_3HW: RGB in [0, 1]; rounded to 8 bit first, as the reference is.
            reference_3HW: the same size; without it only metrics that need none run.
        Raises:
            UserError: the sizes differ.
        """
        if reference_3HW is not None and image_3HW.shape != reference_3HW.shape:
            got, wanted = _size(image_3HW), _size(reference_3HW)
            raise UserError(f"the image is {got} and its reference {wanted} pixels; scores need equal sizes")
        image = _round_trip(image_3HW, self.device)
        reference = None if reference_3HW is None else _round_trip(reference_3HW, self.device)
        scores = Scores()
        for name, metric in self.metrics.items():
            if metric.name in DATASET_METRICS or (metric.needs_reference and reference is None):
                continue
            try:
                scores.values[name] = _finite(metric(image, reference).item())
            except METRIC_ERRORS as error:
                scores.errors[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return scores

    def evaluate(
        self, pairs: Sequence[Pair], source: Source, dataset: str = "folder", keep: Path | None = None
    ) -> Evaluation:
        """Score a data set; an image that fails is recorded, and the rest goes on.

        Args:
            pairs: name, low-quality file, high-quality file.
            source: gives the image to be scored.
            dataset: its name, for the records.
            keep: folder for the images that the source makes, `<stem>.png`.
        Raises:
            UsageError: no pairs.
        """
        from tqdm import tqdm

        if not pairs:
            raise UsageError(f"data set {dataset!r} has no pairs of images to score")
        progress = tqdm(pairs, desc=f"evaluate {dataset}", unit="image", disable=None)
        rows = tuple(self._row(pair, source, keep) for pair in progress)
        dataset_scores, refused = self._dataset_scores(rows)
        return Evaluation(
            dataset=dataset,
            protocol=self.protocol.name,
            columns=self.columns,
            metrics=self.metrics,
            rows=rows,
            dataset_scores=dataset_scores,
            unavailable={**self.unavailable, **refused},
        )

    def _row(self, pair: Pair, source: Source, keep: Path | None) -> Row:
        name, lq_path, hq_path = pair
        try:
            candidate = source(name, lq_path)
            path = _keep(candidate, name, keep)
            scores = self.score(candidate.image, load_image(hq_path))
        except UserError as error:
            log.warning("%s: %s", name, error)
            return Row(name, errors=(str(error),), reference=hq_path)
        errors = tuple(f"{metric}: {reason}" for metric, reason in scores.errors.items())
        return Row(name, scores.values, candidate.seconds, errors, path, hq_path)

    def _dataset_scores(self, rows: Sequence[Row]) -> tuple[dict[str, float], dict[str, str]]:
        """Scores of metrics that compare whole folders, and why those that failed did."""
        scores: dict[str, float] = {}
        refused: dict[str, str] = {}
        metrics = {name: metric for name, metric in self.metrics.items() if metric.name in DATASET_METRICS}
        pairs = [(row.image, row.reference) for row in rows if row.image and row.reference and not row.errors]
        for name, metric in metrics.items():
            try:
                with tempfile.TemporaryDirectory(prefix="varestorer-eval-") as folder:
                    images, references = _link_pairs(pairs, Path(folder))
                    scores[name] = _finite(metric.score_folders(images, references))
            except METRIC_ERRORS as error:
                refused[name] = f"{name} of {len(pairs)} saved images failed: {type(error).__name__}: {error}"
        return scores, refused


def _keep(candidate: Candidate, name: str, folder: Path | None) -> Path | None:
    """Write an image that was made here to `folder`; return the file that holds the image, if any."""
    if candidate.path is not None or folder is None:
        return candidate.path
    path = folder / f"{name}.png"
    save_image(path, candidate.image)
    return path


def _link_pairs(pairs: Sequence[tuple[Path, Path]], folder: Path) -> tuple[Path, Path]:
    """Two folders that hold links to just these images, and to just their references."""
    folders = folder / "images", folder / "references"
    for side, subfolder in enumerate(folders):
        subfolder.mkdir()
        for number, pair in enumerate(pairs):
            (subfolder / f"{number:06d}{pair[side].suffix}").symlink_to(pair[side].resolve())
    return folders


def _round_trip(image_3HW: Tensor, device: torch.device) -> Tensor:
    """(1, 3, H, W) float32 in [0, 1] as it would be read back from an 8-bit PNG."""
    return (to_uint8(image_3HW).to(torch.float32) / 255)[None].to(device)


def _size(image_3HW: Tensor) -> str:
    return f"{image_3HW.shape[-1]}x{image_3HW.shape[-2]}"


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"the score is {value}")
    return float(value)
