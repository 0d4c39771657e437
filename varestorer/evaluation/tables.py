"""Tables: the published rows, ours beside them, in Markdown."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from varestorer.evaluation.evaluator import Evaluation

MEASURED_COLUMNS = {
    "varestorer": {"psnr": "psnr_rgb", "ssim": "ssim"},
    "stablesr_y": {"psnr": "psnr_y", "ssim": "ssim_y"},
    "varsr": {"psnr": "psnr_y", "ssim": "ssim_y"},
}
"""Which column of the measured baselines holds PSNR and SSIM in the convention of a protocol."""


@dataclass(frozen=True)
class MethodRow:
    """A method of a table.

    Attributes:
        method: its name.
        scores: metric -> value; missing ones were not reported.
        source: where the figures come from.
    """

    method: str
    scores: Mapping[str, float]
    source: str


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


def published_rows(dataset: str, protocol: str, metrics: Sequence[str]) -> list[MethodRow]:
    """Rows that may stand beside ours: same data set, same protocol.

    Args:
        dataset: `div2k`, `realsr` or `drealsr`; others have no published rows.
        protocol: name of the protocol; only `varestorer` has published rows, RealSR has measured ones in all.
        metrics: columns wanted; rows without any of them are left out.
    """
    rows: list[MethodRow] = []
    if protocol == "varestorer":
        for row in read_published("varestorer_table1"):
            if row["dataset"] == dataset:
                steps = f"{row['steps']} step" + ("s" if row["steps"] != "1" else "")
                scores = _numbers(row, {name: name for name in metrics})
                rows.append(MethodRow(f"{row['method']} ({steps})", scores, "VARestorer, table 1"))
    if dataset == "realsr" and protocol in MEASURED_COLUMNS:
        same = {name: name for name in metrics if name not in ("psnr", "ssim")}
        own = {name: column for name, column in MEASURED_COLUMNS[protocol].items() if name in metrics}
        for row in read_published("measured_baselines_realsr"):
            scores = _numbers(row, {**same, **own})
            rows.append(MethodRow(row["method"], scores, "measured with pyiqa 0.1.16"))
    return [row for row in rows if row.scores]


def markdown_table(evaluation: Evaluation, method: str = "this run", expected_pairs: int | None = None) -> str:
    """Our row under the published ones, the best value of each column bold, and what the figures rest on.

    Args:
        evaluation: the scores.
        method: name of our row.
        expected_pairs: size of the published test set; with another number of images a note says that the
            rows cannot be compared, and nothing is bold.
    """
    summary = evaluation.summary()
    ours = MethodRow(method, {name: m["mean"] for name, m in summary["metrics"].items()}, "this evaluation")
    metrics = list(evaluation.columns)
    rows = [*published_rows(evaluation.dataset, evaluation.protocol, metrics), ours]
    comparable = expected_pairs is None or summary["n"] == expected_pairs
    best = _best(rows, evaluation.columns) if comparable and len(rows) > 1 else {}
    heads = [f"{name} {'↓' if is_lower else '↑'}" for name, is_lower in evaluation.columns.items()]
    lines = [
        f"# {evaluation.dataset}, protocol `{evaluation.protocol}`",
        "",
        _line(["method", *heads, "source"]),
        _line(["---", *("---:" for _ in metrics), "---"]),
        *(_line([row.method, *(_cell(row, name, best) for name in metrics), row.source]) for row in rows),
        "",
        *_notes(evaluation, comparable, expected_pairs),
    ]
    return "\n".join(lines) + "\n"


def _notes(evaluation: Evaluation, comparable: bool, expected_pairs: int | None) -> list[str]:
    """What our row rests on: number of images, spread, ids, weights, what did not run and why."""
    summary = evaluation.summary()
    notes = [f"{summary['n']} images scored, {len(evaluation.rows) - summary['n']} not."]
    if not comparable:
        notes.append(f"The other rows are means over {expected_pairs} images: not comparable with this one.")
    if evaluation.seconds_per_image is not None:
        notes.append(f"{evaluation.seconds_per_image:.3f} s per image (wall time of making it).")
    notes += ["", "| metric | mean | std | n | id | weights (SHA-256) |", "|---|---:|---:|---:|---|---|"]
    for name, m in summary["metrics"].items():
        std = "" if m["std"] is None else f"{m['std']:.4f}"
        weights = (m["weights_sha256"] or "none")[:16]
        notes.append(_line([name, f"{m['mean']:.4f}", std, str(m["n"]), f"`{m['id']}`", weights]))
    if summary["unavailable"]:
        notes += ["", "Not available:", ""]
        notes += [f"- {name}: {reason}" for name, reason in summary["unavailable"].items()]
    return notes


def _numbers(row: Mapping[str, str], columns: Mapping[str, str]) -> dict[str, float]:
    """Metric -> value, of those columns of a row that are there and not empty."""
    return {name: float(row[column]) for name, column in columns.items() if row.get(column)}


def _best(rows: Sequence[MethodRow], lower_is_better: Mapping[str, bool]) -> dict[str, float]:
    best = {}
    for name, is_lower in lower_is_better.items():
        values = [row.scores[name] for row in rows if name in row.scores]
        if values:
            best[name] = min(values) if is_lower else max(values)
    return best


def _cell(row: MethodRow, metric: str, best: Mapping[str, float]) -> str:
    if metric not in row.scores:
        return "–"
    value = row.scores[metric]
    # as the papers print: 25.15, 0.7341, 4.763
    text = f"{value:.4f}" if abs(value) < 2 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"
    return f"**{text}**" if best.get(metric) == value else text


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
