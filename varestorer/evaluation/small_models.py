"""Small models beside each other: how good their images look, and what they cost to keep and to run on a CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import metadata_load
from torch import nn

from varestorer.evaluation.paper_tables import EvaluationRecord, interval, pairs_table
from varestorer.evaluation.sources import BicubicSource, KnownSource, SpandrelSource, SystemSource
from varestorer.evaluation.tables import Cell, Column, Table, TableRow
from varestorer.systems import load
from varestorer.utils.errors import UsageError
from varestorer.utils.files import expand_user
from varestorer.weights.resolve import locate

METRICS = ("lpips", "dists", "niqe")
SCALE, SIDE = 4, 128
"""Of the picture that is enlarged on the clock; pixels."""


@dataclass(frozen=True)
class SmallModel:
    """What enlarges images, on the CPU in float32, and what it costs to keep."""

    source: KnownSource
    parameters: int
    bytes: int  # of its files
    license: str | None = None  # as its card or its owner says


def open_models(given: Mapping[str, str], licenses: Mapping[str, str]) -> dict[str, SmallModel]:
    """Models by their labels: "bicubic", files that spandrel loads, or models of ours as `systems.load` takes them.

    UsageError: a license of no model, or no such model.
    """
    if unknown := licenses.keys() - given.keys():
        raise UsageError(f"licenses= names {', '.join(sorted(unknown))}, and models= does not")
    models = {label: _open(name) for label, name in given.items()}
    return {label: replace(model, license=licenses.get(label, model.license)) for label, model in models.items()}


def _open(name: str) -> SmallModel:
    if name == "bicubic":
        return SmallModel(BicubicSource(SCALE), 0, 0)
    path = expand_user(name)
    if path.is_file():
        try:
            source = SpandrelSource(path, SCALE)
        except UsageError as refused:
            if "spandrel knows no model" not in str(refused):
                raise
        else:
            return _small_model(source, source.model.model, [path], path.parent)
    system, place = load(name, merge=True), locate(name, {})
    files = [place] if place.is_file() else [*place.glob("*.safetensors")]
    return _small_model(SystemSource(system, SCALE), system, files, place)


def _small_model(source: KnownSource, network: nn.Module, files: Sequence[Path], folder: Path) -> SmallModel:
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return SmallModel(source, parameters, sum(file.stat().st_size for file in files), _license(folder))


def _license(folder: Path) -> str | None:
    """As the model card of a folder names it."""
    card = folder / "README.md"
    data: dict[str, Any] = (metadata_load(card) if card.is_file() else None) or {}
    name = data.get("license_name") if data.get("license") == "other" else data.get("license")
    return None if name is None else str(name)


def table_small(
    records: Sequence[EvaluationRecord], models: Mapping[str, SmallModel], seconds: Mapping[str, float]
) -> list[Table]:
    """A row for each label, and the evaluations in pairs; UsageError for evaluations of several data sets."""
    sets = {record.dataset for record in records}
    if len(sets) > 1:
        raise UsageError(f"table=small is about one data set, got runs= on {', '.join(sorted(sets))}")
    scored = {record.label: record for record in records}
    rows = []
    for label in dict.fromkeys([*scored, *models]):
        cells: dict[str, Cell] = {"model": label}
        record, model = scored.get(label), models.get(label)
        if record is not None:
            for metric, entry in record.summary["metrics"].items():
                cells |= {metric: entry["mean"], f"{metric}, 95 %": interval(entry)}
        if model is not None:
            sizes = {"MB": model.bytes / 1e6, "parameters (M)": model.parameters / 1e6, "seconds": seconds.get(label)}
            cells |= {name: size or None for name, size in sizes.items()} | {"license": model.license}
        rows.append(TableRow(cells, scores={} if record is None else record.scores))
    columns = [Column("model", is_text=True)]
    for metric in METRICS:
        columns += [Column(metric, lower_is_better=True), Column(f"{metric}, 95 %", is_text=True)]
    columns += [Column(name, lower_is_better=True) for name in ("MB", "parameters (M)", "seconds")]
    notes = [f"{record.label}: {record.summary['n']} images of {record.dataset}." for record in records]
    notes.append(
        f"seconds: medians for {SIDE} -> {SCALE * SIDE} pixels on the CPU, float32, {torch.get_num_threads()} threads, "
        "all models in turns; MB: files as stored; 95 %: interval of the mean."
    )
    table = Table((*columns, Column("license", is_text=True)), tuple(rows), "Scores, size and speed", tuple(notes))
    return [table, *pairs_table(records, METRICS)]
