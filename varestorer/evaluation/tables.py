"""A table of methods: columns with a direction, rows of figures, and which figures are the best.

One model for every table of the project; `renderers` turns it into Markdown, LaTeX and HTML.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from varestorer.evaluation.intervals import paired

MISSING = "–"
BEST, SECOND, TIE = "best", "second", "tie"
LEVEL = "≈"

Cell = str | float | int | None
"""What stands in a table. In a column of figures a text is a figure as somebody else printed it."""


def figure(value: float) -> str:
    """A figure with four digits, as papers print them: 0.7341, 4.763, 25.15, 117.2."""
    size = abs(value)
    decimals = next((n for limit, n in ((1, 4), (10, 3), (100, 2), (1000, 1)) if size < limit), 0)
    return f"{value:.{decimals}f}"


def printed(cell: Cell) -> str:
    """The text of a cell; a dash where there is nothing."""
    if cell is None:
        return MISSING
    return figure(cell) if isinstance(cell, float) else str(cell)


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        name: its heading, and the key of its cells.
        lower_is_better: direction of its figures; None where nothing is best.
        is_text: words instead of figures.
    """

    name: str
    lower_is_better: bool | None = None
    is_text: bool = False

    @property
    def heading(self) -> str:
        """The name with an arrow for its direction."""
        arrow = {None: "", True: " ↓", False: " ↑"}[self.lower_is_better]
        return self.name + arrow


@dataclass(frozen=True)
class TableRow:
    """A row.

    Attributes:
        cells: column -> figure or text; those that are absent are shown as a dash.
        is_ours: whether it is marked as ours.
        is_ranked: whether it competes for the marks; not where its figures are means over other images.
        group: rows of one group stand under its name, and only they are compared.
        scores: column -> image -> score, where they are known: figures whose paired difference is not sure are level.
    """

    cells: Mapping[str, Cell]
    is_ours: bool = False
    is_ranked: bool = True
    group: str = ""
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    """A cell as it is shown: its text, `BEST`, `SECOND`, `TIE` or no mark, and whether it is words."""

    text: str
    mark: str
    is_text: bool


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: in order.
        rows: in order; those of one group together.
        title: what it shows.
        notes: sentences under it.
    """

    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]
    title: str = ""
    notes: tuple[str, ...] = ()

    def marks(self) -> list[dict[str, str]]:
        """For each row, column -> `BEST`, `SECOND`, or `TIE` with the best; figures printed alike share a mark."""
        marks: list[dict[str, str]] = [{} for _ in self.rows]
        for group in dict.fromkeys(row.group for row in self.rows):
            ranked = [n for n, row in enumerate(self.rows) if row.group == group and row.is_ranked]
            for column in self.columns:
                for number, mark in self._ranking(column, ranked).items():
                    marks[number][column.name] = mark
        return marks

    def _ranking(self, column: Column, ranked: list[int]) -> dict[int, str]:
        """Marks of one column among these rows, by row."""
        if column.lower_is_better is None:
            return {}
        cells = {number: self.rows[number].cells.get(column.name) for number in ranked}
        figures = {number: float(printed(cell)) for number, cell in cells.items() if cell is not None}
        if len(figures) < 2:
            return {}
        order = sorted(set(figures.values()), reverse=not column.lower_is_better)
        places = dict(zip(order, (BEST, SECOND), strict=False))
        marks = {number: places[value] for number, value in figures.items() if value in places}
        leaders = [number for number, mark in marks.items() if mark == BEST]
        level = {n for first in leaders for n in figures if n not in leaders and self._is_tie(column, first, n)}
        if level:  # with several that nobody can tell apart, none is best or second
            marks = {number: mark for number, mark in marks.items() if mark == BEST} | dict.fromkeys(level, TIE)
            marks |= dict.fromkeys(leaders, TIE)
        return marks

    def _is_tie(self, column: Column, one: int, other: int) -> bool:
        first, second = (self.rows[number].scores.get(column.name, {}) for number in (one, other))
        found = paired(first, second, bool(column.lower_is_better))
        return found is not None and found.is_tie

    def shown(self) -> list[list[Shown]]:
        """All cells as they are shown, row by row."""
        return [
            [self._shown(row.cells.get(c.name), marks.get(c.name, ""), c.is_text) for c in self.columns]
            for row, marks in zip(self.rows, self.marks(), strict=True)
        ]

    @staticmethod
    def _shown(cell: Cell, mark: str, is_text: bool) -> Shown:
        return Shown(printed(cell) + (f" {LEVEL}" if mark == TIE else ""), mark, is_text)
