"""Intervals of means, paired comparisons, and the marks that follow from them."""

import numpy as np
import pytest

from varestorer.evaluation.results import mean_interval, paired, worst_tenth
from varestorer.evaluation.tables import BEST, SECOND, TIE, Column, Table, TableRow, to_latex, to_markdown


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


def row(name: str, mean: float, shift: float | None, spread: float) -> TableRow:
    drawn = np.random.default_rng(len(name)).normal(0, spread, 50)
    scores = {} if shift is None else {"lpips": {str(n): mean + float(v) for n, v in enumerate(drawn)}}
    return TableRow({"method": name, "lpips": mean}, scores=scores)


def test_what_cannot_be_told_apart_is_neither_best_nor_second() -> None:
    columns = (Column("method", is_text=True), Column("lpips", lower_is_better=True))
    clear = Table(columns, (row("a", 0.30, 0.0, 1e-4), row("bb", 0.31, 0.0, 1e-4), row("ccc", 0.40, None, 0.0)))
    assert [mark.get("lpips") for mark in clear.marks()] == [BEST, SECOND, None]
    close = Table(columns, (row("a", 0.30, 0.0, 0.1), row("bb", 0.301, 0.0, 0.1), row("ccc", 0.40, None, 0.0)))
    assert [mark.get("lpips") for mark in close.marks()] == [TIE, TIE, None]
    assert "0.3000 ≈" in to_markdown([close], "x") and "**" not in to_markdown([close], "x").split("lpips", 1)[1]
    assert r"0.3010 $\approx$" in to_latex([close], "x")
    published = Table(columns, (row("a", 0.30, None, 0.0), row("bb", 0.301, None, 0.0)))
    assert [mark.get("lpips") for mark in published.marks()] == [BEST, SECOND]  # nobody knows their images
