"""Published figures, the marks of a table, and its three renderers."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest

from varestorer.evaluation import paper_tables
from varestorer.evaluation.paper_tables import measured_rows, published_rows, read_published
from varestorer.evaluation.tables import (
    BEST,
    SECOND,
    TIE,
    Column,
    Table,
    TableRow,
    figure,
    to_html,
    to_latex,
    to_markdown,
    write_tables,
)
from varestorer.utils.files import file_sha256

PUBLISHED = {
    "varestorer_table1": 24,
    "varestorer_table2": 7,
    "varestorer_table3_ablation_div2k": 4,
    "hvar_table": 5,
    "hvar_scales": 3,
    "hvar_dpo": 4,
    "measured_baselines_realsr": 3,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_published_tables_are_complete_and_numeric(name: str, count: int) -> None:
    rows = read_published(name)
    assert len(rows) == count
    for row in rows:
        for column, text in row.items():
            if column not in ("dataset", "method", "variant", "metric", "preference") and text:
                float(text)


def test_published_tables_equal_the_shared_ones(shared: Path) -> None:
    folder = shared / "published"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    for name in PUBLISHED:
        lines = [line for line in (folder / f"{name}.csv").read_text().splitlines() if line[0] != "#"]
        assert read_published(name) == list(csv.DictReader(lines))


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("measured_baselines_realsr", "ddc9016dd0066d65dcaa3bc2d3a715265d3a0db54b7edf01ec54d05c81942b21"),
        ("hvar_dpo", "6548e93870791f6d2a02b014abfde36376e2cbb4212761bc26c35e9d985756e5"),
        ("hvar_scales", "5f8a38f3f13e4f5b2a038e94d6135f6a7b31e6662970f11b7c54d9dc0126c748"),
        ("hvar_table", "7601297e00974539b1241fe2690494a5234946f4c8602a51cd38b86ec8d87ace"),
        ("varestorer_table1", "bbcad33480276dfde7cf7e6d71c11a954979a38cba3dd4b6a14a7731a19b4376"),
        ("varestorer_table2", "2a70c6f438f1e4e1fb35d5797ec53f0c06f6abe63eb2f15247a64efd55031079"),
        ("varestorer_table3_ablation_div2k", "5e3c5a98003af58abab1835c9534fde96c68d7f1a0316f3e807a4c4c70068d01"),
    ],
)
def test_no_digit_of_the_published_figures_changes(name: str, digest: str) -> None:
    files = {path.stem: path for path in Path(paper_tables.__file__).with_name("published").iterdir()}
    assert files.keys() == PUBLISHED.keys() and file_sha256(files[name]) == digest


def test_rows_of_another_protocol_or_set_never_mix() -> None:
    names = ["psnr", "ssim", "lpips"]
    papers = {row.cells["method"]: row.cells for row in published_rows("realsr", "varestorer", names)}
    assert papers["OSEDiff (1 step)"]["psnr"] == "23.59" and len(papers) == 8
    measured = [row.cells for row in measured_rows("realsr", "varestorer", names)]
    assert [measured[2][name] for name in names] == [23.5895, 0.7073, 0.2921]
    luma = measured_rows("realsr", "stablesr_y", names)
    assert [row.cells["psnr"] for row in luma] == [27.1128, 25.7093, 25.1511]
    assert len(published_rows("div2k", "varestorer", names)) == 8 and not measured_rows("div2k", "varestorer", names)
    for dataset, protocol in (("div2k", "stablesr_y"), ("folder", "varestorer"), ("realsr", "my own")):
        assert not published_rows(dataset, protocol, names)
    assert not measured_rows("realsr", "my own", names)


def test_rows_of_hvar_stand_under_its_protocol_at_their_size() -> None:
    def rows(dataset: str) -> dict[str, dict]:
        names = ["psnr", "lpips", "fid"]
        return {r.cells["method"]: {n: r.cells.get(n) for n in names} for r in published_rows(dataset, "varsr", names)}

    assert rows("realsr")["H-VAR"] == {"psnr": "25.55", "lpips": "0.256", "fid": None}
    assert rows("realsr")["H-VAR without preference"]["lpips"] == "0.310"
    assert rows("realsr_x1")["H-VAR"] == {"psnr": "22.09", "lpips": "0.199", "fid": None}
    assert rows("realsr_x2")["VARSR"]["lpips"] == "0.450" and rows("drealsr_x2")["H-VAR"]["psnr"] == "27.65"
    assert rows("div2k")["VARSR-d16"] == {"psnr": None, "lpips": "0.495", "fid": "45.96"}
    assert not rows("realsr_x3") and not rows("folder")


def test_figures_have_four_digits() -> None:
    assert [figure(value) for value in (0.73414, 4.7632, 25.1511, 117.24, 17386.2)] == [
        "0.7341",
        "4.763",
        "25.15",
        "117.2",
        "17386",
    ]


def table(*rows: TableRow, lower: bool | None = False) -> Table:
    return Table((Column("method", is_text=True), Column("x", lower)), rows, "a title", ("a note",))


def marks(*cells: object, lower: bool | None = False) -> list[str]:
    rows = [TableRow({"method": f"m{n}"} | ({} if cell is None else {"x": cell})) for n, cell in enumerate(cells)]
    return [found.get("x", "") for found in table(*rows, lower=lower).marks()]


def test_marks_follow_the_direction_and_skip_what_is_missing() -> None:
    assert marks(1.0, None, 3.0, "2.0") == ["", "", BEST, SECOND]
    assert marks(1.0, None, 3.0, "2.0", lower=True) == [BEST, "", "", SECOND]
    assert marks(1.0, 2.0, lower=None) == ["", ""]
    assert marks(1.0, None) == ["", ""]


def test_figures_that_are_printed_alike_share_a_mark() -> None:
    assert marks("23.59", 23.5895, 23.1, 20.0) == [BEST, BEST, SECOND, ""]
    assert marks(9.0, 5.0, 5.0) == [BEST, SECOND, SECOND]
    assert marks(5.0, 5.0) == [BEST, BEST]


def test_only_ranked_rows_of_one_group_are_compared() -> None:
    rows = [
        TableRow({"x": 1.0}, group="a"),
        TableRow({"x": 9.0}, group="a", is_ranked=False),
        TableRow({"x": 2.0}, group="a"),
        TableRow({"x": 5.0}, group="b"),
    ]
    assert [found.get("x", "") for found in table(*rows).marks()] == [SECOND, "", BEST, ""]


EVIL = "a|b_c <i>&amp; 50%$#{~^\\*"
EXAMPLE = table(
    TableRow({"method": "bicubic", "x": "23.50"}, group="set A"),
    TableRow({"method": EVIL, "x": 30.0}, is_ours=True, group="set A"),
    TableRow({"method": "none"}, group="set B"),
)


def test_markdown_marks_and_escapes() -> None:
    lines = to_markdown([EXAMPLE], "T_1").splitlines()
    assert lines[0] == "# T\\_1" and "## a title" in lines and lines[-1] == "- a note"
    assert "| method | x ↑ |" in lines and "| --- | ---: |" in lines
    assert "| *set A* |  |" in lines and "| bicubic | <ins>23.50</ins> |" in lines and "| none | – |" in lines
    ours = next(line for line in lines if line.startswith("| ▸"))
    assert ours.endswith("| **30.00** |") and r"a\|b\_c \<i\>&amp; 50%$#{~^\\\*" in ours


def test_latex_marks_and_escapes() -> None:
    text = to_latex([EXAMPLE], "T")
    assert r"method & x $\uparrow$ \\" in text and r"bicubic & \underline{23.50} \\" in text
    assert r"none & -- \\" in text and r"\multicolumn{2}{l}{\textit{set B}}" in text
    body = next(line for line in text.splitlines() if line.startswith(r"$\triangleright$"))
    escaped = r"\textbar{}b\_c \textless{}i\textgreater{}\&amp; 50\%\$\#\{\textasciitilde{}\textasciicircum{}"
    assert body == rf"$\triangleright$ a{escaped}\textbackslash{{}}* & \textbf{{30.00}} \\"
    for name in ("table", "tabular"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") == 1
    assert not re.search(r"(?<!\\)[%#]", text.split("booktabs}", 1)[1])


def test_html_marks_and_escapes() -> None:
    page = to_html([EXAMPLE], "A & B")
    assert "<h1>A &amp; B</h1>" in page and "<b>30.00</b>" in page and "<u>23.50</u>" in page
    assert "a|b_c &lt;i&gt;&amp;amp; 50%$#{~^\\*" in page and "<i>" not in page
    assert page.count('class="ours"') == 1 and page.count('class="group"') == 2
    assert "<li>a note</li>" in page and "–</td>" in page
    assert not re.search(r"https?://|<script|<link", page)


def test_three_files_are_written(tmp_path: Path) -> None:
    files = write_tables([EXAMPLE], "T", tmp_path / "new", "table")
    assert [path.name for path in files] == ["table.md", "table.tex", "table.html"]
    assert all("bicubic" in path.read_text(encoding="utf-8") for path in files)


def row(name: str, mean: float, shift: float | None, spread: float) -> TableRow:
    drawn = np.random.default_rng(len(name)).normal(0, spread, 50)
    scores = {} if shift is None else {"lpips": {str(n): mean + float(v) for n, v in enumerate(drawn)}}
    return TableRow({"method": name, "lpips": mean}, scores=scores)


def test_what_cannot_be_told_apart_is_neither_best_nor_second() -> None:
    columns = (Column("method", is_text=True), Column("lpips", lower_is_better=True))
    clear = Table(columns, (row("a", 0.30, 0.0, 1e-4), row("bb", 0.31, 0.0, 1e-4), row("ccc", 0.40, None, 0.0)))
    assert [mark.get("lpips") for mark in clear.marks()] == [BEST, SECOND, None]
    close = Table(columns, (row("a", 0.30, 0.0, 0.1), row("bb", 0.301, 0.0, 0.1), row("ccc", 0.40, None, 0.0)))
    assert [mark.get("lpips") for mark in close.marks()] == [TIE, TIE, None]
    assert "0.3000 ≈" in to_markdown([close], "x") and "**" not in to_markdown([close], "x").split("lpips", 1)[1]
    assert r"0.3010 $\approx$" in to_latex([close], "x")
    published = Table(columns, (row("a", 0.30, None, 0.0), row("bb", 0.301, None, 0.0)))
    assert [mark.get("lpips") for mark in published.marks()] == [BEST, SECOND]  # nobody knows their images
