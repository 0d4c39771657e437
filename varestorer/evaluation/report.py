"""The report of a training run: one HTML file that holds loss curves, pictures, a table of scores and the facts."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from torch import Tensor

from varestorer.evaluation.pictures import (
    DETAIL_WIDTH,
    HINT,
    PictureColumn,
    detailed_crops,
    enlarge,
    html_picture,
    png_url,
    render,
)
from varestorer.evaluation.tables import Column, Table, TableRow, html_table, printed
from varestorer.utils.files import write_text

NOT_LOSSES = frozenset({"stage", "step", "seconds", "lr", "epoch", "grad_norm", "skipped"})


def write_run_report(
    path: str | Path,
    title: str,
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    rows: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Mapping[str, Tensor]],
    facts: Mapping[str, Any],
) -> None:
    """Write a self-contained report; UserError if the file cannot be written.

    Args:
        path: the HTML file.
        title: its heading.
        curves: stage -> lines of `metrics.jsonl`; `loss` is drawn large, its parts beside it.
        rows: one dict per method; the keys are the columns. In columns called like a score (PSNR, SSIM, ...) the best
            value is bold, in those with `second` the smallest.
        pictures: photograph's name -> its columns, label -> (3, H, W) in [0, 1], the reference last. Smaller ones are
            enlarged by repeating pixels.
        facts: name -> value: configuration, git hash, wall time; a value may be a dict of its own.
    """
    shown = {
        "scores": html_table(methods_table(rows)) if rows else "",
        "hint": HINT,
        "pictures": [shown_picture(name, picture) for name, picture in pictures.items()],
        "curves": [(stage, *drawn) for stage, lines in curves.items() if lines and (drawn := draw_curves(lines))],
        "facts": facts.items(),
        "printed": printed,
    }
    write_text(path, render("report.html", title=title, **shown))


def methods_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of methods in which scores and times have a direction."""
    columns = []
    for name in dict.fromkeys(name for row in rows for name in row):
        is_text = not any(_is_number(row.get(name)) for row in rows)
        columns.append(Column(name, _lower_is_better(name), is_text))
    return Table(tuple(columns), tuple(TableRow(row) for row in rows))


def shown_picture(name: str, picture: Mapping[str, Tensor]) -> Markup:
    """One photograph: its columns at the size of the largest, and the place with the most detail."""
    height = max(image.shape[-2] for image in picture.values())
    width = max(image.shape[-1] for image in picture.values())
    columns = []
    for label, image in picture.items():
        full = enlarge(image, height, width)
        columns.append(PictureColumn(label, png_url(full), full, width < DETAIL_WIDTH))
    return html_picture(name, f"{width} x {height}", columns, detailed_crops(columns[-1].image))


def draw_curves(lines: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """The losses of a stage over its steps: first and last values in words, and the URL of the picture, if any."""
    from matplotlib.figure import Figure

    names = [name for name in lines[-1] if name not in NOT_LOSSES and _is_number(lines[-1][name])]
    names.sort(key=lambda name: name != "loss")
    if not names:
        return None
    columns = min(len(names), 4)
    grid_rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.3 * columns, 2.3 * grid_rows), dpi=110, layout="constrained")
    for number, name in enumerate(names):
        steps, values = series(lines, name)
        axes = figure.add_subplot(grid_rows, columns, number + 1)
        axes.plot(steps, values, color="#9bb7d4", linewidth=0.8)
        axes.plot(steps, smooth(values), color="#1f4e79", linewidth=1.6)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        axes.set_xlabel("step", fontsize=7)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    _, losses = series(lines, names[0])
    fall = f"{names[0]} {np.mean(losses[:10]):.4g} (first 10 steps) to {np.mean(losses[-10:]):.4g} (last 10)"
    return f"{len(lines)} steps; {fall}", "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one key, lines without it left out."""
    numbered = [(line.get("step", i + 1), line.get(name)) for i, line in enumerate(lines)]
    kept = [(step, value) for step, value in numbered if _is_number(value)]
    return np.array([step for step, _ in kept]), np.array([value for _, value in kept], dtype=float)


def smooth(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Centered running mean over `share` of the series; the window shrinks at both ends."""
    half = max(int(len(values) * share / 2), 0)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def _lower_is_better(column: str) -> bool | None:
    """The direction of a column of scores or times; None for other columns."""
    name = column.lower()
    if "second" in name or any(word in name for word in ("lpips", "dists", "niqe")):
        return True
    return False if any(word in name for word in ("psnr", "ssim", "musiq", "clipiqa")) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
