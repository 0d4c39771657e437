"""One step beside scale-by-scale generation, as a table, as content for JSON, and as a picture of bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from varestorer.evaluation.speed.generation import Counts, Variant
from varestorer.evaluation.speed.report import si
from varestorer.utils.files import atomic_write
from varestorer.utils.timing import Timing

CLAIMED = 10.0
"""How many times as fast as generation scale by scale the paper calls one step."""


@dataclass(frozen=True)
class Measured:
    """A variant at one size of batch: what it costs and how long it took."""

    variant: Variant
    batch: int
    counts: Counts
    timing: Timing


def generation_text(rows: Sequence[Measured], matrix_rate: float) -> str:
    """A table for each size of batch, each with two sentences on what explains its ratios."""
    width = max(len(row.variant.name) for row in rows) + 2
    titles = ("tokens", "passes", "FLOP", "x FLOP", "ms", "spread", "x time", "FLOP/s", "of rate")
    lines = [f"matrix products: {si(matrix_rate, 'FLOP/s')}"]
    for batch in dict.fromkeys(row.batch for row in rows):
        found = [row for row in rows if row.batch == batch]
        first = found[0]
        lines += ["", f"{f'batch {batch}':{width}}" + "".join(f"{title:>9}" for title in titles)]
        for row in found:
            seconds, spread = row.timing.median, row.timing.spread
            cells = (
                str(row.counts.tokens),
                str(row.counts.passes),
                si(row.counts.flops),
                f"{row.counts.flops / first.counts.flops:.2f}",
                f"{1000 * seconds:.1f}",
                f"{1000 * spread:.1f}",
                f"{seconds / first.timing.median:.2f}",
                si(row.counts.flops / seconds),
                f"{100 * row.counts.flops / seconds / matrix_rate:.1f} %",
            )
            lines.append(f"{row.variant.name:{width}}" + "".join(f"{cell:>9}" for cell in cells))
        lines += explanation(found)
    return "\n".join(lines)


def explanation(rows: Sequence[Measured]) -> list[str]:
    """Sentences: best against best by its causes, and which variant comes nearest to the paper's ratio.

    Args:
        rows: of one batch; the first is the one that all are compared with.
    """
    first, others = rows[0], [row for row in rows if not row.variant.is_one_step]
    if not others:
        return []
    guided = [row for row in others if "cfg" in row.variant.words] or others
    best = min(guided, key=lambda row: row.timing.median)
    nearest = min(others, key=lambda row: abs(math.log(_ratio(row, first) / CLAIMED)))
    operations = best.counts.flops / first.counts.flops
    return [
        f"best scale by scale: {best.variant.name} takes {_ratio(best, first):.2f} times as long as "
        f"{first.variant.name}: {operations:.2f} times the operations ({best.counts.tokens} tokens against "
        f"{first.counts.tokens}), at {_ratio(best, first) / operations:.2f} times the time for each, in "
        f"{best.counts.passes} passes against {first.counts.passes}",
        f"nearest to {CLAIMED:.0f} times: {nearest.variant.name}, {_ratio(nearest, first):.1f} times as long, "
        f"{nearest.counts.flops / first.counts.flops:.1f} times the operations",
    ]


def _ratio(row: Measured, first: Measured) -> float:
    return row.timing.median / first.timing.median


def generation_content(rows: Sequence[Measured], matrix_rate: float) -> dict[str, Any]:
    """The same for programs."""
    runs = [
        {
            "variant": row.variant.name,
            "batch": row.batch,
            **asdict(row.counts),
            "seconds": row.timing.median,
            "spread": row.timing.spread,
            "all_seconds": row.timing.seconds,
        }
        for row in rows
    ]
    return {"matrix_rate": matrix_rate, "runs": runs}


def write_generation_bars(path: Path, rows: Sequence[Measured], title: str) -> None:
    """Draw times and operations of each variant as multiples of the first one of its batch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 + 0.45 * len(rows)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    firsts = {row.batch: row for row in reversed(rows)}
    places = range(len(rows))
    times = [_ratio(row, firsts[row.batch]) for row in rows]
    flops = [row.counts.flops / firsts[row.batch].counts.flops for row in rows]
    bars = axes.barh([place - 0.2 for place in places], times, height=0.4, color="#c2410c", label="time")
    axes.bar_label(bars, [f" {row.timing.median * 1000:.0f} ms" for row in rows], fontsize=7)
    axes.barh([place + 0.2 for place in places], flops, height=0.4, color="#1f4e79", label="operations")
    axes.set_yticks(places, [f"{row.variant.name}, batch {row.batch}" for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("times as much as the first")
    axes.set_title(title, fontsize=9)
    axes.legend(loc="lower right", fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary)
