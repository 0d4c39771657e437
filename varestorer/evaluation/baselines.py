"""Figures of other methods: the published tables, and baselines measured once; they ship with the package."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from importlib.resources import files

from varestorer.data.benchmarks import BENCHMARKS
from varestorer.evaluation.tables import TableRow

PAPER = "VARestorer (arXiv 2604.21450)"
PAPER_PROTOCOL = "varestorer"
HVAR_SOURCE = "H-VAR's tables, by third-party notes"
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
        name: `varestorer_table1`, `varestorer_table2`, `varestorer_table3_ablation_div2k`, `hvar_table`,
            `hvar_scales`, `hvar_dpo` or `measured_baselines_realsr`.
    Returns:
        One dict per row, column -> text; empty where nothing was reported.
    """
    text = files("varestorer.evaluation").joinpath("published", f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


def published_rows(dataset: str, protocol: str, metrics: Sequence[str]) -> list[TableRow]:
    """Published rows that may stand beside figures of this data set and protocol.

    Args:
        dataset: `div2k`, `realsr` or `drealsr`, with `_x1` or `_x2` behind it for a smaller result of H-VAR; others
            have no published rows.
        protocol: name of the protocol; `varestorer` (that paper's table 1) and `varsr` (H-VAR's tables, which keep to
            VARSR's protocol) have published rows.
        metrics: columns wanted; rows without any of them are left out.
    Returns:
        Rows with `method`, `source` and the metrics, as printed.
    """
    if protocol == PAPER_PROTOCOL:
        source, found = "VARestorer, table 1", _rows_of_varestorer(dataset)
    elif protocol == "varsr":
        source, found = HVAR_SOURCE, _rows_of_hvar(dataset)
    else:
        return []
    picked = {method: pick(row, {name: name for name in metrics}) for method, row in found.items()}
    return [TableRow({"method": method, "source": source, **row}) for method, row in picked.items() if row]


def _rows_of_varestorer(dataset: str) -> dict[str, dict[str, str]]:
    rows = {}
    for row in read_published("varestorer_table1"):
        if row["dataset"] == dataset:
            steps = f"{row['steps']} step" + ("s" if row["steps"] != "1" else "")
            rows[f"{row['method']} ({steps})"] = row
    return rows


def _rows_of_hvar(dataset: str) -> dict[str, dict[str, str]]:
    """Method -> metric -> figure of H-VAR's tables, one of which is a column a method, one a column a size."""
    name, _, size = dataset.partition("_x")
    side = {"1": "128", "2": "256", "": "512"}.get(size)
    rows: dict[str, dict[str, str]] = {}
    for row in read_published("hvar_table"):
        if (row["dataset"], side) == (name, "512"):
            for method in row.keys() - {"dataset", "metric"}:
                rows.setdefault(method, {})[row["metric"]] = row[method]
    for row in read_published("hvar_scales"):
        if name == "realsr" and side:
            rows.setdefault(row["method"], {})["lpips"] = row[side]
    for row in read_published("hvar_dpo"):
        if row["dataset"] == name and side:
            method = "H-VAR" if row["preference"] == "with" else "H-VAR without preference"
            found = {"psnr": row[f"psnr_{side}"]} | ({"lpips": row["lpips_512"]} if side == "512" else {})
            rows[method] = rows.get(method, {}) | found
    return rows


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
