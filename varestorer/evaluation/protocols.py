"""Protocols: which metrics a paper reports, and with which options.

The same outputs score up to 2.1 dB apart under different conventions, so a figure means something only
together with its protocol. Measured on public outputs of OSEDiff for RealSR (100 images): PSNR is 25.15 on
the luma of BT.601 and 23.59 on RGB; SSIM is 0.734 on BT.601 luma and 0.707 on the luma of YIQ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from varestorer.utils.errors import UsageError
from varestorer.utils.iqa import metric_id

LUMA_BT601 = {"test_y_channel": True, "color_space": "ycbcr"}


@dataclass(frozen=True)
class MetricSpec:
    """One column of a protocol."""

    name: str
    pyiqa_name: str = ""  # default: the same
    options: Mapping[str, Any] = field(default_factory=dict)  # of pyiqa, that differ from its defaults

    def __post_init__(self) -> None:
        object.__setattr__(self, "pyiqa_name", self.pyiqa_name or self.name)


@dataclass(frozen=True)
class Protocol:
    """A named list of metrics with exact options, in the order of the paper's table."""

    name: str
    metrics: tuple[MetricSpec, ...]

    def select(self, names: Sequence[str] | None = None) -> tuple[MetricSpec, ...]:
        """The protocol's metrics, or those asked for: its columns, or other metrics of pyiqa with their defaults.

        UsageError: an empty list, or a name given twice.
        """
        if names is None:
            return self.metrics
        if not names or len(set(names)) < len(names):
            raise UsageError(f"metrics must name at least one metric, and each once, got {list(names)}")
        own = {spec.name: spec for spec in self.metrics}
        return tuple(own.get(name, MetricSpec(name)) for name in names)


def load_protocol(name: str, metrics: Mapping[str, Mapping[str, Any] | None] | None = None) -> Protocol:
    """Get one of `PROTOCOLS`, or build one of one's own; `configs/protocol/*.yaml` holds these arguments.

    `metrics` are columns with options of pyiqa; the key `pyiqa` in these gives its name where it differs. UsageError:
    unknown name without metrics.
    """
    if metrics is None:
        if name not in PROTOCOLS:
            raise UsageError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {name!r}")
        return PROTOCOLS[name]
    given = {column: dict(options or {}) for column, options in metrics.items()}
    return Protocol(name, tuple(MetricSpec(c, str(options.pop("pyiqa", c)), options) for c, options in given.items()))


def _protocol(name: str, *metrics: MetricSpec | str) -> Protocol:
    return Protocol(name, tuple(MetricSpec(m) if isinstance(m, str) else m for m in metrics))


_PSNR_Y = MetricSpec("psnr", options=LUMA_BT601)
_SSIM_Y = MetricSpec("ssim", options=LUMA_BT601)

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        # VARestorer (arXiv 2604.21450), table 1: pyiqa's defaults throughout, so RGB PSNR and YIQ-luma SSIM.
        # Not stated there: which variant of LIQE, and the precision of Q-Align; these are pyiqa's defaults.
        _protocol(
            "varestorer", *("psnr", "ssim", "lpips", "maniqa", "musiq", "niqe", "clipiqa", "liqe", "qalign", "fid")
        ),
        # StableSR, SeeSR, OSEDiff, TSD-SR: BT.601 luma without border crop, MANIQA trained on PIPAL.
        _protocol(
            "stablesr_y",
            *(_PSNR_Y, _SSIM_Y, "lpips", "dists", "niqe", "musiq"),
            *(MetricSpec("maniqa", "maniqa-pipal"), "clipiqa", "fid"),
        ),
        # VARSR: BT.601 luma as above, but MANIQA trained on KonIQ.
        _protocol("varsr", *(_PSNR_Y, _SSIM_Y, "lpips", "dists", "niqe", "musiq", "maniqa", "clipiqa", "fid")),
    )
}

PAPERS = {
    "varestorer": ("VARestorer",),
    "stablesr_y": ("StableSR", "SeeSR", "OSEDiff", "TSD-SR"),
    "varsr": ("VARSR", "H-VAR"),
}
"""Whose tables follow a protocol: measured on the outputs that OSEDiff's authors published, see the top."""


def listed_protocols() -> str:
    """Every protocol, whose it is, and the convention of each of its metrics."""
    lines = []
    for name, protocol in PROTOCOLS.items():
        lines.append(f"{name}: {', '.join(PAPERS[name])}")
        lines += [f"  {spec.name:8} {metric_id(spec.pyiqa_name, spec.options)}" for spec in protocol.metrics]
    return "\n".join(
        [*lines, "Plain psnr is on RGB, plain ssim on the luma of YIQ (pyiqa's defaults), both without crop."]
    )
