"""A table of methods: columns with a direction, rows of figures, and which figures are the best.

One model for every table of the project, and its three forms: Markdown, LaTeX, HTML.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from varestorer.evaluation.pictures import render
from varestorer.evaluation.results import paired
from varestorer.utils.files import write_text

MISSING = "–"
BEST, SECOND, TIE = "best", "second", "tie"
LEVEL = "≈"
Cell = str | float | int | None
"""What stands in a table. In a column of figures a text is a figure as somebody else printed it."""
OURS = "▸"
LEGEND = (
    f"Best in bold, second underlined; {LEVEL} level: the 95 % interval of the paired difference holds zero; {OURS} "
    "this evaluation; ↑ higher is better, ↓ lower is better."
)
LATEX_CHARACTERS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "–": "--",
    "×": r"$\times$",
    "²": r"$^2$",
    LEVEL: r"$\approx$",
    OURS: r"$\triangleright$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


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
    """A column; its name is the key of its cells too."""

    name: str
    lower_is_better: bool | None = None  # None where nothing is best
    is_text: bool = False  # words instead of figures

    @property
    def heading(self) -> str:
        """The name with an arrow for its direction."""
        return self.name + {None: "", True: " ↓", False: " ↑"}[self.lower_is_better]


@dataclass(frozen=True)
class TableRow:
    """A row; cells that are absent are shown as a dash.

    Where `scores` (column -> image -> score) are known, figures whose paired difference is not sure are level.
    """

    cells: Mapping[str, Cell]
    is_ours: bool = False
    is_ranked: bool = True  # competes for the marks; not where its figures are means over other images
    group: str = ""  # rows of one group stand together under its name, and only they are compared
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    """A cell as it is shown; its mark is `BEST`, `SECOND`, `TIE` or empty."""

    text: str
    mark: str
    is_text: bool


@dataclass(frozen=True)
class Table:
    """Columns, rows, a title, and sentences under it."""

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
        shown = []
        for row, marks in zip(self.rows, self.marks(), strict=True):
            level = {name: f" {LEVEL}" for name, mark in marks.items() if mark == TIE}
            texts = {c.name: printed(row.cells.get(c.name)) + level.get(c.name, "") for c in self.columns}
            shown.append([Shown(texts[c.name], marks.get(c.name, ""), c.is_text) for c in self.columns])
        return shown


def write_tables(tables: Sequence[Table], title: str, folder: Path, stem: str) -> list[Path]:
    """Write `<stem>.md`, `<stem>.tex` and `<stem>.html`; UserError, with its name, if a file cannot be written."""
    texts = {"md": to_markdown(tables, title), "tex": to_latex(tables, title), "html": to_html(tables, title)}
    written = []
    for suffix, text in texts.items():
        written.append(folder / f"{stem}.{suffix}")
        write_text(written[-1], text)
    return written


def to_markdown(tables: Sequence[Table], title: str) -> str:
    """GitHub's Markdown; its underline is `<ins>`."""
    parts = [f"# {escape_markdown(title)}"]
    for table in tables:
        lines = [
            [escape_markdown(column.heading) for column in table.columns],
            ["---" if column.is_text else "---:" for column in table.columns],
        ]
        for heading, cells in _marked(table, escape_markdown, "**{}**", "<ins>{}</ins>", OURS):
            lines += [[f"*{heading}*", *("" for _ in table.columns[1:])]] if heading else []
            lines.append(cells)
        parts += [f"## {escape_markdown(table.title)}"] if table.title else []
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        parts += ["\n".join(f"- {escape_markdown(note)}" for note in table.notes)] if table.notes else []
    return "\n\n".join(parts) + "\n"


def to_text(table: Table) -> str:
    """Columns set out for the terminal, without marks."""
    lines = [[column.heading for column in table.columns]]
    lines += [[cell.text for cell in cells] for _, _, cells in _with_groups(table)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(
            text.ljust(width) if column.is_text else text.rjust(width)
            for text, width, column in zip(line, widths, table.columns, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join(([table.title] if table.title else []) + aligned + list(table.notes))


def to_latex(tables: Sequence[Table], title: str) -> str:
    """One `table` each, with the rules of booktabs; to be read into a document by \\input."""
    parts = [f"% {' '.join(title.split())}\n% \\usepackage{{booktabs}}"]
    for table in tables:
        lines = [" & ".join(escape_latex(column.heading) for column in table.columns) + r" \\", r"\midrule"]
        marked = _marked(table, escape_latex, r"\textbf{{{}}}", r"\underline{{{}}}", LATEX_CHARACTERS[OURS])
        for number, (heading, cells) in enumerate(marked):
            if heading:
                lines += [r"\midrule"] if number else []
                lines.append(rf"\multicolumn{{{len(table.columns)}}}{{l}}{{\textit{{{heading}}}}} \\")
            lines.append(" & ".join(cells) + r" \\")
        alignment = "".join("l" if column.is_text else "r" for column in table.columns)
        body = [
            r"\begin{table}[t]",
            r"\centering\small",
            *([rf"\caption{{{escape_latex(table.title)}}}"] if table.title else []),
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            *(rf"\par\footnotesize {escape_latex(note)}" for note in table.notes),
            r"\end{table}",
        ]
        parts.append("\n".join(body))
    return "\n\n".join(parts) + "\n"


def to_html(tables: Sequence[Table], title: str) -> str:
    """A page of its own."""
    return render("tables.html", title=title, tables=[html_table(table) for table in tables])


def html_table(table: Table) -> Markup:
    """One table and its notes, as a part of a page."""
    return render("table.html", table=table, rows=list(_with_groups(table)), ours=OURS, best=BEST, second=SECOND)


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_<>\[\]|])", r"\\\1", " ".join(text.split()))


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(LATEX_CHARACTERS.get(character, character) for character in text)


def _with_groups(table: Table) -> list[tuple[str, bool, list[Shown]]]:
    """(name of the group that begins here or "", whether it is ours, cells) of each row."""
    found, previous = [], ""
    for row, cells in zip(table.rows, table.shown(), strict=True):
        found.append((row.group if row.group != previous else "", row.is_ours, cells))
        previous = row.group
    return found


def _marked(
    table: Table, escape: Callable[[str], str], best: str, second: str, ours: str
) -> Iterator[tuple[str, list[str]]]:
    """(name of the group that begins here or "", marked texts) of each row, escaped."""
    for heading, is_ours, cells in _with_groups(table):
        texts = [{BEST: best, SECOND: second}.get(cell.mark, "{}").format(escape(cell.text)) for cell in cells]
        yield escape(heading), [f"{ours} {texts[0]}" if is_ours else texts[0], *texts[1:]]
