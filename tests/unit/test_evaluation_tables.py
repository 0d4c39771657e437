"""Published tables, and ours beside them."""

from pathlib import Path

import pytest

from varestorer.evaluation.evaluator import Evaluation, Row
from varestorer.evaluation.tables import markdown_table, published_rows, read_published
from varestorer.utils.iqa import Metric

PUBLISHED = {
    "varestorer_table1": 24,
    "varestorer_table2": 7,
    "varestorer_table3_ablation_div2k": 4,
    "measured_baselines_realsr": 3,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_published_tables_are_complete_and_numeric(name: str, count: int) -> None:
    rows = read_published(name)
    assert len(rows) == count
    for row in rows:
        for column, text in row.items():
            if column not in ("dataset", "method", "variant") and text:
                float(text)


def test_published_tables_equal_the_shared_ones(shared: Path) -> None:
    import csv

    folder = shared / "published"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    for name in PUBLISHED:
        lines = [line for line in (folder / f"{name}.csv").read_text().splitlines() if line[0] != "#"]
        assert read_published(name) == list(csv.DictReader(lines))


def test_rows_of_another_protocol_or_set_never_mix() -> None:
    names = ["psnr", "ssim", "lpips"]
    ours = published_rows("realsr", "varestorer", names)
    osediff = {row.source: row.scores for row in ours if row.method.startswith("OSEDiff")}
    assert osediff["VARestorer, table 1"]["psnr"] == 23.59
    assert osediff["measured with pyiqa 0.1.16"] == {"psnr": 23.5895, "ssim": 0.7073, "lpips": 0.2921}
    luma = published_rows("realsr", "stablesr_y", names)
    assert [row.scores["psnr"] for row in luma] == [27.1128, 25.7093, 25.1511]
    assert len(published_rows("div2k", "varestorer", names)) == 8
    for dataset, protocol in (("div2k", "stablesr_y"), ("folder", "varestorer"), ("realsr", "my own")):
        assert not published_rows(dataset, protocol, names)


def evaluation(**means: float) -> Evaluation:
    lower = {"lpips": True}
    metrics = {name: Metric(name, None, True, lower.get(name, False)) for name in means}
    columns = {name: lower.get(name, False) for name in [*means, "musiq"]}
    rows = (Row("a", dict(means)),)
    return Evaluation("realsr", "varestorer", columns, metrics, rows, {}, {"musiq": "no weights"})


def test_best_of_each_column_is_bold_in_its_direction() -> None:
    table = markdown_table(evaluation(psnr=30.0, lpips=0.1234), "ours").splitlines()
    ours = next(line for line in table if line.startswith("| ours"))
    assert ours == "| ours | **30.00** | **0.1234** | – | this evaluation |"
    assert sum("**" in line for line in table) == 2  # ours, and the best MUSIQ
    assert "| VARSR (10 steps) | 24.12 | 0.3216 | 71.16 | VARestorer, table 1 |" in table
    assert "| VARestorer (1 step) | 22.78 | 0.3249 | **71.37** | VARestorer, table 1 |" in table
    assert "| method | psnr ↑ | lpips ↓ | musiq ↑ | source |" in table


def test_means_over_other_images_win_nothing() -> None:
    table = markdown_table(evaluation(psnr=99.0), "ours", expected_pairs=100)
    assert "**" not in table and "means over 100 images: not comparable" in table
