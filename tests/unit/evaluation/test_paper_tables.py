"""The paper's tables from the records of evaluations."""

import json
from pathlib import Path

import pytest

from varestorer.evaluation.paper_tables import (
    StageRecord,
    SystemRecord,
    read_records,
    table_1,
    table_2,
    table_3,
    table_varsr,
)
from varestorer.evaluation.tables import Table
from varestorer.utils.errors import UsageError

SIZES = {"div2k": 3000, "drealsr": 93, "realsr": 100}


def save(folder: Path, dataset: str, protocol: str = "varestorer", n: int | None = None, **means: float) -> Path:
    entries = {name: {"mean": v, "std": 0.1, "n": 1, "id": name, "weights_sha256": None} for name, v in means.items()}
    summary = {
        "dataset": dataset,
        "protocol": protocol,
        "n": SIZES.get(dataset, 1) if n is None else n,
        "metrics": entries,
        "unavailable": {"fid": "no weights"},
    }
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def shown(table: Table, method: str, group: str = "") -> dict[str, tuple[str, str]]:
    """Column -> (text, mark) of one row."""
    names = [column.name for column in table.columns]
    lines = zip(table.rows, table.shown(), strict=True)
    cells = next(cells for row, cells in lines if (row.cells["method"], row.group) == (method, group))
    return {name: (cell.text, cell.mark) for name, cell in zip(names, cells, strict=True)}


def test_table_1_has_ten_metrics_and_three_sets(tmp_path: Path) -> None:
    real = save(tmp_path / "a", "realsr", psnr=30.0, musiq=71.3)
    div = save(tmp_path / "b", "div2k", lpips=0.1)
    table, *_ = table_1(read_records([f"ours={real}", f"ours={div}"]))
    assert [column.heading for column in table.columns] == [
        *("method", "psnr ↑", "ssim ↑", "lpips ↓", "maniqa ↑", "musiq ↑"),
        *("niqe ↓", "clipiqa ↑", "liqe ↑", "qalign ↑", "fid ↓"),
    ]
    assert [row.group for row in table.rows] == ["div2k"] * 9 + ["drealsr"] * 9 + ["realsr"] * 9
    ours = shown(table, "ours", "realsr")
    assert ours["psnr"] == ("30.00", "best") and ours["musiq"] == ("71.30", "second") and ours["fid"] == ("–", "")
    assert shown(table, "ours", "div2k")["lpips"] == ("0.1000", "best")
    assert {text for text, _ in list(shown(table, "ours", "drealsr").values())[1:]} == {"–"}
    assert shown(table, "PASD (20 steps)", "realsr")["psnr"] == ("24.83", "second")
    notes = "\n".join(table.notes)
    assert "ours has no evaluation on drealsr here." in notes and "ours on realsr lacks fid: no weights" in notes
    assert "ours on realsr was not scored by ssim, lpips, maniqa, niqe, clipiqa, liqe, qalign." in notes


def test_protocols_do_not_mix(tmp_path: Path) -> None:
    one, other = save(tmp_path / "a", "realsr"), save(tmp_path / "b", "div2k", "stablesr_y")
    with pytest.raises(UsageError) as caught:
        read_records([str(one), f"x={other}"])
    message = str(caught.value)
    assert str(one) in message and str(other) in message and "\n" not in message
    assert "varestorer" in message and "stablesr_y" in message


def test_table_1_under_another_protocol_has_no_published_rows(tmp_path: Path) -> None:
    table, *_ = table_1(read_records([str(save(tmp_path / "run", "realsr", "stablesr_y", psnr=25.15))]))
    assert {row.cells["method"] for row in table.rows} == {"run"}
    assert any("No rows were published under stablesr_y" in note for note in table.notes)


def test_varsr_stands_beside_what_was_published_under_its_protocol(tmp_path: Path) -> None:
    runs = [f"refined={save(tmp_path / 'a', 'realsr', 'varsr', lpips=0.3)}"]
    table, *_ = table_varsr(read_records([*runs, f"plain={save(tmp_path / 'b', 'realsr', 'varsr', lpips=0.4)}"]))
    assert {"refined", "plain", "VARSR", "H-VAR"} <= {row.cells["method"] for row in table.rows}
    assert "ablations" in table.title
    with pytest.raises(UsageError, match="is under protocol=varsr"):
        table_varsr(read_records([str(save(tmp_path / "c", "realsr"))]))


def test_our_methods_are_compared_image_by_image(tmp_path: Path) -> None:
    runs = []
    for name, shift in (("one", 0.0), ("two", 0.5)):
        folder = save(tmp_path / name, "realsr", psnr=30.0 + shift)
        lines = [f"{n}.png,{30 + n % 7 + shift * (n % 10 != 0)}" for n in range(100)]
        (folder / "per_image.csv").write_text("\n".join(["image,psnr", *lines]) + "\n")
        runs.append(f"{name}={folder}")
    table, pairs, *figures = table_1(read_records(runs))
    (row,) = pairs.rows
    assert (row.cells["methods"], row.cells["difference"], row.cells["images won"]) == (
        "one - two",
        "-0.4500",
        "0 of 100",
    )
    assert "≈" not in str(row.cells["95 %"])
    assert [figure.title for figure in figures] == ["Figures of one on realsr", "Figures of two on realsr"]
    assert figures[0].rows[0].cells["mean"] == "30.0000" and "fid is not available: no weights" in figures[0].notes


