import unicodedata
from pathlib import Path

import pytest

from varestorer.data import embedded_photographs, find_pairs, hq_images
from varestorer.data.datasets import embedded_paths
from varestorer.data.folders import Matching, find_images_or_pairs, hq_folder, list_test_set, match_names
from varestorer.utils.errors import UserError


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def relative(paths, root):
    return [path.relative_to(root).as_posix() for path in paths]


def test_a_folder_of_images_is_taken_whole(tmp_path):
    touch(tmp_path, "b.png", "sub/a.jpg", "readme.txt")
    assert relative(hq_images(tmp_path), tmp_path) == ["b.png", "sub/a.jpg"]


@pytest.mark.parametrize("side", ["hr", "HQ", "gt", "test_HR", "DIV2K_train_HR"])
def test_only_the_good_side_is_taken(tmp_path, side):
    touch(tmp_path, f"{side}/a.png", "test_LR/a.png", "lq/b.png", "masks/c.png")
    assert relative(hq_images(tmp_path), tmp_path) == [f"{side}/a.png"]


def test_training_side_before_validation_side(tmp_path):
    touch(tmp_path, "DIV2K_valid_HR/a.png", "DIV2K_train_HR/b.png")
    assert relative(hq_images(tmp_path), tmp_path) == ["DIV2K_train_HR/b.png"]


def test_held_out_pictures_are_of_the_validation_side(tmp_path):
    touch(tmp_path, "DIV2K_valid_HR/a.png", "DIV2K_train_HR/b.png")
    assert relative(hq_images(tmp_path, split="test"), tmp_path) == ["DIV2K_valid_HR/a.png"]


def test_what_is_taken_and_what_is_not_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    touch(tmp_path, "DIV2K_valid_HR/a.png", "DIV2K_train_HR/b.png", "masks/c.png", "d.png")
    assert hq_images(tmp_path)
    assert "taken are the images in DIV2K_train_HR; not taken: DIV2K_valid_HR, masks, 1 images beside" in caplog.text
    caplog.clear()
    touch(tmp_path, "one/hr/a.png", "one/hr/sub/b.png")
    assert len(hq_images(tmp_path / "one")) == 2 and not caplog.text


def test_a_country_is_no_side(tmp_path, caplog):
    touch(tmp_path, *(f"{country}/1.png" for country in ("at", "de", "gt", "hr", "it")))
    assert len(hq_images(tmp_path)) == 5 and hq_folder(tmp_path) == tmp_path
    assert "all of its images are taken, those in gt, hr as well" in caplog.text
    assert len(find_images_or_pairs(tmp_path)) == 5


def test_several_good_sides_are_trained_on_together(tmp_path):
    touch(tmp_path, "DIV2K_train_HR/a.png", "Flickr2K_HR/b.png", "DIV2K_valid_HR/c.png", "lr/a.png")
    assert relative(hq_images(tmp_path), tmp_path) == ["DIV2K_train_HR/a.png", "Flickr2K_HR/b.png"]
    assert hq_folder(tmp_path) == tmp_path


def test_train_and_test_folders_in_the_sides(tmp_path):
    touch(tmp_path, *(f"{side}/{split}/{split}.png" for split in ("train", "test") for side in ("LR", "HR")))
    assert relative(hq_images(tmp_path), tmp_path) == ["HR/train/train.png"]
    assert [name for name, _, _ in find_pairs(tmp_path, split="train")] == ["train"]
    assert [name for name, _, _ in find_pairs(tmp_path)] == ["test"]


def test_sides_in_train_and_test_folders(tmp_path):
    touch(tmp_path, *(f"{split}/{side}/{split}.png" for split in ("train", "test") for side in ("lq", "gt")))
    assert relative(hq_images(tmp_path), tmp_path) == ["train/gt/train.png"]
    assert [name for name, _, _ in find_pairs(tmp_path)] == ["test"]
    assert [name for name, _, _ in find_pairs(tmp_path, split="train")] == ["train"]


DIV2K = "DIV2K_train_HR DIV2K_valid_HR DIV2K_train_LR_bicubic DIV2K_valid_LR_bicubic"


