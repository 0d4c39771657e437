"""The perception-distortion plane: how faithful methods are against how good their images look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from varestorer.evaluation.tables import TableRow
from varestorer.utils.files import atomic_write

DISTORTION = ("psnr", "lpips")
PERCEPTION = ("niqe", "musiq", "clipiqa")
OURS, OTHERS = "#c2410c", "#1f4e79"
LABEL_PLACES = [
    ((x if side == "left" else -x, y), side)
    for distance in range(8)
    for y in (12 * distance, -12 * distance)
    for side in ("left", "right")
    for x in [8 + 2 * distance]
]
"""Where a label may stand (points from its point) and which of its sides is there, nearest first."""


def plane(rows: Sequence[TableRow]) -> tuple[str, str] | None:
    """The first measures of distortion and perception that our row and another one both have.

    Args:
        rows: whose cells are figures by the names of metrics.
    """
    for distortion in DISTORTION:
        for perception in PERCEPTION:
            has = [{distortion, perception} <= _scores(row).keys() for row in rows]
            if any(found and row.is_ours for found, row in zip(has, rows, strict=True)) and sum(has) > 1:
                return distortion, perception
    return None


def write_scatter(
    path: Path, rows: Sequence[TableRow], lower_is_better: Mapping[str, bool], title: str
) -> tuple[str, str] | None:
    """Draw the methods in the plane that `plane` finds; better is up and right, ours stands out.

    Args:
        path: a PNG.
        rows: with a `method` and figures by the names of metrics.
        lower_is_better: direction of each metric.
        title: of the picture.
    Returns:
        The metrics across and up; None, and nothing is written, when there is no such plane.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = plane(rows)
    if names is None:
        return None
    figure = Figure(figsize=(8, 5.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn = sorted((row for row in rows if set(names) <= _scores(row).keys()), key=lambda row: not row.is_ours)
    points = [(_scores(row)[names[0]], _scores(row)[names[1]]) for row in drawn]
    for row, (x, y) in zip(drawn, points, strict=True):
        marker, size = ("*", 160) if row.is_ours else ("o", 36)
        axes.scatter([x], [y], color=_colour(row), s=size, marker=marker, zorder=4 if row.is_ours else 3)
    for name, side, invert in zip(names, "xy", (axes.invert_xaxis, axes.invert_yaxis), strict=True):
        axes.set(**{f"{side}label": f"{name} (better {'→' if side == 'x' else '↑'})"})
        if lower_is_better[name]:
            invert()
    axes.margins(0.15)
    axes.grid(alpha=0.25)
    axes.set_title(title, fontsize=10)
    figure.canvas.draw()  # settles where things are, so that labels can keep clear of each other
    _label(axes, drawn, points)
    with atomic_write(path) as temporary:
        figure.savefig(temporary)
    return names


def _label(axes: Any, rows: Sequence[TableRow], points: Sequence[tuple[float, float]]) -> None:
    """Name each point at the nearest place where the name covers no other name and no point."""
    pixels = axes.transData.transform(points)
    placed: list[Any] = []
    for row, point in zip(rows, points, strict=True):
        style = {"color": _colour(row), "weight": "bold" if row.is_ours else "normal"}
        label = axes.annotate(
            str(row.cells["method"]),
            point,
            textcoords="offset points",
            xytext=(0, 0),
            fontsize=8,
            va="center",
            parse_math=False,
            in_layout=False,
            **style,
        )
        for offset, side in LABEL_PLACES:
            label.set(position=offset, ha=side)
            box = label.get_window_extent().padded(1)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if inside and not box.count_overlaps(placed) and not box.count_contains(pixels):
                break
        placed.append(box)
        line = {"arrowstyle": "-", "color": _colour(row), "linewidth": 0.5, "alpha": 0.6}
        axes.annotate("", point, xytext=offset, textcoords="offset points", arrowprops=line, in_layout=False)


def _colour(row: TableRow) -> str:
    return OURS if row.is_ours else OTHERS


def _scores(row: TableRow) -> dict[str, float]:
    """The figures of a row that the planes are made of."""
    found = {name: row.cells.get(name) for name in (*DISTORTION, *PERCEPTION)}
    return {name: float(value) for name, value in found.items() if value is not None}
