"""What the paper's sizes should reach on an H200, beside what was measured there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from varestorer.evaluation.cost import TRANSFORMER

GB = 1e9
DEVICE = "H200"


@dataclass(frozen=True)
class Target:
    """A figure that is wanted.

    Attributes:
        name: of the figure, with its unit.
        wanted: the limit.
        at_most: whether the figure may be at most that; else at least.
        measured: None where it was not.
        by: the variant that gave it.
    """

    name: str
    wanted: float
    at_most: bool
    measured: float | None
    by: str

    @property
    def verdict(self) -> str:
        """In words."""
        if self.measured is None:
            return "not measured"
        held = self.measured <= self.wanted if self.at_most else self.measured >= self.wanted
        return "reached" if held else "missed"


def restoring_targets(content: Mapping[str, Any]) -> list[Target]:
    """Targets of one-step restoring.

    Args:
        content: of benchmark.json of what=restore, or empty.
    """
    runs = content.get("runs", [])
    single, many = _fastest(runs, 1), _fastest(runs, 16)
    shares = [
        (stage["share_of_matrix_rate"], f"{run['variant']}, batch {run['batch']}")
        for run in runs
        if run["precision"] == "bf16"
        for stage in run["stages"]
        if stage["name"] == TRANSFORMER
    ]
    share, by = max(shares, default=(None, ""))
    return [
        Target("end to end at batch 1, ms", 40, True, _scaled(single, "seconds", 1000), _variant(single)),
        Target("images a second at batch 16", 28, False, _scaled(many, "images_per_second", 1), _variant(many)),
        Target("peak memory at batch 1, GB", 12, True, _scaled(single, "peak_bytes", 1 / GB), _variant(single)),
        Target("peak memory at batch 16, GB", 12, True, _scaled(many, "peak_bytes", 1 / GB), _variant(many)),
        Target("transformer, % of the matrix rate", 55, False, None if share is None else 100 * share, by),
    ]


def all_targets(restored: Mapping[str, Any], generated: Mapping[str, Any]) -> list[Target]:
    """Targets of restoring, and of one step against the best generation scale by scale, with guidance and a cache.

    Args:
        restored: content of benchmark.json of what=restore, or empty.
        generated: of what=generate, or empty.
    """
    runs = [(set(run["variant"].split("+")), run) for run in generated.get("runs", [])]
    one = _fastest([run for words, run in runs if "one" in words and "short" not in words], 1)
    many = _fastest([run for words, run in runs if {"multi", "cfg"} <= words and "nocache" not in words], 1)
    ratio = many["seconds"] / one["seconds"] if one and many else None
    by = f"{_variant(many)} over {_variant(one)}" if ratio else ""
    return [*restoring_targets(restored), Target("scale by scale over one step, times", 2, False, ratio, by)]


def targets_text(targets: Sequence[Target]) -> str:
    """A line for each."""
    lines = [f"{'target':36}{'wanted':>12}{'measured':>12}  verdict"]
    for target in targets:
        wanted = f"{'<=' if target.at_most else '>='} {target.wanted:g}"
        measured = "-" if target.measured is None else f"{target.measured:.2f}"
        by = f" ({target.by})" if target.by else ""
        lines.append(f"{target.name:36}{wanted:>12}{measured:>12}  {target.verdict}{by}")
    return "\n".join(lines)


def targets_content(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """The same for programs."""
    return [asdict(target) | {"verdict": target.verdict} for target in targets]


def _fastest(runs: Sequence[Mapping[str, Any]], batch: int) -> Mapping[str, Any]:
    of_batch = [run for run in runs if run["batch"] == batch]
    return min(of_batch, key=lambda run: run["seconds"], default={})


def _variant(run: Mapping[str, Any]) -> str:
    return str(run.get("variant", ""))


def _scaled(run: Mapping[str, Any], key: str, factor: float) -> float | None:
    return None if run.get(key) is None else run[key] * factor
