"""How sure a mean over images is, and whether two methods differ on the same images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

REPEATS = 2000  # of the bootstrap: the ends of an interval of 100 images move by 1 % of it


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
