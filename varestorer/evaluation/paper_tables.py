"""The papers' tables: published rows and baselines measured once (both in the package), and ours beside them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from varestorer.data.testsets.known import BENCHMARKS
from varestorer.evaluation.progress import PER_IMAGE, SUMMARY, read_rows
from varestorer.evaluation.protocols import PROTOCOLS
from varestorer.evaluation.results import paired
from varestorer.evaluation.tables import LEGEND, LEVEL, Cell, Column, Table, TableRow
from varestorer.utils.errors import UsageError, reason
from varestorer.utils.files import expand_user
from varestorer.utils.iqa import metric_config

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
PUBLISHED_BY = {
    PAPER_PROTOCOL: f"Rows without a mark: {PAPER}, table 1.",
    "varsr": f"Rows without a mark: {HVAR_SOURCE}, which keep to VARSR's protocol.",
}
ABLATION_METRICS = ("lpips", "musiq", "niqe", "clipiqa")
NOT_1536 = (
    "The published 1,536 G cannot be the FLOPs of this network, nor its multiply-adds: the linear layers of its 32 "
    "blocks hold 14 × 2048² × 32 = 1.88 G weights, each multiplied once for each of the 3,545 tokens, which is "
    "6.66 TMAC, and the attention of all tokens to all adds 2 × 3545² × 2048 × 32 = 1.65 TMAC; so the transformer "
    "alone takes 8.3 TMAC = 16.6 TFLOP (11.1 TFLOP if it ran 2,521 tokens), before the text's cross attention, "
    "the autoencoder and the restorer."
)
OTHER_MACHINES = (
    "Published seconds were measured by the paper's authors on their own GPU, and the published G do not say whether "
    "they count operations or multiply-adds: do not compare either with ours."
)


@dataclass(frozen=True)
class EvaluationRecord:
    """An evaluation as its folder keeps it; its label is the name of its row."""

    label: str
    folder: Path
    summary: dict[str, Any]  # of `summary.json`
    scores: dict[str, dict[str, float]] = field(default_factory=dict)  # metric -> image -> score, of `per_image.csv`

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return str(self.summary["dataset"])

    @property
    def is_of_paper(self) -> bool:
        """Whether it is on the data set, and under the protocol, of VARestorer's tables 2 and 3."""
        return self.dataset == "div2k" and self.summary["protocol"] == PAPER_PROTOCOL

    @property
    def means(self) -> dict[str, float]:
        """Metric -> mean."""
        return {name: entry["mean"] for name, entry in self.summary["metrics"].items()}

    @property
    def is_whole(self) -> bool:
        """Whether the means are over as many images as the published ones."""
        return self.summary["n"] == NUM_IMAGES.get(self.dataset, self.summary["n"])


class StageRecord(NamedTuple):
    """What a part of a network costs for one square; see `SystemRecord`."""

    params: int
    flops: int  # two for a multiplication with its addition
    seconds: float | None = None


@dataclass(frozen=True)
class SystemRecord:
    """What a network costs for one square; seconds are medians, None where it was not timed."""

    label: str
    side: int  # of the square, pixels
    num_trained: int  # parameters that the paper's training changes
    stages: dict[str, StageRecord]
    seconds: float | None = None
    peak_bytes: int | None = None  # weights and working memory; None where it cannot be told
    where: str = ""  # machine and precision of the measurement


def read_records(runs: Iterable[str]) -> list[EvaluationRecord]:
    """Read evaluations that are to stand in one table: folders of `scripts/eval.py`, each maybe as `label=folder`.

    UsageError: a folder without a summary, two protocols, or the same name twice on one data set.
    """
    records = [_read_record(run) for run in runs]
    for record in records[1:]:
        first, protocol = records[0], record.summary["protocol"]
        if protocol != first.summary["protocol"]:
            raise UsageError(
                f"two protocols cannot share a table: {first.folder} was scored under "
                f"{first.summary['protocol']}, {record.folder} under {protocol}; score them under one"
            )
    places: dict[tuple[str, str], Path] = {}
    for record in records:
        other = places.setdefault((record.label, record.dataset), record.folder)
        if other != record.folder:
            raise UsageError(
                f"{other} and {record.folder} are both {record.label} on {record.dataset}; name them label=folder"
            )
    return records


