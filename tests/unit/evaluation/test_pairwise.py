"""The blind page of pairs, and the table of what raters answered."""

import json
import re
from base64 import b64decode
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from varestorer.evaluation.pairwise import (
    Study,
    preference_tables,
    read_answers,
    read_study,
    write_pairwise,
)
from varestorer.evaluation.results import Evaluation, Row
from varestorer.utils.errors import UsageError
from varestorer.utils.images import load_image, resize, save_image


def evaluation(folder: Path, names: str, level: float) -> Evaluation:
    """Gray images of a level, of noise in LQ."""
    rows = []
    for name in names:
        save_image(folder / f"{name}.png", torch.full((3, 64, 48), level))
        save_image(folder / "lq" / f"{name}.png", torch.rand(3, 16, 12))
        rows.append(Row(name, image=folder / f"{name}.png", lq=folder / "lq" / f"{name}.png"))
    return Evaluation("set", "varestorer", {}, {}, tuple(rows), {}, {})


def test_the_page_shows_two_methods_and_names_neither(tmp_path: Path) -> None:
    methods = {"secret": evaluation(tmp_path / "1", "ab", 0.2), "rival": evaluation(tmp_path / "2", "ab", 0.8)}
    page, key = write_pairwise(methods, tmp_path / "out")
    text = page.read_text(encoding="utf-8")
    assert not re.search("secret|rival|/1/|/2/", text) and not re.search(r"https?://|<link", text)
    pictures = json.loads(re.search(r"pictures = (\[.*?\]), trials", text)[1])  # type: ignore[index]
    shown = [[np.asarray(Image.open(BytesIO(b64decode(u.split(",")[1])))) for u in p["methods"]] for p in pictures]
    assert [[int(square.mean()) for square in squares] for squares in shown] == [[51, 204], [51, 204]]
    assert shown[0][0].shape == (48, 48, 3)  # the largest square
    lq = np.asarray(Image.open(BytesIO(b64decode(pictures[0]["input"].split(",")[1]))))
    assert lq.shape == (12, 12, 3)
    study = read_study(str(tmp_path / "out"))
    assert study.name == json.loads(key.read_text())["study"] and f'study = "{study.name}"' in text
    assert study.trials == [("a", ("secret", "rival")), ("b", ("secret", "rival"))]


@pytest.fixture
def answers(tmp_path: Path) -> Callable[..., str]:
    def write(name: str, *chosen: int | None, study: str = "s") -> str:
        given = [{"trial": number, "chosen": one, "left": 0, "seconds": 1.0} for number, one in enumerate(chosen)]
        (tmp_path / name).write_text(json.dumps({"study": study, "answers": given}))
        return str(tmp_path / name)

    return write


STUDY = Study("s", [(image, pair) for image in "ab" for pair in (("x", "y"), ("x", "z"), ("y", "z"))])


def test_answers_become_win_rates(answers: Callable[..., str]) -> None:
    files = [answers("1.json", 0, 0, None, 0, 0, 1), answers("2.json", 0, 1, None, 0, 0, 1)]
    overall, duels = preference_tables(STUDY, read_answers(STUDY, files))
    # x beats y always, z thrice of four; y and z are level on image a, and z wins on b
    rates = {line.cells["method"]: line.cells["win rate"] for line in overall.rows}
    assert rates == {"x": "0.875", "y": "0.125", "z": "0.500"}
    assert [line.cells["comparisons"] for line in overall.rows] == [8, 8, 8]
    assert overall.rows[0].cells["95 %"] == "0.750 to 1.000"
    first, second, third = (line.cells for line in duels.rows)
    assert (first["methods"], first["won"], first["lost"], first["win rate"]) == ("x - y", 4, 0, "1.000")
    assert (second["won"], second["lost"], second["win rate"]) == (3, 1, "0.750")
    assert (third["won"], third["no difference"], third["lost"], third["win rate"]) == (0, 2, 2, "0.250")
    assert third["95 %"] == "0.000 to 0.500 ≈"
    assert "2 raters, 2 images, 12 answers" in overall.notes[0]
    assert overall.notes[1] == "The left picture was chosen in 70% of 10 choices."


def test_answers_that_do_not_belong_are_refused(answers: Callable[..., str], tmp_path: Path) -> None:
    good = answers("1.json", 0, 1)
    (tmp_path / "broken.json").write_text("{")
    for files, message in [
        ([answers("2.json", 0, study="t")], "belongs to another pairwise.html"),
        ([good, answers("3.json", 0, 1)], "holds just what another file does"),
        ([answers("4.json", 2)], "0, 1 and null"),
        ([answers("5.json")], "it holds no answers"),
        ([answers("6.json", *[0] * 7)], "answers what was not asked"),
        ([str(tmp_path / "broken.json")], "broken.json cannot be read"),
        ([], "answers= is missing"),
    ]:
        with pytest.raises(UsageError, match=message):
            read_answers(STUDY, files)
    with pytest.raises(UsageError, match="pairwise.json cannot be read"):
        read_study(str(tmp_path))


def test_large_pictures_show_the_square_where_methods_differ(tmp_path: Path) -> None:
    methods = {"one": evaluation(tmp_path / "1", "a", 0.5), "two": evaluation(tmp_path / "2", "a", 0.5)}
    image = torch.full((3, 520, 1200), 0.5)
    for rows in (evaluated.rows for evaluated in methods.values()):
        save_image(rows[0].image, image)  # type: ignore[arg-type]
        save_image(rows[0].lq, resize(image, (130, 300)))  # type: ignore[arg-type]
    changed = load_image(tmp_path / "2" / "a.png")
    changed[:, :, 1160:1170] = 1
    save_image(tmp_path / "2" / "a.png", changed)
    page, _ = write_pairwise(methods, tmp_path / "out")
    pictures = json.loads(re.search(r"pictures = (\[.*?\]), trials", page.read_text())[1])  # type: ignore[index]
    one, two = (np.asarray(Image.open(BytesIO(b64decode(u.split(",")[1])))) for u in pictures[0]["methods"])
    assert one.shape == two.shape == (512, 512, 3) and (one != two).any()
