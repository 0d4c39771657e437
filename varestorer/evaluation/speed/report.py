"""The speed of variants as text, as content for JSON, and as a picture of bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from varestorer.evaluation.speed.restoring import Rates, Speed, StageSpeed
from varestorer.utils.files import atomic_write

WIDTH = 15
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
GIB = 2**30


def si(value: float | None, unit: str = "") -> str:
    """A figure of three digits with its prefix, such as `17.4 T`; a dash for None and 0."""
    if not value:
        return "-"
    factor, prefix = next(((f, p) for f, p in PREFIXES if value >= f), (1.0, ""))
    return f"{value / factor:.3g} {prefix}{unit}".rstrip()


def speed_text(speeds: Sequence[Speed], rates: Rates, beside: Sequence[StageSpeed] = ()) -> str:
    """All variants in a table, then the stages of each, then what stands beside restoring, such as a text encoder."""
    matrix = ", ".join(f"{si(rate, 'FLOP/s')} in {precision}" for precision, rate in rates.matrix.items())
    lines = [f"measured rates: products of matrices {matrix}; copies {si(rates.copy, 'B/s')}", ""]
    lines += _whole_table(speeds)
    for speed in speeds:
        if speed.stages:
            lines += ["", f"{speed.variant}, batch {speed.batch}, against the rate of {speed.precision}"]
            lines += _stage_table(speed, rates.matrix[speed.precision], rates.copy)
        else:
            lines += ["", f"{speed.variant}, batch {speed.batch}: its stages are launched together, not timed apart"]
    if beside:
        lines += ["", "of one prompt", _titles(), *(_row(stage, _best(rates), rates.copy) for stage in beside)]
    return "\n".join(lines)


def speed_content(speeds: Sequence[Speed], rates: Rates, beside: Sequence[StageSpeed] = ()) -> dict[str, Any]:
    """The same for programs: seconds, bytes, operations."""
    return {
        "rates": {"matrix": rates.matrix, "copy": rates.copy},
        "runs": [_run_content(speed, rates) for speed in speeds],
        "beside": [_stage_content(stage, _best(rates), rates.copy) for stage in beside],
    }


def write_bars(path: Path, speeds: Sequence[Speed], rates: Rates, title: str) -> None:
    """Draw milliseconds of an image: the stages of each variant end to end, its whole, and the sum of its floors."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.5 * len(speeds)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(stage.name for speed in speeds for stage in speed.stages))
    colours = dict(zip(names, colormaps["tab20"].colors, strict=False))  # type: ignore[attr-defined]
    for row, speed in enumerate(speeds):
        left = 0.0
        for stage in speed.stages:
            width = 1000 * stage.timing.median / speed.batch
            axes.barh(row, width, left=left, height=0.6, color=colours[stage.name])
            left += width
        axes.plot(1000 * speed.whole.median / speed.batch, row, "kD", markersize=5)
        if speed.stages:
            floor = 1000 * floor_of(speed, rates) / speed.batch
            axes.plot([floor, floor], [row - 0.4, row + 0.4], "k--", linewidth=1.2)
    for name in names:
        axes.barh(0, 0, color=colours[name], label=name)
    axes.plot([], [], "kD", markersize=5, label="end to end")
    axes.plot([], [], "k--", linewidth=1.2, label="floor")
    axes.set_yticks(range(len(speeds)), [f"{speed.variant}, batch {speed.batch}" for speed in speeds])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds an image, median")
    axes.set_title(title, fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary)


def floor_of(speed: Speed, rates: Rates) -> float:
    """Seconds: the floors of all stages on the device together."""
    floors = [stage.floor(rates.matrix[speed.precision], rates.copy) for stage in speed.stages]
    return sum(floor for floor in floors if floor is not None)


def _best(rates: Rates) -> float:
    return max(rates.matrix.values())