@pytest.mark.parametrize(
    ("sides", "low", "high"),
    [
        ("train_LR train_HR test_LR test_HR", "test_LR", "test_HR"),
        (DIV2K, "DIV2K_valid_LR_bicubic", "DIV2K_valid_HR"),
        ("DIV2K_train_HR DIV2K_valid_HR DIV2K_valid_LR_wild", "DIV2K_valid_LR_wild", "DIV2K_valid_HR"),
        ("input target", "input", "target"),
        ("LRbicx4 GTmod12", "LRbicx4", "GTmod12"),
        ("test_LR hr", "test_LR", "hr"),
        ("val_lq test_lq val_gt test_gt", "test_lq", "test_gt"),
        ("lr/train lr/test hr/train hr/test", "lr/test", "hr/test"),
    ],
)
def test_evaluation_takes_the_test_side(tmp_path, sides, low, high):
    touch(tmp_path, *(f"{side}/a.png" for side in sides.split()))
    assert find_pairs(tmp_path) == [("a", tmp_path / low / "a.png", tmp_path / high / "a.png")]


@pytest.mark.parametrize(
    ("sides", "named"),
    [
        ("lr hr gt", "gt, hr"),
        ("lr lq hr", "lq, lr"),
        ("lr hr test_HR", "hr, test_HR"),
        ("train_HR valid_HR train_LR", "train_LR, train_HR, valid_HR"),
        ("lr hr test_LR test_HR", "lr, test_LR"),
        ("train_HR train_LR hr lr", "lr, train_LR"),
        ("test_LR train_HR", "test_LR, train_HR"),
        ("lr train_HR test_HR", "train_HR, test_HR|test_HR, train_HR"),
        ("A_test_LR B_test_LR A_test_HR B_test_HR", "A_test_LR, B_test_LR"),
        ("valid_HR valid_LR_bicubic valid_LR_unknown", "valid_LR_bicubic, valid_LR_unknown"),
        ("hr lr/X2 lr/X4", "lr/X2, lr/X4"),
    ],
)
def test_where_the_side_is_not_certain_the_candidates_are_named(tmp_path, sides, named):
    touch(tmp_path, *(f"{side}/a.png" for side in sides.split()))
    for find in (find_pairs, find_images_or_pairs):
        with pytest.raises(UserError, match=f"which of ({named}) is meant is not certain; give a folder"):
            find(tmp_path)


def test_a_link_to_a_side_is_no_other_side(tmp_path):
    touch(tmp_path, "lr/a.png", "hr/a.png")
    (tmp_path / "gt").symlink_to(tmp_path / "hr")
    assert [name for name, _, _ in find_pairs(tmp_path)] == ["a"]


def test_the_folder_of_the_scale_is_no_part_of_the_names(tmp_path):
    touch(tmp_path, "DIV2K_valid_LR_bicubic/X4/0801x4.png", "DIV2K_valid_HR/0801.PNG")
    assert [name for name, _, _ in find_pairs(tmp_path)] == ["0801"]


def test_pairs_in_doubt_are_named(tmp_path):
    touch(tmp_path, "lr/0801x2.png", "lr/0801x4.png", "hr/0801.png")
    with pytest.raises(UserError, match="not certain which of these belong together: .*0801x2.png, .*0801x4.png"):
        find_pairs(tmp_path)


def test_names_that_only_look_like_a_side(tmp_path):
    touch(tmp_path, "chr/a.png", "armchair/b.png")
    assert len(hq_images(tmp_path)) == 2


@pytest.mark.parametrize("root", ["gone", ""])
def test_missing_root_says_what_belongs_there(tmp_path, root):
    with pytest.raises(UserError, match="data.root=.*folder of images.*test_HR"):
        hq_images(tmp_path / root if root else "")


def test_root_without_images(tmp_path):
    touch(tmp_path, "notes.txt")
    with pytest.raises(UserError, match="holds no image"):
        hq_images(tmp_path)


@pytest.mark.parametrize(("low", "high"), [("lr", "hr"), ("lq", "gt"), ("test_LR", "test_HR"), ("LQ", "HQ")])
def test_pairs_match_by_name(tmp_path, low, high):
    touch(tmp_path, *(f"{low}/{name}" for name in ("a2.png", "a10.png", "s/a2.png")))
    touch(tmp_path, *(f"{high}/{name}" for name in ("a2.jpg", "a10.png", "s/a2.png")))
    pairs = find_pairs(tmp_path)
    assert [name for name, _, _ in pairs] == ["a2", "a10", "s/a2"]
    assert pairs[0][1:] == (tmp_path / low / "a2.png", tmp_path / high / "a2.jpg")


