"""An evaluation that can be stopped and taken up again: what is done is in its folder.

`settings.json` says what the figures belong to; images that are made go to `images/`, and a line for every scored
image to `per_image.csv` as soon as it is scored; `files.csv` says by digests which files it was scored from. An
evaluation with other settings is refused the folder.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from varestorer.evaluation.results import Evaluation, Row
from varestorer.utils.errors import UsageError, UserError, reason
from varestorer.utils.files import atomic_write, original_name, printable, read_text, write_json, writing_errors

PER_IMAGE, FILES, SETTINGS, IMAGES = "per_image.csv", "files.csv", "settings.json", "images"
SUMMARY = "summary.json"


class Progress:
    """What is done of an evaluation, in the folder of its records.

    Settings are what the figures depend on, by name, as JSON can hold it. UsageError: the folder holds an evaluation
    with other settings; says which.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.settings = dict(settings)
        self.path = self.folder / PER_IMAGE
        self.images = self.folder / IMAGES  # those that are made
        self.columns: list[str] = []
        remedy = "give another out=, or remove that folder"
        try:
            earlier = json.loads(read_text(self.folder / SETTINGS))
        except FileNotFoundError:
            if self.path.exists() or self.images.exists():
                raise UsageError(f"out={self.folder} holds an evaluation without {SETTINGS}: {remedy}") from None
            return
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read {self.folder / SETTINGS} ({reason(error)}); {remedy}") from error
        wanted = json.loads(json.dumps(self.settings))
        differing = [key for key in {**earlier, **wanted} if _differ(earlier.get(key), wanted.get(key))]
        if differing:
            there, here = (
                ", ".join(f"{key}={_plain(given.get(key))}" for key in differing) for given in (earlier, wanted)
            )
            raise UsageError(f"out={self.folder} holds an evaluation with {there}; this one has {here}: {remedy}")

    def kept(self, columns: Sequence[str]) -> dict[str, Row]:
        """Rows of an earlier run by name: those without errors that have all columns.

        A row whose files are others now is for the evaluator to find out, by its digests.
        """
        digests = {original_name(cells["image"]): cells["digests"] or "" for cells in read_rows(self.folder / FILES)}
        rows = {}
        for cells in read_rows(self.path):
            try:
                scores = {name: float(cells[name]) for name in columns}
                seconds = float(cells["seconds"]) if cells["seconds"] else None
            except (KeyError, ValueError, TypeError):
                continue
            if not cells["error"]:
                name = original_name(cells["image"])
                rows[name] = Row(name, scores, seconds, digests=digests.get(name, ""))
        return rows

    def begin(self, columns: Sequence[str], rows: Iterable[Row]) -> None:
        """Note the settings, and the rows to go on from; UserError, with its name, if a file cannot be written."""
        self.columns = list(columns)
        write_json(self.folder / SETTINGS, self.settings, indent=2)
        rows = list(rows)
        _write(self.folder / FILES, [["image", "digests"], *_digests(rows)])
        write_rows(self.path, self.columns, rows)

    def append(self, rows: Iterable[Row]) -> None:
        """Note rows, so that they are there even if the machine stops now; UserError if the file cannot be written."""
        rows = list(rows)
        _append(self.folder / FILES, _digests(rows))  # first: a row without digests is scored again
        _append(self.path, [_cells(row, self.columns) for row in rows])


def write_rows(target: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Write one line per image: `image`, its scores, `seconds`, `error`; a cell without a value is empty.

    Scores have all their digits, so that they are the same when they are read again.
    """
    _write(target, [["image", *columns, "seconds", "error"], *(_cells(row, columns) for row in rows)])


def _write(target: Path, lines: Iterable[Sequence[str]]) -> None:
    with atomic_write(target) as path, path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)


def _append(path: Path, lines: Iterable[Sequence[str]]) -> None:
    with writing_errors(path), path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, str]]:
    """The lines of a table; none if there is none."""
    try:
        text = read_text(path)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({reason(error)}); give another out=, or remove it") from error
    whole = text[: text.rfind("\n") + 1]  # a line that was being written when the machine stopped is no row
    return list(csv.DictReader(StringIO(whole, newline="")))


def _digests(rows: Iterable[Row]) -> list[list[str]]:
    return [[printable(row.name), row.digests] for row in rows]


def _cells(row: Row, columns: Sequence[str]) -> list[str]:
    numbers = [*(row.scores.get(name) for name in columns), row.seconds]
    texts = printable(row.name), printable("; ".join(row.errors))
    return [texts[0], *("" if number is None else repr(number) for number in numbers), texts[1]]


def _differ(one: Any, other: Any) -> bool:
    """Whether two settings exclude each other; those that have names may have others as well."""
    if isinstance(one, dict) and isinstance(other, dict):
        return any(one[name] != other[name] for name in one.keys() & other.keys())
    return bool(one != other)


def _plain(value: Any) -> str:
    """A setting in a line of text."""
    if isinstance(value, dict):
        return f"[{', '.join(f'{name}: {entry}' for name, entry in value.items())}]"
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def write_records(evaluation: Evaluation, folder: Path, method: str) -> list[Path]:
    """Write the records of an evaluation in place of older ones; returns the files.

    `method` is the name of its row in tables. UserError if a file cannot be written.
    """
    names = [name for name, metric in evaluation.metrics.items() if not metric.is_of_folders]
    write_rows(folder / PER_IMAGE, names, evaluation.rows)
    write_json(folder / SUMMARY, {"method": method} | evaluation.summary(), indent=2)
    return [folder / PER_IMAGE, folder / SUMMARY]
