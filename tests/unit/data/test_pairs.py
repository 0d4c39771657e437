"""Which names belong together, and which must not."""

import unicodedata
from pathlib import Path

import pytest

from varestorer.data.folders import Matching, match_names

CAFE = "caf\u00e9"


def match(low: list[str], high: list[str]) -> Matching:
    return match_names({name: Path("lr", name) for name in low}, {name: Path("hr", name) for name in high})


@pytest.mark.parametrize(
    ("low", "high", "name"),
    [
        ("0801x4", "0801", "0801"),
        ("0801X4", "0801", "0801"),
        ("0801x4m", "0801", "0801"),
        ("0801x4w", "0801", "0801"),
        ("0001x4w3", "0001", "0001"),
        ("0801x4d", "0801", "0801"),
        ("a_x4", "a", "a"),
        ("a-x4", "a", "a"),
        ("babyx16", "baby", "baby"),
        ("a_bicubic", "a", "a"),
        ("a_bicLRx4", "a", "a"),
        ("a_LR", "a", "a"),
        ("a", "a_gt", "a"),
        ("a", "a_x4", "a"),
        ("Canon_001_LR4", "Canon_001_HR", "Canon_001"),
        ("baby_LRBI_x4", "baby_HR_x4", "baby"),
        ("img_001_SRF_4_LR", "img_001_SRF_4_HR", "img_001_SRF_4"),
        ("bird_HR_x4", "bird_HR", "bird_HR"),
        ("box1x4", "box1", "box1"),
        ("sub/box1x4", "sub/box1", "sub/box1"),
        ("box1", "box1", "box1"),
        ("a_lq", "a_hq", "a"),
    ],
)
def test_usual_endings(low: str, high: str, name: str) -> None:
    assert match([low], [high]) == Matching([(name, Path("lr", low), Path("hr", high))])


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ("box1", "bo"),
        ("box1", "bo_HR1"),
        ("box1x4", "bo"),
        ("matrix2", "matri_x4y"),
        ("one/ax4", "two/a"),
        ("x4", ""),
        ("color", "co"),
    ],
)
def test_other_names_stay_alone(low: str, high: str) -> None:
    matching = match([low], [high])
    assert not matching.pairs and not matching.ambiguous and len(matching.unpaired) == 2


def test_names_that_end_in_such_letters_are_not_cut() -> None:
    names = ["box1", "box2", "matrix2", "matrix4"]
    assert [name for name, _, _ in match(names, names).pairs] == names
    matching = match([f"{name}x4" for name in names], names)
    assert [(name, low.name) for name, low, _ in matching.pairs] == [(name, f"{name}x4") for name in names]


def test_a_scale_after_a_letter_is_an_ending_only_where_all_have_it() -> None:
    assert [name for name, _, _ in match(["babyx4", "birdx4"], ["baby", "bird"]).pairs] == ["baby", "bird"]
    matching = match(["0801x2", "matrix2", "other"], ["0801", "matri", "other"])
    assert [name for name, _, _ in matching.pairs] == ["0801", "other"] and len(matching.unpaired) == 2


def test_equal_names_come_first() -> None:
    matching = match(["a", "ax4", "b_LR4"], ["a", "b_HR"])
    assert [(name, low.name) for name, low, _ in matching.pairs] == [("a", "a"), ("b", "b_LR4")]
    assert matching.unpaired == [Path("lr/ax4")]


@pytest.mark.parametrize(
    ("low", "high"),
    [(["0801x2", "0801x4"], ["0801"]), (["0001x4w1", "0001x4w2"], ["0001"]), (["a"], ["a_HR", "a_GT"])],
)
def test_where_several_could_be_meant_none_is_taken(low: list[str], high: list[str]) -> None:
    matching = match([*low, "other"], [*high, "other"])
    assert [name for name, _, _ in matching.pairs] == ["other"] and not matching.unpaired
    assert matching.ambiguous == [(*(Path("lr", name) for name in low), *(Path("hr", name) for name in sorted(high)))]


def test_no_two_pairs_get_one_name() -> None:
    matching = match(["a", "a_LR4"], ["a", "a_HR"])
    assert not matching.pairs and len(matching.ambiguous) == 1 and len(matching.ambiguous[0]) == 4


def test_accents_of_a_mac_are_those_of_linux(tmp_path: Path) -> None:
    from varestorer.data import find_pairs

    for side, form in (("lr", "NFD"), ("hr", "NFC")):
        (tmp_path / side).mkdir()
        (tmp_path / side / f"{unicodedata.normalize(form, CAFE)}.PNG").touch()
    assert [name for name, _, _ in find_pairs(tmp_path)] == [CAFE]