def test_endings_are_taken_off_when_no_plain_name_matches(tmp_path):
    touch(tmp_path, "lr/Canon_001_LR4.png", "lr/0801x4.png", "hr/Canon_001_HR.png", "hr/0801.png")
    assert [name for name, _, _ in find_pairs(tmp_path)] == ["0801", "Canon_001"]


def test_images_without_partner_are_listed(tmp_path):
    touch(tmp_path, "lr/a.png", "lr/b.png", "hr/a.png", "hr/c.png")
    with pytest.raises(UserError, match=r"2 images have no partner.*lr/b.png.*hr/c.png"):
        find_pairs(tmp_path)


def test_equal_names_are_refused(tmp_path):
    touch(tmp_path, "lr/a.png", "lr/a.jpg", "hr/a.png")
    with pytest.raises(UserError, match=r"same name.*a\.(jpg|png).*a\.(jpg|png)"):
        find_pairs(tmp_path)


def test_no_pairs_says_what_was_found(tmp_path):
    touch(tmp_path, "hr/a.png", "other/b.png")
    with pytest.raises(UserError, match="test_LR.*found hr, other"):
        find_pairs(tmp_path)
    with pytest.raises(UserError, match="data.root=.*gone"):
        find_pairs(tmp_path / "gone")
    (tmp_path / "lr").mkdir()
    with pytest.raises(UserError, match="1 images have no partner"):
        find_pairs(tmp_path)


def test_benchmark_pairs(shared):
    pairs = find_pairs(shared / "benchmarks" / "realsr")
    assert len(pairs) == 100
    assert all(low.stem == high.stem == name for name, low, high in pairs)


def test_embedded_photographs_and_their_split():
    names = {split: [name for name, _ in embedded_photographs(split)] for split in ("train", "heldout")}
    assert names["heldout"] == ["china", "coffee"]
    assert names["train"] == ["astronaut", "chelsea", "motorcycle_left", "motorcycle_right", "rocket", "flower"]
    for _, photo in embedded_photographs("train"):
        assert photo.shape[0] == 3 and min(photo.shape[1:]) >= 300
        assert (photo[0] - photo[2]).abs().mean() > 0.01  # in color
    with pytest.raises(ValueError, match="train or heldout"):
        embedded_paths("test")


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("varestorer.data.datasets.find_spec", lambda module: None)
    with pytest.raises(UserError, match="scikit-image, which is not installed.*pip install.*data=folder"):
        embedded_paths("train")


def test_images_without_references_are_listed_like_pairs(tmp_path):
    touch(tmp_path, "b10.png", "b9.jpg", "sub/a.png", "notes.txt")
    found = find_images_or_pairs(tmp_path)
    assert [(name, high) for name, _, high in found] == [("b9", None), ("b10", None), ("sub/a", None)]
    assert found[0][1] == tmp_path / "b9.jpg"


def test_a_folder_of_bad_images_alone_is_found_by_its_name(tmp_path):
    touch(tmp_path, "test_LR/a.png", "preview.png")
    assert find_images_or_pairs(tmp_path) == [("a", tmp_path / "test_LR" / "a.png", None)]


def test_pairs_stay_pairs_where_references_are_optional(tmp_path):
    touch(tmp_path, "lr/a.png", "hr/a.png")
    assert find_images_or_pairs(tmp_path) == find_pairs(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["hr/a.png"], "holds no bad images.*found hr"),
        (["notes.txt"], "holds no image; put there a folder of images"),
        (["a.png", "a.jpg"], "two images of the same name"),
        (["lr/a.png", "lr/b.png", "hr/a.png"], "1 images have no partner.*lr/b.png"),
    ],
)
def test_what_is_neither_images_nor_pairs(tmp_path, files, message):
    touch(tmp_path, *files)
    with pytest.raises(UserError, match=message):
        find_images_or_pairs(tmp_path)


def test_a_listing_names_all_that_does_not_match(tmp_path):
    touch(tmp_path, "lr/a.png", "lr/b.png", "lr/c.png", "lr/c.jpg", "hr/a.png", "hr/c.png", "hr/d.png")
    listing = list_test_set(tmp_path, need_pairs=True)
    assert [name for name, _, _ in listing.images] == ["a", "c"]
    assert relative(listing.unpaired, tmp_path) == ["lr/b.png", "hr/d.png"]
    assert [relative(pair, tmp_path) for pair in listing.duplicates] == [["lr/c.png", "lr/c.jpg"]]


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
