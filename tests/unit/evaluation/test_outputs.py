"""What an evaluation leaves to be read: its table, its picture page, its plot, its wandb run."""

import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from varestorer.evaluation.outputs import (
    MAX_PICTURES,
    comparison_table,
    log_evaluation,
    plane,
    record_of,
    spread,
    write_gallery,
    write_report,
    write_scatter,
)
from varestorer.evaluation.paper_tables import figures_table
from varestorer.evaluation.pictures import detailed_crops
from varestorer.evaluation.results import Evaluation, Row
from varestorer.evaluation.tables import TableRow
from varestorer.utils.images import load_image, resize, save_image
from varestorer.utils.iqa import Metric, metric_config
from varestorer.utils.loggers import WandbLogger, open_loggers, open_wandb

LOWER = {"psnr": False, "lpips": True, "niqe": True, "musiq": False}


def evaluation(rows: tuple[Row, ...], *names: str, dataset: str = "realsr") -> Evaluation:
    metrics = {name: Metric(name, None, True, LOWER[name], weights="ab" * 32) for name in names}
    columns = {name: LOWER[name] for name in (*names, "musiq")}
    return Evaluation(dataset, "varestorer", columns, metrics, rows, {}, {"musiq": "no <weights>"})


def ours(rows: tuple[Row, ...], *names: str, expected: int | None = None) -> dict[str, str]:
    table = comparison_table({"ours": evaluation(rows, *names)}, expected)
    return dict(zip([column.name for column in table.columns], [cell.mark for cell in table.shown()[-1]], strict=True))


def test_our_row_competes_with_published_ones() -> None:
    rows = (Row("a", {"psnr": 30.0, "lpips": 0.27}), Row("b", {"psnr": 40.0, "lpips": 0.2718}))
    marks = ours(rows, "psnr", "lpips")
    assert marks == {"method": "", "psnr": "best", "lpips": "second", "musiq": "", "source": ""}  # 0.2709, as PASD has
    table = comparison_table({"ours": evaluation(rows, "psnr", "lpips")})
    assert table.rows[-1].cells["psnr"] == 35.0 and "musiq" not in table.rows[-1].cells
    assert [row.is_ours for row in table.rows].count(True) == 1 and len(table.rows) == 8 + 3 + 1


def test_means_over_other_images_win_nothing() -> None:
    rows = (Row("a", {"psnr": 99.0}),)
    assert ours(rows, "psnr", expected=1)["psnr"] == "best"
    assert ours(rows, "psnr", expected=100)["psnr"] == ""
    notes = comparison_table({"ours": evaluation(rows, "psnr")}, 100).notes
    assert any("means over 100 images: not comparable" in note for note in notes)


def test_figures_rest_on_spread_number_and_weights() -> None:
    rows = (Row("a", {"psnr": 30.0}), Row("b", {"psnr": 40.0}), Row("c", errors=("broken",)))
    table = figures_table(record_of("ours", evaluation(rows, "psnr")))
    wanted = ["psnr", "35.0000", "30.0000 to 40.0000", "5.0000", "30.0000", "2", "psnr", "ab" * 8]
    assert [cell.text for cell in table.shown()[0]] == wanted
    assert table.notes == ("musiq is not available: no <weights>",)


@pytest.fixture
def scored(tmp_path: Path) -> tuple[Row, ...]:
    """Two scored images: restored ones in `out/images`, the others elsewhere; and one that failed."""
    rows = []
    for number, name in enumerate(("a b#1", "sub/c")):
        hq = torch.rand(3, 128, 96, generator=torch.Generator().manual_seed(number))
        files = [tmp_path / side / f"{name}.png" for side in ("lr", "out/images", "hr")]
        for path, image in zip(files, (resize(hq, (32, 24)), hq * 0.9, hq), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(path, image)
        scores = {"psnr": 20.0 + number, "lpips": 0.3, "niqe": 5.0}
        rows.append(Row(name, scores, image=files[1], reference=files[2], lq=files[0]))
    return (*rows, Row("broken", errors=("no prediction",), reference=rows[0].reference, lq=rows[0].lq))


def sources(page: Path) -> list[str]:
    return re.findall(r'src="([^"]*)"', page.read_text(encoding="utf-8"))


def decoded(url: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(b64decode(url.split(",")[1]))))


