"""What an evaluation leaves to be read: tables beside the published rows, a page of pictures, a plot.

The plot is the plane of perception and distortion: how faithful methods are against how good their images look.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from varestorer.evaluation.paper_tables import (
    EvaluationRecord,
    figures_table,
    measured_rows,
    pairs_table,
    published_rows,
)
from varestorer.evaluation.pictures import (
    HINT,
    PictureColumn,
    detailed_crops,
    differing_crops,
    enlarge,
    html_picture,
    render,
)
from varestorer.evaluation.results import Evaluation, Row
from varestorer.evaluation.tables import LEGEND, Column, Table, TableRow, figure, write_tables
from varestorer.utils.files import atomic_write, fitting_name, name_bytes, write_text
from varestorer.utils.images import load_image, save_image
from varestorer.utils.loggers import Logger

log = logging.getLogger(__name__)
T = TypeVar("T")
SCATTER = "scatter.png"
GALLERY, COPIES = "gallery.html", "gallery"
MAX_PICTURES = 30
NUM_CROPS = 2
SHOWN_BY_BROWSERS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"})
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


def write_report(
    evaluations: Mapping[str, Evaluation], out: Path, expected_pairs: int | None = None, scale: float = 4
) -> list[Path]:
    """Write `table.md`, `table.tex`, `table.html`, `gallery.html` and `scatter.png`; returns the files written.

    A page without pictures and a plot without methods are left out, and the log says so. UserError if a file cannot be
    read or written.

    Args:
        evaluations: the scores by the names of the methods, of one data set under one protocol.
        out: older files in it are replaced.
        expected_pairs: size of the published test set; over another number of images our means compete for no mark.
        scale: side of the restored images over that of the LQ images.
    """
    records = [record_of(label, evaluation) for label, evaluation in evaluations.items()]
    first = next(iter(evaluations.values()))
    comparison = comparison_table(evaluations, expected_pairs)
    title = f"{first.dataset}, protocol {first.protocol}"
    tables = [comparison, *pairs_table(records, list(first.columns)), *map(figures_table, records)]
    written = write_tables(tables, title, out, "table")
    page = write_gallery(evaluations, out, scale)
    if page is None:
        log.info("no gallery.html: no scored image has a file")
    plot = write_scatter(out / SCATTER, [row for row in comparison.rows if row.is_ranked], first.columns, title)
    if plot is None:
        wanted = f"one of {', '.join(DISTORTION)} and one of {', '.join(PERCEPTION)}"
        log.info("no %s: it needs %s, of ours and of another method over the same images", SCATTER, wanted)
    return [*written, *filter(None, [page, plot and out / SCATTER])]


def record_of(label: str, evaluation: Evaluation) -> EvaluationRecord:
    """As the tables of the papers take it."""
    rows, names = evaluation.rows, evaluation.columns
    scores = {name: {row.name: row.scores[name] for row in rows if name in row.scores} for name in names}
    return EvaluationRecord(label, Path(), evaluation.summary(), scores)


def comparison_table(evaluations: Mapping[str, Evaluation], expected_pairs: int | None = None) -> Table:
    """Our rows under those of the same data set and protocol."""
    first = next(iter(evaluations.values()))
    names = list(first.columns)
    ours, notes = [], [LEGEND]
    for label, evaluation in evaluations.items():
        record = record_of(label, evaluation)
        scored, of = record.summary["n"], "" if len(evaluations) == 1 else f"{label}: "
        is_whole = expected_pairs is None or scored == expected_pairs
        cells = {"method": label, "source": "this evaluation"} | record.means
        ours.append(TableRow(cells, is_ours=True, is_ranked=is_whole, scores=record.scores))
        notes.append(f"{of}{scored} images scored, {len(evaluation.rows) - scored} not.")
        if not is_whole:
            notes.append(f"The other rows are means over {expected_pairs} images: not comparable with ours.")
        if evaluation.seconds_per_image is not None:
            notes.append(f"{of}{evaluation.seconds_per_image:.3f} s per image (wall time of making it).")
    others = [rows(first.dataset, first.protocol, names) for rows in (published_rows, measured_rows)]
    columns = (
        Column("method", is_text=True),
        *(Column(name, is_lower) for name, is_lower in first.columns.items()),
        Column("source", is_text=True),
    )
    return Table(columns, (*others[0], *others[1], *ours), notes=tuple(dict.fromkeys(notes)))


def write_gallery(evaluations: Mapping[str, Evaluation], out: Path, scale: float = 4) -> Path | None:
    """Write `gallery.html`, which opens from its folder: pictures from elsewhere are copied to `gallery/`.

    Returns the page; None when no scored image has a file. See `write_report`.
    """
    first = next(iter(evaluations.values()))
    shown = shared_rows(evaluations)
    if not shown:
        return None
    pictures = [_picture(rows, out, scale) for rows in shown]
    differ = " Framed is where the methods differ most." if len(evaluations) > 1 else ""
    introduction = f"{len(shown)} of {len(first.rows)} images, evenly spread.{differ}"
    title = f"{first.dataset}: {', '.join(evaluations)}"
    page = render("gallery.html", title=title, introduction=introduction, hint=HINT, pictures=pictures)
    write_text(out / GALLERY, page)
    return out / GALLERY


def shared_rows(evaluations: Mapping[str, Evaluation]) -> list[dict[str, Row]]:
    """Of the images that all methods have files of, at most `MAX_PICTURES`, evenly spread: method -> row."""
    found = [{row.name: row for row in evaluation.rows if row.image is not None} for evaluation in evaluations.values()]
    names = [name for name in found[0] if all(name in rows for rows in found)]
    kept = [name for name in names if all(rows[name].scores or not rows[name].errors for rows in found)]
    return [{label: rows[name] for label, rows in zip(evaluations, found, strict=True)} for name in spread(kept)]


def spread(items: list[T], count: int = MAX_PICTURES) -> list[T]:
    """At most `count` of the items, evenly spread, the first always among them."""
    if len(items) <= count:
        return items
    return [items[number * len(items) // count] for number in range(count)]


def _picture(rows: Mapping[str, Row], out: Path, scale: float) -> str:
    """One image of the page; what is the same place is found at the size of the restored images."""
    first = next(iter(rows.values()))
    files = {"LQ": first.lq, **{label: row.image for label, row in rows.items()}, "HQ": first.reference}
    images = {label: load_image(path) for label, path in files.items() if path is not None}
    height, width = (max(images[label].shape[axis] for label in rows) for axis in (-2, -1))
    roles = ("lq", *(f"restored{number or ''}" for number in range(len(rows))), "hq")
    columns = []
    for role, (label, path) in zip(roles, files.items(), strict=True):
        if path is not None:
            image = images[label]
            source = _link(path, out, fitting_name(first.name, f"_{role}.png"))
            scores = rows[label].scores if label in rows else {}
            note = ", ".join(f"{name} {figure(value)}" for name, value in scores.items())
            columns.append(PictureColumn(label, source, enlarge(image, height, width), image.shape[-1] < width, note))
    multiple = max(1, round(scale))
    if len(rows) > 1:
        crops = differing_crops([c.image for c in columns if c.label in rows], NUM_CROPS, multiple)
    else:
        crops = detailed_crops(columns[-1].image, NUM_CROPS, multiple)
    crops.sort(key=lambda crop: crop.left)
    return html_picture(first.name, f"{width} x {height}", columns, crops)


def _link(path: Path, out: Path, name: str) -> str:
    """Relative URL of a picture; it is copied into `out` when it lies elsewhere, or browsers do not show it."""
    shown = path.suffix.lower() in SHOWN_BY_BROWSERS
    target = path.resolve()
    if not (shown and target.is_relative_to(out.resolve())):
        target = out.resolve() / COPIES / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".png":
            with atomic_write(target) as temporary:
                shutil.copyfile(path, temporary)
        else:
            save_image(target, load_image(path))
    return quote(name_bytes(target.relative_to(out.resolve()).as_posix()))


def plane(rows: Sequence[TableRow]) -> tuple[str, str] | None:
    """The first measures of distortion and perception that our row and another one both have, by the metrics' names."""
    for names in product(DISTORTION, PERCEPTION):
        shown = [row for row in rows if set(names) <= _scores(row).keys()]
        if len(shown) > 1 and any(row.is_ours for row in shown):
            return names
    return None


