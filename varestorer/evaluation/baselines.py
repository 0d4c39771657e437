"""Figures of other methods: the published tables, and baselines measured once; they ship with the package."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from importlib.resources import files

from varestorer.data.benchmarks import BENCHMARKS
from varestorer.evaluation.tables import TableRow

PAPER = "VARestorer (arXiv 2604.21450)"
PAPER_PROTOCOL = "varestorer"
NUM_IMAGES = {name: BENCHMARKS[name].pairs for name in ("div2k", "drealsr", "realsr")}
"""Images that the published figures of a data set are means over."""

MEASURED_COLUMNS = {
    "varestorer": {"psnr": "psnr_rgb", "ssim": "ssim"},
    "stablesr_y": {"psnr": "psnr_y", "ssim": "ssim_y"},
    "varsr": {"psnr": "psnr_y", "ssim": "ssim_y"},
}
"""Which column of the measured baselines holds PSNR and SSIM in the convention of a protocol."""


def read_published(name: str) -> list[dict[str, str]]:
    """Read one of the tables that ship with the package.

    Args:
        name: `varestorer_table1`, `varestorer_table2`, `varestorer_table3_ablation_div2k` or
            `measured_baselines_realsr`.
    Returns:
        One dict per row, column -> text; empty where nothing was reported.
    """
    text = files("varestorer.evaluation").joinpath("published", f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


def published_rows(dataset: str, protocol: str, metrics: Sequence[str]) -> list[TableRow]:
    """Rows of the paper's table 1 that may stand beside figures of this data set and protocol.

    Args:
        dataset: `div2k`, `realsr` or `drealsr`; others have no published rows.
        protocol: name of the protocol; only `varestorer` has published rows.
        metrics: columns wanted; rows without any of them are left out.
    Returns:
        Rows with `method`, `source` and the metrics, as printed.
    """
    if protocol != PAPER_PROTOCOL:
        return []
    rows = []
    for row in read_published("varestorer_table1"):
        if row["dataset"] == dataset:
            steps = f"{row['steps']} step" + ("s" if row["steps"] != "1" else "")
            names = {"method": f"{row['method']} ({steps})", "source": "VARestorer, table 1"}
            rows.append((names, pick(row, {name: name for name in metrics})))
    return [TableRow(names | figures) for names, figures in rows if figures]


def measured_rows(dataset: str, protocol: str, metrics: Sequence[str]) -> list[TableRow]:
    """Baselines measured on RealSR, which there are under all three protocols; as `published_rows` otherwise."""
    if dataset != "realsr" or protocol not in MEASURED_COLUMNS:
        return []
    same = {name: name for name in metrics if name not in ("psnr", "ssim")}
    own = {name: column for name, column in MEASURED_COLUMNS[protocol].items() if name in metrics}
    rows = []
    for row in read_published("measured_baselines_realsr"):
        figures = {name: float(text) for name, text in pick(row, {**same, **own}).items()}
        if figures:
            rows.append(TableRow({"method": row["method"], "source": "measured with pyiqa 0.1.16", **figures}))
    return rows


def pick(row: Mapping[str, str], columns: Mapping[str, str]) -> dict[str, str]:
    """Name -> figure as printed, of those columns of a row that are there and not empty."""
    return {name: row[column] for name, column in columns.items() if row.get(column)}