def test_gallery_opens_from_its_folder(scored: tuple[Row, ...], tmp_path: Path) -> None:
    page = write_gallery({"ours <1>": evaluation(scored, "psnr")}, tmp_path / "out")
    assert page is not None
    links = [unquote(url) for url in sources(page) if not url.startswith("data:")]
    assert links == [
        *("gallery/a b#1_lq.png", "images/a b#1.png", "gallery/a b#1_hq.png"),
        *("gallery/sub/c_lq.png", "images/sub/c.png", "gallery/sub/c_hq.png"),
    ]
    assert all((tmp_path / "out" / link).is_file() for link in links)
    text = page.read_text(encoding="utf-8")
    assert "ours &lt;1&gt;" in text and "psnr 20.00" in text and "2 of 3 images" in text and "broken" not in text
    assert not re.search(r"https?://|<script src|<link|@import", text)


def test_crops_show_the_same_place_of_every_column(scored: tuple[Row, ...], tmp_path: Path) -> None:
    page = write_gallery({"ours": evaluation(scored[:1], "psnr")}, tmp_path / "out")
    assert page is not None
    lq, restored, hq = (decoded(url) for url in [url for url in sources(page) if url.startswith("data:")][::2])
    assert lq.shape == restored.shape == hq.shape == (216, 216, 3)
    assert np.abs(hq * 0.9 - restored).max() <= 1.0
    zoom = 216 // 24
    assert (lq.reshape(6, 4 * zoom, 6, 4 * zoom, 3) == lq[:: 4 * zoom, None, :: 4 * zoom, None]).all()
    assert len({row.tobytes() for row in hq[::zoom]}) == 24  # every pixel of the reference is there


def test_gallery_without_references_shows_two_columns(scored: tuple[Row, ...], tmp_path: Path) -> None:
    rows = tuple(Row(row.name, image=row.image, lq=row.lq) for row in scored)
    page = write_gallery({"ours": evaluation(rows, "psnr")}, tmp_path / "out")
    assert page is not None
    assert re.findall("<figcaption>(.*?)</figcaption>", page.read_text(encoding="utf-8")) == ["LQ", "ours"] * 2


def test_methods_stand_side_by_side_with_the_same_crops_where_they_differ(
    scored: tuple[Row, ...], tmp_path: Path
) -> None:
    row = scored[0]
    changed = load_image(str(row.image))
    changed[:, 96:120, 64:88] = 0  # 24 pixels, the side of a crop of 96 x 128
    save_image(tmp_path / "other.png", changed)
    other = Row(row.name, {"psnr": 9.0}, image=tmp_path / "other.png", reference=row.reference, lq=row.lq)
    methods = {"ours": evaluation(scored, "psnr"), "other": evaluation((other,), "psnr")}
    page = write_gallery(methods, tmp_path / "out")
    assert page is not None
    text = page.read_text(encoding="utf-8")
    assert re.findall("<figcaption>(.*?)</figcaption>", text) == ["LQ", "ours", "other", "HQ"]  # of what both have
    crops = [decoded(url) for url in sources(page) if url.startswith("data:")]
    black = [float((crop == 0).all(axis=2).mean()) for crop in crops]
    assert len(crops) == 8 and max(black[4:6]) > 0.4 and max(black[:4] + black[6:]) < 0.01
    assert (tmp_path / "out/gallery/a b#1_restored1.png").is_file() and "psnr 9.000" in text
    table = comparison_table(methods)
    assert [line.cells["method"] for line in table.rows[-2:]] == ["ours", "other"]


def test_formats_that_browsers_do_not_show_become_png(scored: tuple[Row, ...], tmp_path: Path) -> None:
    tif = tmp_path / "hr" / "a.tif"
    Image.open(str(scored[0].reference)).save(tif)
    row = Row("a", image=tif, lq=scored[0].lq)
    page = write_gallery({"ours": evaluation((row,), "psnr")}, tmp_path / "out")
    assert page is not None and "gallery/a_restored.png" in sources(page)
    assert Image.open(tmp_path / "out/gallery/a_restored.png").format == "PNG"


def test_many_images_are_spread_evenly() -> None:
    rows = [Row(str(number)) for number in range(3000)]
    assert [row.name for row in spread(rows, 3)] == ["0", "1000", "2000"]
    assert len(spread(rows, MAX_PICTURES)) == MAX_PICTURES and spread(rows[:2], 3) == rows[:2]