def _whole_table(speeds: Sequence[Speed]) -> list[str]:
    titles = ("batch", "in", "ms", "spread", "images/s", "peak GiB")
    width = max(len("end to end"), *(len(speed.variant) for speed in speeds)) + 2
    lines = [f"{'end to end':{width}}" + "".join(f"{title:>10}" for title in titles)]
    for speed in speeds:
        peak = "-" if speed.peak_bytes is None else f"{speed.peak_bytes / GIB:.2f}"
        seconds = speed.whole.median
        figures = (f"{1000 * seconds:.2f}", f"{1000 * speed.whole.spread:.2f}", f"{speed.batch / seconds:.2f}", peak)
        cells = (str(speed.batch), speed.precision, *figures)
        lines.append(f"{speed.variant:{width}}" + "".join(f"{cell:>10}" for cell in cells))
    return lines


def _stage_table(speed: Speed, matrix: float, copy: float) -> list[str]:
    total = 1000 * sum(stage.timing.median for stage in speed.stages)
    floor = 1000 * floor_of(speed, Rates({speed.precision: matrix}, copy))
    last = f"{'sum':{WIDTH}}{total:10.2f}" + " " * 80 + f"{floor:10.3f}{total / floor:9.1f}x"
    return [_titles(), *(_row(stage, matrix, copy) for stage in speed.stages), last]


def _titles() -> str:
    titles = ("ms", "spread", "counted", "formula", "FLOP/s", "of rate", "bytes", "B/s", "of copy", "floor ms", "gap")
    return f"{'stage':{WIDTH}}" + "".join(f"{title:>10}" for title in titles)


def _row(stage: StageSpeed, matrix: float, copy: float) -> str:
    return f"{stage.name:{WIDTH}}" + "".join(f"{cell:>10}" for cell in _cells(stage, matrix, copy))


def _cells(stage: StageSpeed, matrix: float, copy: float) -> list[str]:
    found = _stage_content(stage, matrix, copy)
    times = [f"{1000 * found['seconds']:.2f}", f"{1000 * found['spread']:.2f}"]
    work = [si(found["flops_counted"]), si(found["flops_formula"]), si(found["flops_per_second"])]
    moved = [si(found["least_bytes"]), si(found["bytes_per_second"])]
    floor = "-" if found["floor_seconds"] is None else f"{1000 * found['floor_seconds']:.3f}"
    gap = "-" if found["gap"] is None else f"{found['gap']:.1f}x"
    shares = _percent(found["share_of_matrix_rate"]), _percent(found["share_of_copy_bandwidth"])
    return [*times, *work, shares[0], *moved, shares[1], floor, gap]


def _percent(share: float | None) -> str:
    return f"{100 * share:.1f} %" if share else "-"


def _run_content(speed: Speed, rates: Rates) -> dict[str, Any]:
    matrix = rates.matrix[speed.precision]
    return {
        "variant": speed.variant,
        "batch": speed.batch,
        "precision": speed.precision,
        "seconds": speed.whole.median,
        "spread": speed.whole.spread,
        "all_seconds": speed.whole.seconds,
        "images_per_second": speed.batch / speed.whole.median,
        "peak_bytes": speed.peak_bytes,
        "floor_seconds": floor_of(speed, rates) if speed.stages else None,
        "stages": [_stage_content(stage, matrix, rates.copy) for stage in speed.stages],
    }


def _stage_content(stage: StageSpeed, matrix: float, copy: float) -> dict[str, Any]:
    seconds, floor = stage.timing.median, stage.floor(matrix, copy)
    flops = stage.formula or stage.counted
    bandwidth = None if stage.least_bytes is None else stage.least_bytes / seconds
    return {
        "name": stage.name,
        "seconds": seconds,
        "spread": stage.timing.spread,
        "flops_counted": stage.counted,
        "flops_formula": stage.formula,
        "flops_per_second": flops / seconds,
        "share_of_matrix_rate": flops / seconds / matrix,
        "least_bytes": stage.least_bytes,
        "bytes_per_second": bandwidth,
        "share_of_copy_bandwidth": None if bandwidth is None else bandwidth / copy,
        "floor_seconds": floor,
        "gap": None if floor is None else seconds / floor,
    }
