"""Tables as Markdown, LaTeX and HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from varestorer.evaluation.tables import BEST, LEVEL, SECOND, Shown, Table
from varestorer.evaluation.templates import render
from varestorer.utils.files import write_text

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


def write_tables(tables: Sequence[Table], title: str, folder: Path, stem: str) -> list[Path]:
    """Write `<stem>.md`, `<stem>.tex` and `<stem>.html`.

    Args:
        tables: in order.
        title: of the pages.
        folder: made when it is not there.
        stem: of the files' names.
    Raises:
        UserError: a file cannot be written; names it.
    """
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
        parts += [f"## {escape_markdown(table.title)}"] if table.title else []
        parts.append("\n".join(_markdown_lines(table)))
        parts += ["\n".join(f"- {escape_markdown(note)}" for note in table.notes)] if table.notes else []
    return "\n\n".join(parts) + "\n"


def _markdown_lines(table: Table) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    lines = [
        line([escape_markdown(column.heading) for column in table.columns]),
        line(["---" if column.is_text else "---:" for column in table.columns]),
    ]
    for heading, is_ours, cells in _with_groups(table):
        if heading:
            lines.append(line([f"*{escape_markdown(heading)}*", *("" for _ in table.columns[1:])]))
        texts = [_marked(cell, escape_markdown(cell.text), "**{}**", "<ins>{}</ins>") for cell in cells]
        lines.append(line([f"{OURS} {texts[0]}" if is_ours else texts[0], *texts[1:]]))
    return lines


def to_latex(tables: Sequence[Table], title: str) -> str:
    """One `table` each, with the rules of booktabs; to be read into a document by \\input."""
    parts = [f"% {' '.join(title.split())}\n% \\usepackage{{booktabs}}"]
    for table in tables:
        caption = [rf"\caption{{{escape_latex(table.title)}}}"] if table.title else []
        alignment = "".join("l" if column.is_text else "r" for column in table.columns)
        body = [
            r"\begin{table}[t]",
            r"\centering\small",
            *caption,
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            *_latex_lines(table),
            r"\bottomrule",
            r"\end{tabular}",
            *(rf"\par\footnotesize {escape_latex(note)}" for note in table.notes),
            r"\end{table}",
        ]
        parts.append("\n".join(body))
    return "\n\n".join(parts) + "\n"


def _latex_lines(table: Table) -> list[str]:
    lines = [" & ".join(escape_latex(column.heading) for column in table.columns) + r" \\", r"\midrule"]
    for number, (heading, is_ours, cells) in enumerate(_with_groups(table)):
        if heading:
            rule = [r"\midrule"] if number else []
            span = rf"\multicolumn{{{len(table.columns)}}}{{l}}{{\textit{{{escape_latex(heading)}}}}}"
            lines += [*rule, span + r" \\"]
        texts = [_marked(cell, escape_latex(cell.text), r"\textbf{{{}}}", r"\underline{{{}}}") for cell in cells]
        first = f"{LATEX_CHARACTERS[OURS]} {texts[0]}" if is_ours else texts[0]
        lines.append(" & ".join([first, *texts[1:]]) + r" \\")
    return lines


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


def _marked(cell: Shown, text: str, best: str, second: str) -> str:
    return {BEST: best, SECOND: second}.get(cell.mark, "{}").format(text)