def write_scatter(
    path: Path, rows: Sequence[TableRow], lower_is_better: Mapping[str, bool], title: str
) -> tuple[str, str] | None:
    """Draw the methods as a PNG in the plane that `plane` finds; better is up and right, ours stands out.

    Returns the metrics across and up; None, and nothing is written, when there is no such plane.
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
        look: dict[str, Any] = {"s": 160, "marker": "*", "zorder": 4} if row.is_ours else {"s": 36, "zorder": 3}
        axes.scatter([x], [y], color=_color(row), **look)
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
        style = {"color": _color(row), "weight": "bold" if row.is_ours else "normal"}
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
        line = {"arrowstyle": "-", "color": _color(row), "linewidth": 0.5, "alpha": 0.6}
        axes.annotate("", point, xytext=offset, textcoords="offset points", arrowprops=line, in_layout=False)


def _color(row: TableRow) -> str:
    return OURS if row.is_ours else OTHERS


def _scores(row: TableRow) -> dict[str, float]:
    """The figures of a row that the planes are made of."""
    found = {name: row.cells.get(name) for name in (*DISTORTION, *PERCEPTION)}
    return {name: float(value) for name, value in found.items() if value is not None}


def log_evaluation(evaluation: Evaluation, method: str, logger: Logger) -> None:
    """Log the means as `eval/<dataset>/<metric>`, and the images of the picture page as `eval/<dataset>/images`.

    `method` heads the restored images; the logger is finished afterwards.
    """
    group = f"eval/{evaluation.dataset}"
    metrics = evaluation.summary()["metrics"]
    logger.log_metrics(group, None, {name: entry["mean"] for name, entry in metrics.items()})
    rows = spread([row for row in evaluation.rows if row.image is not None])
    if rows:
        names = [name for name in evaluation.metrics if any(name in row.scores for row in rows)]
        cells = [[row.name, row.lq, row.image, row.reference, *(row.scores.get(n) for n in names)] for row in rows]
        logger.log_table(group, ["image", "LQ", method, "HQ", *names], cells)
    logger.finish()
