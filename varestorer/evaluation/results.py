"""What an evaluation finds: the scores of each image, what they add up to, and how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from varestorer.utils.iqa import Metric

Pair = tuple[str, Path, Path | None]
"""Name, low-quality file, high-quality file (None: there is no reference)."""
REPEATS = 2000  # of the bootstrap: the ends of an interval of 100 images move by 1 % of it


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
        seconds: that generating it took; None when it was given, or not noted.
        errors: what went wrong, one line each.
        image: the file that was scored, where there is one.
        reference: the high-quality file, where there is one.
        lq: the low-quality file.
        digests: `file_sha256` of LQ, HQ and scored file, as far as there are any, in a row with spaces between.
    """

    name: str
    scores: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    errors: tuple[str, ...] = ()
    image: Path | None = None
    reference: Path | None = None
    lq: Path | None = None
    digests: str = ""


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
        """What `summary.json` holds.

        `std` is the population's, `ci95` the 95 % interval of the mean, `worst_tenth` the mean of the worst tenth of
        the images; all null for metrics of the whole set.
        """
        unavailable = dict(self.unavailable)
        metrics: dict[str, Any] = {}
        for name, metric in self.metrics.items():
            values = [row.scores[name] for row in self.rows if name in row.scores]
            entry = {"id": metric.id, "weights_sha256": metric.weights}
            if name in self.dataset_scores:
                scored = sum(row.image is not None and not row.errors for row in self.rows)
                unknown = {"std": None, "ci95": None, "worst_tenth": None}
                metrics[name] = {"mean": self.dataset_scores[name], **unknown, "n": scored, **entry}
            elif values:
                mean, std = statistics.fmean(values), statistics.pstdev(values)
                worst = worst_tenth(values, self.columns[name])
                spread = {"std": std, "ci95": [*mean_interval(values)], "worst_tenth": worst}
                metrics[name] = {"mean": mean, **spread, "n": len(values), **entry}
            else:
                unavailable.setdefault(name, "no image could be scored")
        return {
            "dataset": self.dataset,
            "protocol": self.protocol,
            "n": sum(bool(row.scores) or not row.errors for row in self.rows),
            "metrics": metrics,
            "unavailable": unavailable,
        }


@dataclass(frozen=True)
class Difference:
    """Scores of one method less those of another, on the images that both have.

    Attributes:
        mean: of the differences.
        low, high: 95 % interval of that mean.
        wins: images on which the first is better.
        n: images.
    """

    mean: float
    low: float
    high: float
    wins: int
    n: int

    @property
    def is_tie(self) -> bool:
        """Whether no difference lies within the interval."""
        return self.low <= 0 <= self.high


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean: percentiles of the bootstrap over images (Efron 1979), drawn with a seed."""
    means = np.asarray(values)[_draws(len(values), seed)].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@lru_cache(maxsize=8)
def _draws(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(n, size=(REPEATS, n))


def worst_tenth(values: Sequence[float], lower_is_better: bool) -> float:
    """Mean of the worst tenth of the images, of one at least."""
    count = math.ceil(len(values) / 10)
    return float(np.mean(sorted(values, reverse=lower_is_better)[:count]))


def paired(
    one: Mapping[str, float], other: Mapping[str, float], lower_is_better: bool, seed: int = 0
) -> Difference | None:
    """Compare two methods on the images that both were scored on; None where there are fewer than two."""
    shared = [name for name in one if name in other]
    if len(shared) < 2:
        return None
    differences = [one[name] - other[name] for name in shared]
    wins = sum(d < 0 if lower_is_better else d > 0 for d in differences)
    return Difference(float(np.mean(differences)), *mean_interval(differences, seed), wins, len(shared))
