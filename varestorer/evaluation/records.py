"""What an evaluation leaves behind: `per_image.csv`, `summary.json`, `table.md`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from varestorer.evaluation.evaluator import Evaluation
from varestorer.evaluation.tables import markdown_table
from varestorer.utils.files import atomic_write

PER_IMAGE, SUMMARY, TABLE = "per_image.csv", "summary.json", "table.md"


def write_records(
    evaluation: Evaluation, folder: Path, method: str = "this run", expected_pairs: int | None = None
) -> list[Path]:
    """Write all records of an evaluation.

    Args:
        evaluation: the scores.
        folder: made when it is not there; older records in it are replaced.
        method: name of our row in the table.
        expected_pairs: size of the published test set, see `markdown_table`.
    Returns:
        The files written.
    Raises:
        UserError: a file cannot be written; names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_per_image(evaluation, folder / PER_IMAGE)
    with atomic_write(folder / SUMMARY) as path:
        path.write_text(json.dumps(evaluation.summary(), indent=2) + "\n", encoding="utf-8")
    with atomic_write(folder / TABLE) as path:
        path.write_text(markdown_table(evaluation, method, expected_pairs), encoding="utf-8")
    return [folder / name for name in (PER_IMAGE, SUMMARY, TABLE)]


def write_per_image(evaluation: Evaluation, target: Path) -> None:
    """Write one line per image: `image`, its scores, `seconds` if images were made here, `error`.

    A cell is empty where there is no value.
    """
    names = [name for name, metric in evaluation.metrics.items() if name not in evaluation.dataset_scores]
    is_timed = evaluation.seconds_per_image is not None
    with atomic_write(target) as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *names, *(["seconds"] if is_timed else []), "error"])
        for row in evaluation.rows:
            scores = [_number(row.scores.get(name)) for name in names]
            seconds = [_number(row.seconds)] if is_timed else []
            writer.writerow([row.name, *scores, *seconds, "; ".join(row.errors)])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"