def test_crops_are_where_the_detail_is_and_apart() -> None:
    image = torch.zeros(3, 200, 300)
    for top, left, contrast in ((100, 200, 1.0), (20, 20, 0.5)):
        noise = torch.rand(3, 50, 50, generator=torch.Generator().manual_seed(0))
        image[:, top : top + 50, left : left + 50] = contrast * noise
    found = detailed_crops(image, 2, multiple=4)
    assert all(abs(crop.top - top) <= 12 for crop, top in zip(found, (100, 20), strict=True))
    assert all(abs(crop.left - left) <= 12 for crop, left in zip(found, (200, 20), strict=True))
    assert all(value % 4 == 0 for crop in found for value in (crop.top, crop.left, crop.side))
    for size in ((16, 16), (24, 500), (64, 64), (3, 3)):
        for crop in detailed_crops(torch.rand(3, *size), 3):
            assert crop.top + crop.side <= size[0] and crop.left + crop.side <= size[1]


def row(is_ours: bool = False, **scores: float) -> TableRow:
    return TableRow({"method": "m", **scores}, is_ours=is_ours)


def test_plane_needs_ours_and_another_method() -> None:
    assert plane([row(psnr=1.0, niqe=1.0), row(True, psnr=2.0, niqe=2.0)]) == ("psnr", "niqe")
    assert plane([row(lpips=1.0, musiq=1.0), row(True, psnr=2.0, lpips=1.0, musiq=2.0)]) == ("lpips", "musiq")
    assert plane([row(psnr=1.0), row(True, psnr=2.0, niqe=2.0)]) is None
    assert plane([row(psnr=1.0, niqe=1.0), row(psnr=2.0, niqe=2.0), row(True, psnr=1.0)]) is None


@pytest.mark.parametrize(
    ("across", "up", "inverted"),
    [
        ("psnr", "niqe", (False, True)),
        ("psnr", "musiq", (False, False)),
        ("lpips", "niqe", (True, True)),
        ("lpips", "clipiqa", (True, False)),
    ],
)
def test_better_is_right_and_up(
    across: str, up: str, inverted: tuple[bool, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: drawn.append(self) or path.touch())
    rows = [row(**{across: 1.0, up: 1.0}), row(True, **{across: 2.0, up: 3.0})]
    lower = {name: bool(metric_config(name).get("lower_better", False)) for name in (across, up)}
    assert write_scatter(tmp_path / "scatter.png", rows, lower, "title") == (across, up)
    (axes,) = drawn[0].axes
    assert (axes.xaxis_inverted(), axes.yaxis_inverted()) == inverted
    assert axes.get_xlabel().startswith(across) and axes.get_ylabel().startswith(up)


def test_report_writes_all_files(scored: tuple[Row, ...], tmp_path: Path) -> None:
    files = write_report({"ours": evaluation(scored, "psnr", "lpips", "niqe")}, tmp_path / "out")
    names = ["table.md", "table.tex", "table.html", "gallery.html", "scatter.png"]
    assert [path.name for path in files] == names and all(path.is_file() for path in files)
    assert Image.open(tmp_path / "out" / "scatter.png").width > 500


def test_means_over_other_images_are_not_plotted_beside_the_published(
    scored: tuple[Row, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        files = write_report({"ours": evaluation(scored, "psnr", "niqe")}, tmp_path / "out", expected_pairs=100)
    assert "scatter.png" not in [path.name for path in files] and "no scatter.png" in caplog.text


def test_report_leaves_out_what_has_nothing_to_show(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        files = write_report({"ours": evaluation((Row("a", {"psnr": 30.0}),), "psnr", dataset="folder")}, tmp_path)
    assert [path.name for path in files] == ["table.md", "table.tex", "table.html"]
    assert "no gallery.html" in caplog.text and "no scatter.png" in caplog.text


def test_wandb_gets_means_and_images(scored: tuple[Row, ...]) -> None:
    logged: dict[str, object] = {}

    class Run:
        def log(self, values: dict[str, object]) -> None:
            logged.update(values)

        def finish(self) -> None:
            logged["finished"] = True

    log_evaluation(evaluation(scored, "psnr"), "ours", WandbLogger(Run()))
    table = logged.pop("eval/realsr/images")
    assert logged == {"eval/realsr/psnr": 20.5, "finished": True}
    assert table.columns == ["image", "LQ", "ours", "HQ", "psnr"]  # type: ignore[attr-defined]
    assert [line[0] for line in table.data] == ["a b#1", "sub/c"]  # type: ignore[attr-defined]


def test_evaluation_goes_on_when_wandb_cannot_start(
    scored: tuple[Row, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    log_evaluation(evaluation(scored, "psnr"), "ours", open_loggers({"wandb": open_wandb}, tmp_path / "out", {}))
    assert "wandb could not start" in caplog.text
