"""What other programs read of an evaluation: `per_image.csv`, `summary.json`."""

from __future__ import annotations

from pathlib import Path

from varestorer.evaluation.progress import PER_IMAGE, write_rows
from varestorer.evaluation.results import Evaluation
from varestorer.utils.files import write_json

SUMMARY = "summary.json"


def write_records(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write the records of an evaluation.

    Args:
        evaluation: the scores.
        folder: made when it is not there; older records in it are replaced.
    Returns:
        The files written.
    Raises:
        UserError: a file cannot be written; names it.
    """
    names = [name for name, metric in evaluation.metrics.items() if not metric.is_of_folders]
    write_rows(folder / PER_IMAGE, names, evaluation.rows)
    write_json(folder / SUMMARY, evaluation.summary(), indent=2)
    return [folder / PER_IMAGE, folder / SUMMARY]