def split_label(text: str) -> tuple[str, str]:
    """`label=what` as its two parts; what is there under the whole name has no label."""
    label, found, what = text.partition("=")
    return (label, what) if found and not expand_user(text).exists() else ("", text)


def _read_record(run: str) -> EvaluationRecord:
    label, path = split_label(run)
    folder = expand_user(path)
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        if not {"dataset", "protocol", "n", "metrics", "unavailable"} <= summary.keys():
            raise ValueError("it lacks keys of a summary")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(
            f"runs: {folder} has no {SUMMARY} of scripts/eval.py ({reason(error)}); give its out= folder"
        ) from error
    scores: dict[str, dict[str, float]] = {}
    for row in read_rows(folder / PER_IMAGE):
        for name in summary["metrics"]:
            if row.get(name):
                scores.setdefault(name, {})[row["image"]] = float(row[name])
    return EvaluationRecord(label or str(summary.get("method", folder.name)), folder, summary, scores)


def table_1(records: Sequence[EvaluationRecord]) -> list[Table]:
    """Ten metrics on three data sets; only rows of the protocol of `records` stand in it."""
    protocol = str(records[0].summary["protocol"]) if records else PAPER_PROTOCOL
    names = (name for r in records for name in (*r.summary["metrics"], *r.summary["unavailable"]))
    # of one's own protocol, the metrics of the evaluations
    metrics = [s.name for s in PROTOCOLS[protocol].metrics] if protocol in PROTOCOLS else list(dict.fromkeys(names))
    labels = list(dict.fromkeys(record.label for record in records))
    notes = [LEGEND]
    unknown = f"No rows were published under {protocol}; there are some under {' and '.join(PUBLISHED_BY)}."
    notes.append(PUBLISHED_BY.get(protocol, unknown))
    rows = []
    for dataset in dict.fromkeys([*NUM_IMAGES, *(record.dataset for record in records)]):
        group = [TableRow(row.cells, group=dataset) for row in published_rows(dataset, protocol, metrics)]
        for label in labels:
            found = [record for record in records if (record.label, record.dataset) == (label, dataset)]
            group += [_our_row(found[0], metrics, dataset, notes)] if found else []
            if not found and dataset in NUM_IMAGES:
                notes.append(f"{label} has no evaluation on {dataset} here.")
                group.append(TableRow({"method": label}, is_ours=True, group=dataset))
        rows += group
    columns = (Column("method", is_text=True), *_metric_columns(records, metrics))
    beside = Table(columns, tuple(rows), f"Table 1, protocol {protocol}", tuple(dict.fromkeys(notes)))
    return [beside, *pairs_table(records, metrics), *map(figures_table, records)]


def table_varsr(records: Sequence[EvaluationRecord]) -> list[Table]:
    """Ablations of VARSR (no refiner, no guidance, absolute positions), and what was published under its protocol.

    UsageError: an evaluation under another protocol.
    """
    for record in records:
        if record.summary["protocol"] != "varsr":
            raise UsageError(f"table=varsr is under protocol=varsr, and {record.folder} is not; score it so")
    note = "The figures of VARSR's own ablations are not among the published tables at hand: rows of ours alone."
    table, *pairs = table_1(records)
    return [replace(table, title="VARSR and its ablations, protocol varsr", notes=(*table.notes, note)), *pairs]


def table_3(records: Sequence[EvaluationRecord]) -> list[Table]:
    """The ablations on DIV2K-Val; UsageError for an evaluation of another data set, or under another protocol."""
    for record in records:
        if not record.is_of_paper:
            got = f"{record.dataset} under {record.summary['protocol']}"
            raise UsageError(f"table 3 is on div2k under {PAPER_PROTOCOL}, and {record.folder} is on {got}")
    notes = [LEGEND, f"Rows without a mark: {PAPER}, table 3."]
    published = [
        TableRow({"method": row["variant"], **pick(row, {name: name for name in ABLATION_METRICS})})
        for row in read_published("varestorer_table3_ablation_div2k")
    ]
    ours = [_our_row(record, ABLATION_METRICS, "", notes) for record in records]
    columns = (Column("method", is_text=True), *_metric_columns(records, ABLATION_METRICS))
    beside = Table(columns, (*published, *ours), "Table 3: ablations on DIV2K-Val", tuple(dict.fromkeys(notes)))
    return [beside, *pairs_table(records, ABLATION_METRICS), *map(figures_table, records)]


