"""Intervals of means, and paired comparisons."""

import numpy as np
import pytest

from varestorer.evaluation.results import mean_interval, paired, worst_tenth


def test_the_interval_is_that_of_the_normal_mean_and_repeats() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400).tolist()
    low, high = mean_interval(values)
    wanted = 1.96 * np.std(values) / 20
    assert np.mean(values) - low == pytest.approx(wanted, rel=0.1) == pytest.approx(high - np.mean(values), rel=0.1)
    assert mean_interval(values) == (low, high) and mean_interval(values, seed=1) != (low, high)
    assert mean_interval([3.0]) == (3.0, 3.0)


def test_the_worst_tenth_is_of_one_image_at_least_and_knows_the_direction() -> None:
    assert worst_tenth([float(n) for n in range(30)], lower_is_better=False) == 1.0  # 0, 1, 2
    assert worst_tenth([float(n) for n in range(30)], lower_is_better=True) == 28.0
    assert worst_tenth([0.2, 0.1], lower_is_better=True) == 0.2


def test_pairs_see_what_means_alone_do_not() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(0.3, 0.1, 60)  # images differ more than methods do
    one = {str(n): float(v) for n, v in enumerate(hard)}
    other = {name: value + 0.01 + float(rng.normal(0, 0.005)) for name, value in one.items()}
    found = paired(one, other | {"else": 9.0}, lower_is_better=True)
    assert found is not None and found.n == 60 and not found.is_tie
    assert found.mean == pytest.approx(-0.01, abs=0.002) and found.low < found.mean < found.high < 0 and found.wins > 50
    noise = {name: value + float(rng.normal(0, 0.05)) for name, value in one.items()}
    level = paired(one, noise, lower_is_better=True)
    assert level is not None and level.is_tie
    assert paired(one, {"0": 1.0}, lower_is_better=True) is None
