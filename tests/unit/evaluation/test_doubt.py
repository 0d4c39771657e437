"""Whether a model knows where it guesses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_sizes import HVAR_SIZES, VARSR_SIZES

from varestorer.evaluation.doubt import (
    BINS,
    SHARES,
    _binned,
    calibration_error,
    calibration_table,
    check_doubt,
    coverage_table,
    measure_doubt,
    write_doubt,
)
from varestorer.evaluation.evaluator import Evaluator
from varestorer.evaluation.protocols import PROTOCOLS
from varestorer.evaluation.results import Pair
from varestorer.systems.base import System
from varestorer.systems.hvar import HVAR
from varestorer.systems.varestorer import VARestorer
from varestorer.systems.varsr import VARSR
from varestorer.tokenizer import ScaleSchedule
from varestorer.utils.errors import UsageError
from varestorer.utils.images import load_image, resize, save_image
from varestorer.utils.seeds import derive_seed, torch_generator


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    """Two pairs, 12 x 9 -> 48 x 36, and one whose reference has another size."""
    found = []
    for n, size in enumerate([(48, 36), (48, 36), (40, 36)]):
        hq = resize(torch.rand(3, 8, 6, generator=torch_generator(n)), size)
        hq = hq[:1].expand(3, -1, -1) if n == 1 else hq  # gray stays gray
        files = tmp_path / f"{n}_lq.png", tmp_path / f"{n}_hq.png"
        save_image(files[0], resize(hq, (12, 9)))
        save_image(files[1], hq)
        found.append((str(n), *files))
    return found


def evaluator(*metrics: str) -> Evaluator:
    return Evaluator(PROTOCOLS["varestorer"], metrics, offline=True)


def test_symbols_are_binned_by_their_probability_and_counted_where_right() -> None:
    """Bits of probability p that are right with p are calibrated; those that are always right are not."""
    schedule = ScaleSchedule.build(sides=[1, 64])
    generator = torch_generator(0)
    p = 0.5 + 0.5 * torch.rand(1, schedule.num_tokens, 8, generator=generator)
    logits = torch.stack([torch.zeros_like(p), torch.logit(p.clamp(max=0.999))], dim=-1)
    right = torch.rand(p.shape, generator=generator) < p
    bins = _binned(logits, right, schedule)
    assert bins.shape == (2, BINS, 3) and bins[..., 0].sum() == p.numel() and bins[0, :, 0].sum() == 8
    assert calibration_error(bins[1]) < 0.02
    always = _binned(logits, torch.ones_like(right), schedule)[1]
    assert calibration_error(always) == pytest.approx(0.25, abs=0.02)  # sure of 3/4 on average


def test_codes_are_judged_by_the_likeliest() -> None:
    logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.0, 2.0]]])
    bins = _binned(logits, torch.tensor([[0, 1]]), ScaleSchedule(scales=((1, 2),)))
    p = logits[0, 0].softmax(0)[0].item()
    assert bins.sum(axis=(0, 1)).tolist() == pytest.approx([2, 2 * p, 1])


def test_the_ends_of_the_curve_are_the_restoration_and_the_enlarged_input(
    tiny_system: VARestorer, pairs: list[Pair], tmp_path: Path
) -> None:
    judge = evaluator("psnr")
    report = measure_doubt(tiny_system, pairs, judge, "bicubic", seed=5)
    assert [image.name for image in report.images] == ["0", "1"] and "pixels" in report.failures["2"]
    for image, (name, lq, hq) in zip(report.images, pairs, strict=False):
        restored = tiny_system.restore(load_image(lq), 4, seed=derive_seed(5, name)).image
        enlarged = tiny_system.restore(load_image(lq), 4, fidelity=1).image
        ends = [judge.score(made, load_image(hq)).values["psnr"] for made in (restored, enlarged)]
        for curve in image.scores["psnr"].values():
            assert [curve[0], curve[-1]] == pytest.approx(ends, abs=1e-3)
        oracle, blind = (image.scores["psnr"][order] for order in ("oracle", "blind"))
        assert all(o >= b for o, b in zip(oracle, blind, strict=True)) and oracle[3] > blind[3]
    table = calibration_table(report)
    assert [row.cells["scale"] for row in table.rows] == ["1 x 1", "2 x 2", "4 x 4", "all"]
    assert len(coverage_table(report).rows) == len(SHARES)
    files = write_doubt(report, tmp_path / "out", "tiny")
    assert {file.name for file in files} == {f"doubt.{end}" for end in ("md", "tex", "html", "json", "png")}
    content = json.loads((tmp_path / "out/doubt.json").read_text())
    assert content["n"] == 2 and np.array(content["bins"]["4 x 4"]).shape == (BINS, 3)


@pytest.mark.parametrize("system", [VARSR(**VARSR_SIZES), HVAR(**HVAR_SIZES)], ids=["varsr", "hvar"])
def test_the_other_papers_are_judged_as_well(system: System, pairs: list[Pair]) -> None:
    report = measure_doubt(system.eval(), pairs[:1], evaluator("psnr"), "bicubic")
    assert len(calibration_table(report).rows) == len(system.schedule) + 1
    assert 0 <= calibration_error(report.bins[-1]) <= 1
    assert len({curve[0] for curve in report.images[0].scores["psnr"].values()}) == 1


def test_what_cannot_be_judged_is_refused(tiny_system: VARestorer, pairs: list[Pair]) -> None:
    with pytest.raises(UsageError, match="has no restorer: give doubt=bicubic"):
        check_doubt(tiny_system, pairs, evaluator("psnr"), "restorer")
    with pytest.raises(UsageError, match="needs psnr or lpips among the metrics"):
        check_doubt(tiny_system, pairs, evaluator("ssim"), "bicubic")
    with pytest.raises(UsageError, match="needs a data set with references"):
        check_doubt(tiny_system, [("a", pairs[0][1], None)], evaluator("psnr"), "bicubic")