def table_2(systems: Sequence[SystemRecord], records: Sequence[EvaluationRecord] = ()) -> list[Table]:
    """Parameters, operations, seconds and memory beside the published ones, then ours stage by stage.

    Evaluations on DIV2K-Val by the systems' names give MANIQA and MUSIQ. UsageError: one of another data set, under
    another protocol, or of no system here.
    """
    scores = {record.label: record.means for record in records}
    for record in records:
        if not record.is_of_paper or record.label not in [system.label for system in systems]:
            raise UsageError(
                f"table 2 takes MANIQA and MUSIQ of its own networks on div2k under {PAPER_PROTOCOL}, and "
                f"{record.folder} is {record.label} on {record.dataset} under {record.summary['protocol']}"
            )
    published = {
        "trainable (M)": "trainable_params_m",
        "GFLOPs": "gflops",
        "seconds": "inference_s",
        "maniqa": "maniqa",
        "musiq": "musiq",
    }
    rows = [
        TableRow({"method": row["method"], "source": "VARestorer, table 2", **pick(row, published)})
        for row in read_published("varestorer_table2")
    ]
    for system in systems:
        cells: dict[str, Cell] = {
            "method": system.label,
            "trainable (M)": system.num_trained / 1e6,
            "total (M)": sum(stage.params for stage in system.stages.values()) / 1e6,
            "side (px)": system.side,
            "GFLOPs": sum(stage.flops for stage in system.stages.values()) / 1e9,
            "seconds": system.seconds,
            "peak (GB)": system.peak_bytes and system.peak_bytes / 1e9,
            "source": "this run",
        }
        rows.append(TableRow({**scores.get(system.label, {}), **cells}, is_ours=True))
    names = ("trainable (M)", "total (M)", "side (px)", "GFLOPs", "seconds", "peak (GB)", "maniqa", "musiq")
    columns = (Column("method", is_text=True), *map(Column, names), Column("source", is_text=True))
    beside = Table(columns, tuple(rows), "Table 2", (OTHER_MACHINES, NOT_1536))
    return [beside, _stages_table(systems)] if systems else [beside]


def _stages_table(systems: Sequence[SystemRecord]) -> Table:
    rows = []
    notes = [
        "One square of the side given in table 2, batch 1; a multiply-add is two operations (torch's counter).",
        "Adapters are merged, as for restoring; without a text encoder the prompt is the learned null text.",
    ]
    for system in systems:
        for name, stage in system.stages.items():
            cells: dict[str, Cell] = {
                "stage": name,
                "params (M)": stage.params / 1e6,
                "GFLOPs": stage.flops / 1e9,
                "seconds": stage.seconds,
            }
            rows.append(TableRow(cells, group=system.label))
        notes.append(f"{system.label}: {system.where}." if system.seconds else f"{system.label} was not timed here.")
    columns = (Column("stage", is_text=True), Column("params (M)"), Column("GFLOPs"), Column("seconds"))
    return Table(columns, tuple(rows), "Stage by stage", tuple(dict.fromkeys(notes)))


def _our_row(record: EvaluationRecord, metrics: Sequence[str], group: str, notes: list[str]) -> TableRow:
    """The row of an evaluation; what it lacks goes into the notes."""
    name = f"{record.label} on {record.dataset}"
    unavailable = record.summary["unavailable"]
    for metric in metrics:
        if metric not in record.means and metric in unavailable:
            notes.append(f"{name} lacks {metric}: {unavailable[metric]}")
    unasked = [metric for metric in metrics if metric not in record.means and metric not in unavailable]
    if unasked:
        notes.append(f"{name} was not scored by {', '.join(unasked)}.")
    if not record.is_whole:
        wanted = NUM_IMAGES[record.dataset]
        notes.append(f"{name}: {record.summary['n']} of {wanted} images, so its figures compete for no mark.")
    cells = {"method": record.label} | {metric: record.means.get(metric) for metric in metrics}
    return TableRow(cells, is_ours=True, is_ranked=record.is_whole, group=group, scores=record.scores)


