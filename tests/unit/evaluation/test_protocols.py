"""The protocols of the papers, frozen: metric by metric, with the network and the options that each names."""

from varestorer.evaluation.paper_tables import measured_rows
from varestorer.evaluation.protocols import PROTOCOLS

LUMA = {"test_y_channel": True, "color_space": "ycbcr"}
PLAIN = ("lpips", "dists", "niqe", "musiq", "maniqa", "clipiqa", "fid")


def columns(name: str) -> dict[str, tuple[str, dict]]:
    """Column -> pyiqa's name and options, in order."""
    return {spec.name: (spec.pyiqa_name, dict(spec.options)) for spec in PROTOCOLS[name].metrics}


def test_the_paper_scores_with_the_defaults_of_pyiqa() -> None:
    names = ["psnr", "ssim", "lpips", "maniqa", "musiq", "niqe", "clipiqa", "liqe", "qalign", "fid"]
    assert list(columns("varestorer").items()) == [(name, (name, {})) for name in names]


def test_others_score_the_luma_and_differ_in_maniqa() -> None:
    luma = {name: (name, LUMA) for name in ("psnr", "ssim")}
    assert columns("varsr") == luma | {name: (name, {}) for name in PLAIN}
    assert columns("stablesr_y") == columns("varsr") | {"maniqa": ("maniqa-pipal", {})}


def test_measured_baselines_stand_under_the_protocol_of_their_convention() -> None:
    """The same pictures: 2 dB apart on RGB and on luma."""
    rows = {
        protocol: {row.cells["method"]: row.cells for row in measured_rows("realsr", protocol, ["psnr", "ssim"])}
        for protocol in PROTOCOLS
    }
    assert rows["varsr"] == rows["stablesr_y"] and len(rows["varsr"]) >= 3
    for method, cells in rows["varestorer"].items():
        luma = rows["varsr"][method]
        assert isinstance(luma["psnr"], float) and isinstance(cells["psnr"], float)
        assert 1.0 < luma["psnr"] - cells["psnr"] < 2.5
        assert luma["ssim"] != cells["ssim"]
