"""Which convention gives a figure: the one it was made with is found, and a wrong one is said to be none."""

from pathlib import Path

import pytest
import torch

from varestorer.evaluation.detective import conventions, explain, read_figures, report
from varestorer.evaluation.sources import FolderSource
from varestorer.utils.errors import UsageError
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
    answers = explain(pairs, FolderSource(tmp_path / "sr", pairs), figures, 4)
    assert answers["psnr"][0].fits and answers["psnr"][0].convention.words == "luma of BT.601"
    text = report(figures, answers)
    assert "given by 1 of" in text and "protocol stablesr_y, of StableSR" in text
    wrong = {"psnr": "3.14"}
    text = report(wrong, explain(pairs, FolderSource(tmp_path / "sr", pairs), wrong, 4))
    assert "none of 13 conventions gives it" in text and "no protocol of a known paper" in text


def test_figures_are_read_and_conventions_differ() -> None:
    assert read_figures("psnr=25.15, SSIM=0.7341") == {"psnr": "25.15", "ssim": "0.7341"}
    with pytest.raises(UsageError, match="explain must be like"):
        read_figures("psnr")
    words = [way.words for way in conventions("psnr", 2)]
    assert len(set(words)) == len(words) and "RGB, without a border of 2" in words