def test_means_over_a_part_of_the_set_compete_for_no_mark(tmp_path: Path) -> None:
    table, *_ = table_1(read_records([f"ours={save(tmp_path / 'a', 'realsr', n=7, psnr=90.0)}"]))
    assert shown(table, "ours", "realsr")["psnr"] == ("90.00", "")
    assert any("7 of 100 images" in note for note in table.notes)


def test_the_same_name_twice_is_refused(tmp_path: Path) -> None:
    runs = [f"ours={save(tmp_path / name, 'realsr')}" for name in "ab"]
    with pytest.raises(UsageError, match="are both ours on realsr"):
        read_records(runs)


@pytest.mark.parametrize("content", [None, "no json", "[]", '{"dataset": "x"}'])
def test_a_folder_without_a_summary_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UsageError, match=rf"{tmp_path} has no summary\.json .* give its out= folder"):
        read_records([str(tmp_path)])


def test_a_folder_may_have_an_equals_sign_in_its_name(tmp_path: Path) -> None:
    folder = save(tmp_path / "lr=1", "realsr")
    assert [record.label for record in read_records([str(folder), f"a={folder}"])] == ["lr=1", "a"]


def test_table_3_puts_ablations_beside_the_published(tmp_path: Path) -> None:
    run = save(tmp_path / "a", "div2k", lpips=0.2, musiq=70.0, niqe=4.41, clipiqa=0.5, psnr=1.0)
    table, *_ = table_3(read_records([f"w/o KL (ours)={run}"]))
    assert [row.cells["method"] for row in table.rows][:4] == ["w/o distill", "w/o cross-scale", "w/o KL", "VARestorer"]
    ours = shown(table, "w/o KL (ours)")
    assert ours["lpips"] == ("0.2000", "best") and ours["musiq"] == ("70.00", "second")
    assert ours["niqe"] == shown(table, "VARestorer")["niqe"] == ("4.410", "second")
    with pytest.raises(UsageError, match="table 3 is on div2k under varestorer, and .* is on realsr under varestorer"):
        table_3(read_records([str(save(tmp_path / "b", "realsr"))]))


SYSTEM = SystemRecord(
    "mine",
    64,
    num_trained=319_488,
    stages={
        "VAE encoder": StageRecord(1_000_000, 2 * 10**9, 0.2),
        "transformer": StageRecord(2_000_000, 10**9, 0.1),
    },
    seconds=0.5,
    peak_bytes=10**9,
    where="on a machine",
)


def test_table_2_shows_ours_as_a_whole_and_by_stage(tmp_path: Path) -> None:
    run = save(tmp_path / "a", "div2k", maniqa=0.4, musiq=70.0)
    beside, stages = table_2([SYSTEM], read_records([f"mine={run}"]))
    ours = {name: text for name, (text, _) in shown(beside, "mine").items()}
    assert ours == {
        "method": "mine",
        "trainable (M)": "0.3195",
        "total (M)": "3.000",
        "side (px)": "64",
        "GFLOPs": "3.000",
        "seconds": "0.5000",
        "peak (GB)": "1.000",
        "maniqa": "0.4000",
        "musiq": "70.00",
        "source": "this run",
    }
    assert shown(beside, "VARestorer")["GFLOPs"] == ("1536", "") and shown(beside, "VARSR")["GFLOPs"] == ("–", "")
    assert [row.cells["stage"] for row in stages.rows] == ["VAE encoder", "transformer"]
    assert any("1,536 G cannot be" in note for note in beside.notes) and "mine: on a machine." in stages.notes


def test_table_2_has_dashes_for_what_was_not_timed() -> None:
    record = SystemRecord("mine", 64, 1, SYSTEM.stages)
    beside, stages = table_2([record])
    ours = shown(beside, "mine")
    assert {ours[name][0] for name in ("seconds", "peak (GB)", "maniqa", "musiq")} == {"–"}
    assert "mine was not timed here." in stages.notes


def test_table_2_takes_scores_of_its_own_networks_only(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is other on div2k under varestorer"):
        table_2([SYSTEM], read_records([f"other={save(tmp_path / 'a', 'div2k')}"]))


def test_the_sentence_on_the_published_operations_adds_up() -> None:
    width, depth = 2048, 32

    def macs(tokens: int) -> float:
        return depth * (14 * width**2 * tokens + 2 * tokens**2 * width)

    assert depth * 14 * width**2 / 1e9 == pytest.approx(1.88, abs=5e-3)
    assert macs(3545) / 1e12 == pytest.approx(8.3, abs=0.05) and 2 * macs(3545) / 1e12 == pytest.approx(16.6, abs=0.05)
    assert 2 * macs(2521) / 1e12 == pytest.approx(11.1, abs=0.05)
