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
    """One image of an evaluation, by the name of its pair."""

    name: str
    scores: dict[str, float] = field(default_factory=dict)  # by column; those that failed are absent
    seconds: float | None = None  # that generating it took; None when it was given, or not noted
    errors: tuple[str, ...] = ()  # a line each
    image: Path | None = None  # the file that was scored, where there is one
    reference: Path | None = None  # the high-quality file, where there is one
    lq: Path | None = None
    digests: str = ""  # `file_sha256` of LQ, HQ and scored file, as far as there are any, spaces between


@dataclass(frozen=True)
class Evaluation:
    """Scores of a data set under a protocol."""

    dataset: str
    protocol: str
    columns: dict[str, bool]  # the metrics asked for -> whether lower is better, in the order of the table
    metrics: dict[str, Metric]  # that ran
    rows: tuple[Row, ...]  # one per pair
    dataset_scores: dict[str, float]  # of metrics of the whole set (FID)
    unavailable: dict[str, str]  # metrics that did not run -> reason

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
            spread: dict[str, Any] = {"std": None, "ci95": None, "worst_tenth": None}
            if name in self.dataset_scores:
                mean, count = (
                    self.dataset_scores[name],
                    sum(row.image is not None and not row.errors for row in self.rows),
                )
            elif values:
                mean, count, worst = statistics.fmean(values), len(values), worst_tenth(values, self.columns[name])
                spread = {"std": statistics.pstdev(values), "ci95": [*mean_interval(values)], "worst_tenth": worst}
            else:
                unavailable.setdefault(name, "no image could be scored")
                continue
            metrics[name] = {"mean": mean, **spread, "n": count, "id": metric.id, "weights_sha256": metric.weights}
        return {
            "dataset": self.dataset,
            "protocol": self.protocol,
            "n": sum(bool(row.scores) or not row.errors for row in self.rows),
            "metrics": metrics,
            "unavailable": unavailable,
        }


@dataclass(frozen=True)
class Difference:
    """Scores of one method less those of another, on the `n` images that both have."""

    mean: float
    low: float  # and high: 95 % interval of the mean
    high: float
    wins: int  # images on which the first is better
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


def paired(one: Mapping[str, float], other: Mapping[str, float], lower_is_better: bool) -> Difference | None:
    """Compare two methods on the images that both were scored on; None where there are fewer than two."""
    shared = [name for name in one if name in other]
    if len(shared) < 2:
        return None
    differences = [one[name] - other[name] for name in shared]
    wins = sum(d < 0 if lower_is_better else d > 0 for d in differences)
    return Difference(float(np.mean(differences)), *mean_interval(differences), wins, len(shared))
