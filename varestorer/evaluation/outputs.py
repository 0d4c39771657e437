"""What an evaluation leaves to be read: tables beside the published rows, a page of pictures, a plot."""

from __future__ import annotations

import logging
from pathlib import Path

from varestorer.evaluation.baselines import measured_rows, published_rows
from varestorer.evaluation.gallery import write_gallery
from varestorer.evaluation.renderers import LEGEND, write_tables
from varestorer.evaluation.results import Evaluation
from varestorer.evaluation.scatter import DISTORTION, PERCEPTION, write_scatter
from varestorer.evaluation.tables import Column, Table, TableRow

log = logging.getLogger(__name__)

SCATTER = "scatter.png"


def write_report(
    evaluation: Evaluation,
    out: Path,
    method: str = "this run",
    expected_pairs: int | None = None,
    scale: float = 4,
) -> list[Path]:
    """Write `table.md`, `table.tex`, `table.html`, `gallery.html` and `scatter.png`.

    Args:
        evaluation: the scores.
        out: made when it is not there; older files in it are replaced.
        method: name of our row.
        expected_pairs: size of the published test set; over another number of images our means compete for no mark.
        scale: side of the restored images over that of the LQ images.
    Returns:
        The files written; a page without pictures and a plot without methods are left out, and the log says so.
    Raises:
        UserError: a file cannot be read or written; names it.
    """
    comparison = comparison_table(evaluation, method, expected_pairs)
    title = f"{evaluation.dataset}, protocol {evaluation.protocol}"
    written = write_tables([comparison, figures_table(evaluation)], title, out, "table")
    page = write_gallery(evaluation, out, method, scale)
    if page is None:
        log.info("no gallery.html: no scored image has a file")
    else:
        written.append(page)
    comparable = [row for row in comparison.rows if row.is_ranked]
    if write_scatter(out / SCATTER, comparable, evaluation.columns, title) is None:
        wanted = f"one of {', '.join(DISTORTION)} and one of {', '.join(PERCEPTION)}"
        log.info("no %s: it needs %s, of ours and of another method over the same images", SCATTER, wanted)
    else:
        written.append(out / SCATTER)
    return written


def comparison_table(evaluation: Evaluation, method: str, expected_pairs: int | None = None) -> Table:
    """Our row under those of the same data set and protocol."""
    summary = evaluation.summary()
    names = list(evaluation.columns)
    is_whole = expected_pairs is None or summary["n"] == expected_pairs
    means = {name: entry["mean"] for name, entry in summary["metrics"].items()}
    ours = TableRow({"method": method, "source": "this evaluation"} | means, is_ours=True, is_ranked=is_whole)
    others = [rows(evaluation.dataset, evaluation.protocol, names) for rows in (published_rows, measured_rows)]
    notes = [LEGEND, f"{summary['n']} images scored, {len(evaluation.rows) - summary['n']} not."]
    if not is_whole:
        notes.append(f"The other rows are means over {expected_pairs} images: not comparable with ours.")
    if evaluation.seconds_per_image is not None:
        notes.append(f"{evaluation.seconds_per_image:.3f} s per image (wall time of making it).")
    columns = (
        Column("method", is_text=True),
        *(Column(name, is_lower) for name, is_lower in evaluation.columns.items()),
        Column("source", is_text=True),
    )
    return Table(columns, (*others[0], *others[1], ours), notes=tuple(notes))


def figures_table(evaluation: Evaluation) -> Table:
    """What our figures rest on: spread, number of images, pyiqa's id, weights; and what did not run, and why."""
    summary = evaluation.summary()
    rows = []
    for name, entry in summary["metrics"].items():
        weights = (entry["weights_sha256"] or "none")[:16]
        spread = {key: None if entry[key] is None else f"{entry[key]:.4f}" for key in ("mean", "std", "worst_tenth")}
        interval = None if entry["ci95"] is None else "{:.4f} to {:.4f}".format(*entry["ci95"])
        spread |= {"95 % of the mean": interval, "worst tenth": spread["worst_tenth"]}
        rows.append(TableRow({**entry, **spread, "metric": name, "weights (SHA-256)": weights}))
    columns = (
        Column("metric", is_text=True),
        *(Column(name) for name in ("mean", "95 % of the mean", "std", "worst tenth", "n")),
        *(Column(name, is_text=True) for name in ("id", "weights (SHA-256)")),
    )
    missing = tuple(f"{name} is not available: {reason}" for name, reason in summary["unavailable"].items())
    return Table(columns, tuple(rows), "Our figures", missing)
