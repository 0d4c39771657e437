"""Which convention gives a figure: the one it was made with is found, and a wrong one is said to be none."""

from pathlib import Path

import pytest
import torch

from varestorer.evaluation.detective import OPTIONS, RGB, Convention, conventions, explain, read_figures, report
from varestorer.evaluation.evaluator import Evaluator
from varestorer.evaluation.protocols import load_protocol
from varestorer.evaluation.results import Pair
from varestorer.evaluation.sources import Candidate, FolderSource
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.images import load_image, save_image
from varestorer.utils.iqa import create_metric


def test_the_convention_of_a_figure_is_found(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for folder in ("hr", "sr"):
        (tmp_path / folder).mkdir()
    for name in "ab":
        image = torch.rand(3, 48, 48, generator=generator)
        save_image(tmp_path / "hr" / f"{name}.png", image)
        save_image(
            tmp_path / "sr" / f"{name}.png", (image + 0.1 * torch.randn(3, 48, 48, generator=generator)).clamp(0, 1)
        )
        pairs.append((name, tmp_path / "sr" / f"{name}.png", tmp_path / "hr" / f"{name}.png"))
    luma = create_metric("psnr", {"test_y_channel": True, "color_space": "ycbcr"})
    scores = [luma(*(load_image(path)[None] for path in (lq, hq))).item() for _, lq, hq in pairs]
    figures = {"psnr": f"{sum(scores) / 2:.4f}"}
    answers, count = explain(pairs, FolderSource(tmp_path / "sr", pairs), figures, 4)
    assert answers["psnr"][0].fits and answers["psnr"][0].convention.words == "luma of BT.601"
    text = report(figures, answers, count)
    assert "given by 1 of" in text and "protocol stablesr_y, of StableSR" in text
    wrong = {"psnr": "3.14"}
    text = report(wrong, *explain(pairs, FolderSource(tmp_path / "sr", pairs), wrong, 4))
    assert "none of 20 conventions gives it" in text and "no protocol of a known paper" in text


def test_figures_are_read_and_conventions_differ() -> None:
    assert read_figures("psnr=25.15, SSIM=0.7341") == {"psnr": "25.15", "ssim": "0.7341"}
    with pytest.raises(UsageError, match="explain must be like"):
        read_figures("psnr")
    for metric in ("psnr", "ssim", "musiq"):
        words = [way.words for way in conventions(metric, 2)]
        assert len(set(words)) == len(words)
    assert "RGB, without a border of 2" in [way.words for way in conventions("psnr", 2)]


@pytest.mark.parametrize("metric", ["psnr", "ssim"])
@pytest.mark.parametrize("channel", OPTIONS)
@pytest.mark.parametrize("border", [0, 4])
def test_conventions_are_those_of_pyiqa(metric: str, channel: str, border: int, tmp_path: Path) -> None:
    image, reference = torch.rand(2, 3, 140, 150, generator=torch.Generator().manual_seed(0)).mul(255).round().div(255)
    save_image(tmp_path / "hr.png", reference)
    judge = create_metric(metric, OPTIONS[channel] | {"crop_border": border})
    pairs = [("a", tmp_path / "hr.png", tmp_path / "hr.png")]
    answers, _ = explain(pairs, lambda name, path: Candidate(image), {metric: "1"}, 1)
    found = {answer.convention: answer.mean for answer in answers[metric]}
    is_rounded = metric == "ssim" and channel != RGB  # so is pyiqa's
    for is_cropped in (False, True):
        one, other = ((x[:, 6:134, 11:139] if is_cropped else x)[None] for x in (image, reference))
        way = Convention(metric, channel, is_rounded, border, is_cropped)
        assert found[way] == pytest.approx(judge(one, other).item(), abs=2e-5)


def test_a_broken_image_is_left_out_and_sets_without_references_have_figures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "ab":
        save_image(tmp_path / f"{name}.png", torch.rand(3, 120, 120))
    (tmp_path / "b.png").write_text("no image")
    pairs: list[Pair] = [(name, tmp_path / f"{name}.png", None) for name in "ab"]
    answers, count = explain(pairs, FolderSource(tmp_path, pairs), {"niqe": "5"}, 4)
    assert count == 1 and answers["niqe"] and "b is left out" in caplog.text
    with pytest.raises(UserError, match="psnr gives a figure here: the data set has no references"):
        explain(pairs, FolderSource(tmp_path, pairs), {"psnr": "20"}, 4)


@pytest.mark.parity
def test_published_pictures_give_what_pyiqa_gives_under_two_papers_protocols(shared: Path) -> None:
    root = shared / "benchmarks" / "realsr"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    names = sorted(path.name for path in (root / "osediff").glob("*.png"))[:2]
    files = [(root / "osediff" / name, root / "hr" / name) for name in names]
    pairs: list[Pair] = [(image.name, image, hq) for image, hq in files]
    for protocol in ("varestorer", "stablesr_y"):
        judge = Evaluator(load_protocol(protocol), ["psnr", "ssim"])
        scores = [judge.score(load_image(image), load_image(hq)).values for image, hq in files]
        figures = {name: f"{sum(score[name] for score in scores) / len(scores):.4f}" for name in ("psnr", "ssim")}
        answers, count = explain(pairs, FolderSource(root / "osediff", pairs), figures, 4)
        assert f"all together: protocol {protocol}" in report(figures, answers, count)