def figures_table(record: EvaluationRecord) -> Table:
    """What figures rest on: spread, number of images, pyiqa's id, weights; and what did not run, and why."""
    rows = []
    for name, entry in record.summary["metrics"].items():
        mean, std, worst = (
            None if entry.get(key) is None else f"{entry[key]:.4f}" for key in ("mean", "std", "worst_tenth")
        )
        cells = {"metric": name, "mean": mean, "95 % of the mean": interval(entry), "std": std, "worst tenth": worst}
        weights = (entry["weights_sha256"] or "none")[:16]
        rows.append(TableRow(cells | {"n": entry["n"], "id": entry["id"], "weights (SHA-256)": weights}))
    columns = (
        Column("metric", is_text=True),
        *(Column(name) for name in ("mean", "95 % of the mean", "std", "worst tenth", "n")),
        *(Column(name, is_text=True) for name in ("id", "weights (SHA-256)")),
    )
    missing = tuple(f"{name} is not available: {why}" for name, why in record.summary["unavailable"].items())
    return Table(columns, tuple(rows), f"Figures of {record.label} on {record.dataset}", missing)


def interval(entry: Mapping[str, Any]) -> str | None:
    """The 95 % interval of a summary's mean; None of what is scored as a whole."""
    return None if entry.get("ci95") is None else "{:.4f} to {:.4f}".format(*entry["ci95"])


def pairs_table(records: Sequence[EvaluationRecord], metrics: Sequence[str]) -> list[Table]:
    """Our methods in pairs, on the images that both were scored on; no table where there is no pair."""
    rows = []
    measured = _metric_columns(records, metrics)
    for one, other in combinations(records, 2):
        for column in measured if one.dataset == other.dataset else ():
            first, second = (record.scores.get(column.name, {}) for record in (one, other))
            found = paired(first, second, bool(column.lower_is_better))
            if found is not None:
                cells: dict[str, Cell] = {
                    "methods": f"{one.label} - {other.label}",
                    "metric": column.heading,
                    "difference": f"{found.mean:+.4f}",
                    "95 %": f"{found.low:+.4f} to {found.high:+.4f}{' ' + LEVEL if found.is_tie else ''}",
                    "images won": f"{found.wins} of {found.n}",
                }
                rows.append(TableRow(cells, group=one.dataset))
    columns = tuple(Column(name, is_text=True) for name in ("methods", "metric", "difference", "95 %", "images won"))
    return [Table(columns, tuple(rows), "In pairs, image by image")] if rows else []


def _metric_columns(records: Sequence[EvaluationRecord], metrics: Sequence[str]) -> list[Column]:
    """Columns with pyiqa's word on the direction of each metric."""
    ids = {name: entry["id"].partition("[")[0] for r in records for name, entry in r.summary["metrics"].items()}
    specs = {spec.name: spec.pyiqa_name for protocol in PROTOCOLS.values() for spec in protocol.metrics}
    known = specs | ids
    return [Column(name, bool(metric_config(known.get(name, name)).get("lower_better", False))) for name in metrics]


def read_published(name: str) -> list[dict[str, str]]:
    """The rows of a file of `published/`, column -> text; empty where nothing was reported."""
    text = files("varestorer.evaluation").joinpath("published", f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


def published_rows(dataset: str, protocol: str, metrics: Sequence[str]) -> list[TableRow]:
    """Published rows with any of the metrics that may stand beside figures of this data set and protocol.

    There are some of `div2k`, `realsr` and `drealsr` (with `_x1` or `_x2` behind it for a smaller result of H-VAR),
    under `varestorer` (that paper's table 1) and `varsr` (H-VAR's tables, which keep to VARSR's protocol).
    """
    if protocol == PAPER_PROTOCOL:
        rows = [row for row in read_published("varestorer_table1") if row["dataset"] == dataset]
        source = "VARestorer, table 1"
        found = {f"{row['method']} ({row['steps']} step{'' if row['steps'] == '1' else 's'})": row for row in rows}
    elif protocol == "varsr":
        source, found = HVAR_SOURCE, _rows_of_hvar(dataset)
    else:
        return []
    picked = {method: pick(row, {name: name for name in metrics}) for method, row in found.items()}
    return [TableRow({"method": method, "source": source, **row}) for method, row in picked.items() if row]


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
