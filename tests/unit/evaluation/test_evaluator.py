"""The evaluator, its sources and its protocols, on small made-up images."""

import csv
import json
import statistics
import threading
import unicodedata
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from pyiqa.utils.img_util import scandir_images
from torch import Tensor

from varestorer.evaluation.evaluator import Evaluator
from varestorer.evaluation.progress import write_records
from varestorer.evaluation.protocols import PROTOCOLS, load_protocol
from varestorer.evaluation.results import Evaluation, Pair, Row, mean_interval
from varestorer.evaluation.sources import BicubicSource, Candidate, FolderSource, SystemSource
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.images import load_image, resize, save_image, to_uint8
from varestorer.utils.iqa import Metric


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    """Three pairs, 12 x 16 -> 48 x 64."""
    found = []
    for i, name in enumerate(("a", "b", "sub/c")):
        hq = resize(torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(i)), (48, 64))
        paths = [tmp_path / side / f"{name}.png" for side in ("lr", "hr")]
        for path, image in zip(paths, (resize(hq, (12, 16)), hq), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(path, image)
        found.append((name, *paths))
    return found


def evaluator(*metrics: str) -> Evaluator:
    return Evaluator(PROTOCOLS["varestorer"], metrics or ("psnr", "ssim"), offline=True)


def test_protocols_fix_the_conventions() -> None:
    specs = {name: {s.name: s for s in protocol.metrics} for name, protocol in PROTOCOLS.items()}
    luma = {"test_y_channel": True, "color_space": "ycbcr"}
    assert specs["varestorer"]["psnr"].options == {} and specs["varestorer"]["ssim"].options == {}
    for name in ("stablesr_y", "varsr"):
        assert specs[name]["psnr"].options == specs[name]["ssim"].options == luma
    maniqa = {name: columns["maniqa"].pyiqa_name for name, columns in specs.items()}
    assert maniqa == {"varestorer": "maniqa", "stablesr_y": "maniqa-pipal", "varsr": "maniqa"}
    assert len(specs["varestorer"]) == 10


def test_protocol_selects_own_columns_and_others_by_name() -> None:
    chosen = PROTOCOLS["stablesr_y"].select(["ssim", "maniqa", "lpips-vgg"])
    assert [spec.pyiqa_name for spec in chosen] == ["ssim", "maniqa-pipal", "lpips-vgg"]
    assert chosen[0].options and not chosen[2].options
    for wrong in ([], ["psnr", "psnr"]):
        with pytest.raises(UsageError, match="metrics must name"):
            PROTOCOLS["varsr"].select(wrong)


def test_own_protocol_and_unknown_one() -> None:
    columns = {"psnr": {"crop_border": 4}, "quality": {"pyiqa": "musiq-spaq"}, "ssim": None}
    own = load_protocol("mine", columns)
    assert [(s.name, s.pyiqa_name) for s in own.metrics] == [
        ("psnr", "psnr"),
        ("quality", "musiq-spaq"),
        ("ssim", "ssim"),
    ]
    assert own.metrics[0].options == {"crop_border": 4}
    with pytest.raises(UsageError, match="one of varestorer, stablesr_y, varsr, got 'paper'"):
        load_protocol("paper")


def test_images_are_rounded_to_8_bit_before_scoring() -> None:
    reference = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    below_half_a_level = reference + 0.4 / 255 * (reference < 0.9)
    scores = evaluator("psnr").score(below_half_a_level, reference).values
    assert scores == evaluator("psnr").score(reference, reference).values
    a_level_off = evaluator("psnr").score((reference * 254 + 1) / 255, reference).values
    assert a_level_off["psnr"] < scores["psnr"]


def test_sizes_must_match() -> None:
    with pytest.raises(UserError, match="the image is 63x48 and its reference 64x48 pixels"):
        evaluator("psnr").score(torch.rand(3, 48, 63), torch.rand(3, 48, 64))


def test_metric_that_refuses_an_image_is_recorded_and_others_run() -> None:
    def picky(image: Tensor) -> Tensor:
        raise AssertionError("Short side is less than 224,\n try upsampling")

    judge = evaluator("psnr")
    judge.metrics["liqe"] = Metric("liqe", picky, False, False)
    scores = judge.score(torch.rand(3, 48, 64), torch.rand(3, 48, 64))
    assert set(scores.values) == {"psnr"}
    assert scores.errors == {"liqe": "Short side is less than 224, try upsampling"}


def test_scores_without_reference_are_those_that_need_none() -> None:
    scores = evaluator("psnr", "piqe").score(torch.rand(3, 96, 96))
    assert set(scores.values) == {"piqe"} and not scores.errors


def test_a_score_that_is_no_number_is_an_error() -> None:
    judge = evaluator("psnr")
    judge.metrics["psnr"] = Metric("psnr", lambda a, b: torch.tensor([torch.nan]), True, False)
    scores = judge.score(torch.rand(3, 8, 8), torch.rand(3, 8, 8))
    assert scores.errors == {"psnr": "the score is nan"} and not scores.values


def test_bicubic_evaluation_adds_up(pairs: list[Pair], tmp_path: Path) -> None:
    result = evaluator().evaluate(pairs, BicubicSource(), "toys", keep=tmp_path / "images")
    summary = result.summary()
    values = [row.scores["psnr"] for row in result.rows]
    assert list(summary) == ["dataset", "protocol", "n", "metrics", "unavailable"]
    assert (summary["dataset"], summary["protocol"], summary["n"]) == ("toys", "varestorer", 3)
    assert summary["metrics"]["psnr"] == {
        "mean": statistics.fmean(values),
        "std": statistics.pstdev(values),
        "ci95": [*mean_interval(values)],
        "worst_tenth": min(values),
        "n": 3,
        "id": "psnr",
        "weights_sha256": None,
    }
    assert result.seconds_per_image is not None and not result.failures
    saved = load_image(tmp_path / "images" / "sub" / "c.png")
    wanted = resize(load_image(pairs[2][1]), (48, 64))
    assert (saved - wanted).abs().max() <= 0.5 / 255 + 1e-6


def test_predictions_are_matched_by_name_and_failures_named(pairs: list[Pair], tmp_path: Path) -> None:
    folder = tmp_path / "made"
    save_image(folder / "a.png", load_image(pairs[0][2]))
    save_image(folder / "deep" / "c.png", torch.rand(3, 10, 10))
    result = evaluator().evaluate(pairs, FolderSource(folder))
    assert [bool(row.scores) for row in result.rows] == [True, False, False]
    assert result.failures[0].startswith("b: wanted one prediction b.* in")
    assert result.failures[1].startswith("sub/c: the image is 10x10 and its reference 64x48 pixels")
    assert result.summary()["n"] == 1 and result.summary()["metrics"]["psnr"]["n"] == 1
    assert result.seconds_per_image is None
    save_image(folder / "x" / "a.png", torch.rand(3, 48, 64))
    save_image(folder / "y" / "b.png", torch.rand(3, 48, 64))
    save_image(folder / "z" / "b.png", torch.rand(3, 48, 64))
    source = FolderSource(folder)
    with pytest.raises(UserError, match=r"found b\.png, b\.png"):
        source("b", pairs[1][1])
    with pytest.raises(UserError, match=r"found .*a\.png, .*a\.png|found a\.png, a\.png"):
        source("a", pairs[0][1])


def test_a_prediction_serves_one_pair(tmp_path: Path) -> None:
    pairs: list[Pair] = [(name, tmp_path / f"lr/{name}x4.png", None) for name in ("Canon/001", "Nikon/001", "Nikon/2")]
    made = tmp_path / "made"
    for name in ("001", "2"):
        save_image(made / f"{name}.png", torch.rand(3, 8, 8))

    def found() -> list[str]:
        source, names = FolderSource(made, pairs), []
        for name, lq, _ in pairs:
            try:
                names.append(source.find(name, lq).relative_to(made).as_posix())
            except UserError as error:
                names.append(str(error))
        return names

    for said in found()[:2]:
        assert said.startswith(f"{made / '001.png'} could be the prediction for Canon/001, Nikon/001: put")
    assert found()[2] == "2.png"
    save_image(made / "Canon/001.png", torch.rand(3, 8, 8))
    assert found()[0] == "Canon/001.png" and "could be" in found()[1]  # not the one that is left over
    save_image(made / "Nikon/001x4.png", torch.rand(3, 8, 8))  # named like the LQ image
    assert found() == ["Canon/001.png", "Nikon/001x4.png", "2.png"]


def test_a_prediction_of_the_set_is_not_taken_by_a_part_of_it(tmp_path: Path) -> None:
    pairs: list[Pair] = [("001", tmp_path / "lr/001.png", None), ("x/001", tmp_path / "lr/x/001.png", None)]
    save_image(tmp_path / "made/x/001.png", torch.rand(3, 8, 8))
    with pytest.raises(UserError, match="found none"):
        FolderSource(tmp_path / "made", pairs).find(*pairs[0][:2])


def test_predictions_from_a_mac_are_found(tmp_path: Path) -> None:
    name = "caf\u00e9"
    save_image(tmp_path / "made" / f"{unicodedata.normalize('NFD', name)}.png", torch.rand(3, 8, 8))
    assert FolderSource(tmp_path / "made").find(name, tmp_path / "lr.png").is_file()


def test_predictions_must_be_a_folder_with_images(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        FolderSource(tmp_path / "none")
    with pytest.raises(UsageError, match="holds none"):
        FolderSource(tmp_path)


def test_system_gets_scale_and_a_seed_per_image(pairs: list[Pair]) -> None:
    seen = {}

    class System:
        def restore(self, image: Tensor, scale: int = 4, *, seed: int = 0, **_: object) -> SimpleNamespace:
            seen[seed] = scale
            return SimpleNamespace(image=resize(image, (image.shape[1] * scale, image.shape[2] * scale)))

    source = SystemSource(System(), scale=4, seed=1)
    result = evaluator().evaluate(pairs, source)
    assert not result.failures and set(seen.values()) == {4} and len(seen) == 3
    before = set(seen)
    evaluator().evaluate(pairs[::-1], source)
    assert set(seen) == before
    evaluator().evaluate(pairs, SystemSource(System(), seed=2))
    assert len(seen) == 6


def test_no_pairs_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="data set 'toys' has no images"):
        evaluator().evaluate([], BicubicSource(), "toys")


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_the_batch_changes_nothing(batch: int, pairs: list[Pair], tmp_path: Path) -> None:
    small = tmp_path / "small.png"
    save_image(small, torch.rand(3, 20, 24))
    mixed = [*pairs, ("odd", small, None), ("gone", tmp_path / "gone.png", None)]
    wanted = evaluator("psnr", "ssim", "entropy").evaluate(mixed, BicubicSource())
    judge = Evaluator(PROTOCOLS["varestorer"], ["psnr", "ssim", "entropy"], offline=True, batch=batch)
    found = judge.evaluate(mixed, BicubicSource())
    assert [(row.name, row.scores) for row in found.rows] == [(row.name, row.scores) for row in wanted.rows]
    assert [len(row.scores) for row in found.rows] == [3, 3, 3, 1, 0]


def test_a_batch_that_fails_is_scored_one_by_one() -> None:
    def picky(image: Tensor, reference: Tensor) -> Tensor:
        if image.mean() > 0.5:
            raise RuntimeError("too bright")
        return image.mean(dim=(1, 2, 3))

    judge = evaluator("psnr")
    judge.metrics = {"psnr": Metric("psnr", picky, True, False)}
    dark, bright = torch.zeros(3, 8, 8), torch.ones(3, 8, 8)
    scores = judge.score_batch([dark, bright, bright], [dark] * 3)
    assert [one.values for one in scores] == [{"psnr": 0}, {}, {}]
    assert scores[1].errors == {"psnr": "too bright"}


def test_a_source_beside_the_scoring_gives_the_same_rows(pairs: list[Pair]) -> None:
    class Beside(BicubicSource):
        runs_ahead = True
        threads: ClassVar[set[str]] = set()

        def __call__(self, name: str, lq_path: Path) -> Candidate:
            self.threads.add(threading.current_thread().name)
            if name == "b":
                raise UserError("broken, truly")
            return super().__call__(name, lq_path)

    found = evaluator().evaluate(pairs, Beside())
    assert Beside.threads == {"ahead_0"} and found.failures == ["b: broken, truly"]
    wanted = {row.name: row.scores for row in evaluator().evaluate(pairs, BicubicSource()).rows}
    assert {row.name: row.scores for row in found.rows} == wanted | {"b": {}}


def test_unavailable_metrics_are_listed_and_never_invented(
    pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    judge = Evaluator(PROTOCOLS["varestorer"], offline=True)
    assert set(judge.metrics) == {"psnr", "ssim"}
    summary = judge.evaluate(pairs, BicubicSource()).summary()
    wanted = {"lpips", "maniqa", "musiq", "niqe", "clipiqa", "liqe", "qalign", "fid"}
    assert set(summary["unavailable"]) == wanted and set(summary["metrics"]) == {"psnr", "ssim"}
    assert "musiq_koniq_ckpt" in summary["unavailable"]["musiq"]


def test_metric_of_the_whole_set_sees_just_the_scored_images(pairs: list[Pair], tmp_path: Path) -> None:
    judge = evaluator("psnr")
    names: list[list[str]] = []

    def fid(images: str, references: str, **kwargs: object) -> float:
        for folder in (images, references):
            names.append(sorted(path.resolve().name for path in Path(folder).iterdir()))
        return 12.5

    judge.metrics["fid"] = Metric("fid", fid, False, True, weights="abc")
    made = tmp_path / "made"
    for name in ("a", "b", "unrelated"):
        save_image(made / f"{name}.png", torch.rand(3, 48, 64))
    result = judge.evaluate(pairs, FolderSource(made))
    assert names == [["a.png", "b.png"], ["a.png", "b.png"]]  # c has no prediction
    entry = {"mean": 12.5, "std": None, "ci95": None, "worst_tenth": None, "n": 2, "id": "fid", "weights_sha256": "abc"}
    assert result.summary()["metrics"]["fid"] == entry
    del judge.metrics["psnr"]
    assert judge.evaluate(pairs, FolderSource(made)).summary()["n"] == 2

    def broken(*args: object, **kwargs: object) -> float:
        raise RuntimeError("too few images")

    judge.metrics["fid"] = Metric("fid", broken, False, True)
    result = judge.evaluate(pairs, FolderSource(made))
    assert "too few images" in result.summary()["unavailable"]["fid"]


def test_metric_of_the_whole_set_sees_the_pixels_that_the_others_see(tmp_path: Path) -> None:
    """Turned by EXIF, 16 bit, floating, palette with a key, a format that pyiqa does not list."""
    colors = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(to_uint8(colors).permute(1, 2, 0).numpy())
    gray = np.asarray(image.convert("L"))
    exif = Image.Exif()
    exif[0x112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray((gray / 255).astype(np.float32)).save(tmp_path / "float.tif")
    image.quantize(16).save(tmp_path / "palette.gif")
    image.save(tmp_path / "plain.png")
    files = [tmp_path / name for name in ("turned.jpg", "deep.png", "float.tif", "palette.gif", "plain.png")]
    pairs: list[Pair] = [(path.stem, path, path) for path in files]
    judge = evaluator("psnr")
    seen: list[list[np.ndarray]] = []

    def fid(*folders: str, **kwargs: object) -> float:
        for folder in folders:
            seen.append([np.asarray(Image.open(path).convert("RGB")) for path in scandir_images(folder)])
        return 0.0

    judge.metrics["fid"] = Metric("fid", fid, False, True)
    judge.evaluate(pairs, lambda name, lq: Candidate(load_image(lq), path=lq))
    for side in seen:
        for pixels, path in zip(side, files, strict=True):
            assert np.array_equal(pixels, to_uint8(load_image(path)).permute(1, 2, 0).numpy()), path


def small_evaluation(pairs: list[Pair]) -> Evaluation:
    def source(name: str, lq_path: Path) -> Candidate:
        if name == "b":
            raise UserError("broken, truly")
        return BicubicSource()(name, lq_path)

    return replace(evaluator().evaluate(pairs, source, "realsr"), unavailable={"lpips": "no weights"})


def test_records(pairs: list[Pair], tmp_path: Path) -> None:
    result = small_evaluation(pairs)
    files = write_records(result, tmp_path / "out", "ours")
    assert [path.name for path in files] == ["per_image.csv", "summary.json"]
    with files[0].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "psnr", "ssim", "seconds", "error"]
    assert [row["image"] for row in rows] == ["a", "b", "sub/c"]
    assert rows[1] == {"image": "b", "psnr": "", "ssim": "", "seconds": "", "error": "broken, truly"}
    assert float(rows[0]["psnr"]) == result.rows[0].scores["psnr"]
    assert json.loads(files[1].read_text()) == {"method": "ours"} | result.summary()


def test_references_are_rounded_to_eight_bits_too() -> None:
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    moved = image + 0.4 / 255 * (image < 0.9)
    assert evaluator("psnr").score(image, moved).values == evaluator("psnr").score(image, image).values


def test_seconds_per_image_are_the_mean() -> None:
    rows = tuple(Row(str(n), seconds=seconds) for n, seconds in enumerate((1.0, 1.0, None, 4.0)))
    assert Evaluation("set", "varestorer", {}, {}, rows, {}, {}).seconds_per_image == pytest.approx(2.0)
