"""What was measured, as tables, as JSON and as a picture of bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from varestorer.benchmark.counting import Count
from varestorer.benchmark.measure import REST, Measured, Timing, Work, measure
from varestorer.benchmark.roofline import Rates, device_description, library_versions
from varestorer.evaluation.tables import Cell, Column, Table, TableRow, to_text, write_tables
from varestorer.utils.errors import UserError
from varestorer.utils.files import atomic_write, write_json

GIB = 2**30
COLUMNS = {
    "images/s": ("images_per_second", 1),
    "ms": ("seconds", 1e3),
    "spread": ("spread", 1e3),
    "of": ("repeats", 1),
    "peak GiB": ("peak_bytes", 1 / GIB),
    "params (M)": ("parameters", 1e-6),
    "GFLOP": ("flops", 1e-9),
    "% of rate": ("share_of_matrix_rate", 1e2),
    "least MB": ("least_bytes", 1e-6),
    "% of copies": ("share_of_copy_bandwidth", 1e2),
    "floor ms": ("floor_seconds", 1e3),
    "x floor": ("times_floor", 1),
}
"""Heading -> a figure, and what it is multiplied with."""


@dataclass(frozen=True)
class Run:
    """A variant at one size of batch.

    Every part is held against the rate of the blocks' precision, though the VAE's encoder works in float32 whatever the
    blocks do.
    """

    variant: str
    batch: int  # images at once
    precision: str
    measured: Measured
    counts: Mapping[str, Count]  # of each part
    more: dict[str, Cell] = field(default_factory=dict)  # further columns of the overview

    @property
    def seconds(self) -> float:
        """Of the whole, the median."""
        return self.measured.whole.median

    @property
    def flops(self) -> int:
        """Of all parts."""
        return sum(cost.flops for cost in self.counts.values())

    def floor(self, rates: Rates) -> float:
        """Seconds: the floors of all parts together."""
        return sum(rates.floor(cost, self.precision) for cost in self.counts.values())

    def content(self, rates: Rates) -> dict[str, Any]:
        """All figures: seconds, bytes, operations, and shares of what the device can do at best."""

        def figures(timing: Timing, cost: Count, floor: float) -> dict[str, Any]:
            seconds, rate = timing.median, rates.matrix[self.precision]
            return {
                "seconds": seconds,
                "spread": timing.spread,
                "flops": cost.flops,
                "share_of_matrix_rate": cost.flops / seconds / rate if seconds else None,
                "least_bytes": cost.bytes,
                "share_of_copy_bandwidth": cost.bytes / seconds / rates.copy if seconds else None,
                "floor_seconds": floor,
                "times_floor": seconds / floor if floor else None,
            }

        whole, parts = self.measured.whole, self.measured.parts
        costs = {part: self.counts.get(part, Count(0, 0)) for part in parts}
        moved = sum(cost.bytes for cost in self.counts.values())
        return {
            "variant": self.variant,
            "batch": self.batch,
            "precision": self.precision,
            "repeats": len(whole.seconds),
            "all_seconds": whole.seconds,
            "images_per_second": self.batch / whole.median,
            "peak_bytes": self.measured.peak_bytes,
            **figures(whole, Count(self.flops, moved), self.floor(rates)),
            "parts": {
                part: figures(parts[part], cost, rates.floor(cost, self.precision)) for part, cost in costs.items()
            },
            **self.more,
        }


def table_of(entries: Sequence[tuple[Mapping[str, Cell], Mapping[str, Any]]], title: str) -> Table:
    """A row for each entry: its own cells and its figures; columns without any figure are left out."""
    rows = [
        {**cells, **{name: figures[key] * factor for name, (key, factor) in COLUMNS.items() if figures.get(key)}}
        for cells, figures in entries
    ]
    texts = {name: isinstance(cell, str) for row in rows for name, cell in row.items()}
    order = [*entries[0][0], *COLUMNS, *texts]
    columns = tuple(Column(name, is_text=texts[name]) for name in dict.fromkeys(order) if name in texts)
    return Table(columns, tuple(map(TableRow, rows)), title)


def parts_table(run: Run, rates: Rates) -> Table:
    """The parts of a run, each beside what the device could do."""
    title = f"{run.variant}, batch {run.batch}, against the rate of {run.precision}"
    return table_of([({"part": part}, figures) for part, figures in run.content(rates)["parts"].items()], title)


def overview(runs: Sequence[Run], rates: Rates, title: str = "") -> Table:
    """A row for each run, its whole."""
    own = [{"variant": run.variant, "batch": run.batch, "in": run.precision, **run.more} for run in runs]
    return table_of([(cells, run.content(rates)) for cells, run in zip(own, runs, strict=True)], title)


def cost_table(counts: Mapping[str, Count], parameters: Mapping[str, int], title: str) -> Table:
    """What one image costs, by count alone."""
    nothing = Count(0, 0)
    costs = {part: (parameters.get(part, 0), counts.get(part, nothing)) for part in [*parameters, *counts]}
    entries = {part: {"parameters": n, "flops": c.flops, "least_bytes": c.bytes} for part, (n, c) in costs.items()}
    entries["all"] = {key: sum(entry[key] for entry in entries.values()) for key in ("parameters", "flops")}
    return table_of([({"part": part}, entry) for part, entry in entries.items()], title)


class Report:
    """Prints (by `say`) what is measured when it is there, and writes it all at the end."""

    def __init__(self, what: str, model: str, device: torch.device, say: Callable[[str], object]) -> None:
        self.what, self.model, self.say = what, model, say
        versions = library_versions()
        self.place = {"device": device_description(device), "versions": versions}
        self.title = f"benchmark {what}: {model} on {self.place['device']}"
        self.tables: list[Table] = []
        say(f"{self.title}\n" + ", ".join(f"{name} {number}" for name, number in versions.items()))

    def show(self, table: Table) -> None:
        """Print a table, and keep it."""
        self.tables.append(table)
        self.say(f"\n{to_text(table)}")

    def measure(self, works: Mapping[str, Work], device: torch.device, options: Any) -> dict[str, Measured]:
        """Time works in turns, see `measure.measure`; the seconds of each first run are printed at once.

        Of the command's options it takes `repeats`, `warmup` and `minutes`.
        """

        def told(name: str, seconds: float) -> None:
            self.say(f"{name}: first run {seconds:.3f} s")

        return measure(works, options.repeats, options.warmup, device, 60 * options.minutes, told)

    def compare(
        self,
        works_of: Callable[[int], Mapping[str, Work]],
        run_of: Callable[[str, int, Measured], Run],
        rates: Rates,
        device: torch.device,
        options: Any,
    ) -> list[Run]:
        """Time variants at each size of batch (`options.batch`), and print their runs; see `measure`.

        `works_of` gives the works of the variants at a size of batch, by name, and `run_of` what is kept of a variant's
        name, size of batch and measurement. UserError: nothing could be measured.
        """
        runs: list[Run] = []
        for batch in options.batch:
            found = self.measure(works_of(batch), device, options)
            of_batch = [run_of(name, batch, measured) for name, measured in found.items()]
            if of_batch:
                self.show_runs(of_batch, rates, f"as wholes, batch {batch}")
            runs += of_batch
        if not runs:
            raise UserError("no variant could be measured; see the warnings above")
        return runs

    def show_rates(self, rates: Rates) -> None:
        """Print the rates of the device."""
        matrix = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {precision}" for precision, rate in rates.matrix.items())
        self.say(f"\nmeasured rates: products of matrices {matrix}; copies {rates.copy / 1e9:.3g} GB/s")

    def show_runs(self, runs: Sequence[Run], rates: Rates, title: str = "") -> None:
        """Print the runs of one size of batch, as wholes and by their parts."""
        for run in runs:
            if set(run.measured.parts) - {REST}:  # those of a CUDA graph are launched together
                self.show(parts_table(run, rates))
        self.show(overview(runs, rates, title))

    def write(self, folder: Path, runs: Sequence[Run], rates: Rates | None, content: Mapping[str, Any]) -> None:
        """Write benchmark.json, the tables, and the picture of the runs."""
        measured = {} if rates is None else {"rates": {"matrix": rates.matrix, "copy": rates.copy}}
        found = {"runs": [run.content(rates) for run in runs]} if rates is not None else {}
        whole = {"what": self.what, "model": self.model, **self.place, **measured, **found, **content}
        write_json(folder / "benchmark.json", whole, indent=2)
        tables = write_tables(self.tables, self.title, folder, "benchmark")
        written = ["benchmark.json", *(path.name for path in tables)]
        if runs and rates is not None:
            write_bars(folder / "benchmark.png", runs, rates, self.title)
            written.append("benchmark.png")
        self.say(f"\nwritten: {', '.join(written)} to {folder}")


def write_bars(path: Path, runs: Sequence[Run], rates: Rates, title: str) -> None:
    """Draw milliseconds of an image: the parts of each run end to end, and the sum of their floors."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.5 * len(runs)), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    names = list(dict.fromkeys(part for run in runs for part in run.measured.parts))
    left = [0.0] * len(runs)
    for name, color in zip(names, colormaps["tab20"].colors, strict=False):  # type: ignore[attr-defined]
        timings = [run.measured.parts.get(name) for run in runs]
        widths = [1000 * t.median / run.batch if t else 0 for t, run in zip(timings, runs, strict=True)]
        axes.barh(range(len(runs)), widths, left=left, height=0.6, color=color, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    floors = [1000 * run.floor(rates) / run.batch for run in runs]
    places = range(len(runs))
    axes.vlines(floors, [n - 0.4 for n in places], [n + 0.4 for n in places], "k", "dashed", label="floor")
    axes.set_yticks(places, [f"{run.variant}, batch {run.batch}" for run in runs])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds an image, median")
    axes.set_title(title, fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary)
