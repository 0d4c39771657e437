"""What the test sets are, checking a folder, and making a set."""

import json
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from varestorer.data.degradation import Degradation
from varestorer.data.degradation.operations import resample
from varestorer.data.testsets import making
from varestorer.data.testsets.checking import MANIFEST, Check, Manifest, check_test_set, joint_hash, pixel_hash
from varestorer.data.testsets.known import BENCHMARKS
from varestorer.data.testsets.making import Recipe, make_test_set, plan_cut_outs
from varestorer.utils.errors import UserError
from varestorer.utils.images import load_image, save_image, to_uint8
from varestorer.utils.seeds import numpy_generator

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "dataset"
SMALL = replace(BENCHMARKS["realsr"], pairs=4, lq_side=8, pixels={})
OPTIONS = {"seed": 3, "crop": 32}


def recipe(seed: int = 3, crop: int = 32) -> Recipe:
    return Recipe(crop, seed, Degradation())


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Four pairs, 8 x 8 -> 32 x 32."""
    for number in range(4):
        write(tmp_path / "pairs" / "lr" / f"{number}.png", noise(8, 8, number))
        write(tmp_path / "pairs" / "hr" / f"{number}.png", noise(32, 32, number))
    return tmp_path / "pairs"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three smooth photographs of different sizes."""
    for number in range(3):
        picture = Image.fromarray(noise(5, 6, number)).resize((70 + number, 50 + number), Image.Resampling.BICUBIC)
        write(tmp_path / "photos" / "sub" / f"{number}.png", np.asarray(picture))
    return tmp_path / "photos"


def test_the_table_and_the_configs_say_the_same():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(BENCHMARKS)
    for name, benchmark in BENCHMARKS.items():
        config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        assert config == {"name": name, "pairs": benchmark.pairs, "reference": benchmark.reference}


def test_a_good_set_passes_and_its_images_are_counted(pairs: Path):
    check = check_test_set(pairs, SMALL)
    assert check.is_good and not check.problems and not check.offenders
    assert dict(check.kinds("lr")) == {"PNG, 8-bit RGB, 8x8": 4} and dict(check.kinds("hr")) == {
        "PNG, 8-bit RGB, 32x32": 4
    }
    assert len(set(check.digests().values())) == 2


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def convert(path: Path, mode: str) -> None:
    Image.open(path).convert(mode).save(path)


def as_jpeg(path: Path) -> None:
    Image.open(path).save(path.with_suffix(".jpg"))
    path.unlink()


OFFENCES = [
    ("hr/1.png", "hr/1.png", cut_short, "truncated"),
    ("lr/1.png", "lr/1.png", lambda path: path.write_bytes(b""), "empty"),
    ("lr/1.png", "hr/1.png", Path.unlink, "no partner"),
    ("lr/1.png", "lr/1.png", lambda path: shutil.copy(path, path.with_suffix(".bmp")), "same name as lr/1.bmp"),
    ("hr/1.png", "hr/1.jpg", as_jpeg, "is JPEG, wanted PNG"),
    ("hr/1.png", "hr/1.png", lambda path: convert(path, "L"), "is 8-bit L, wanted 8-bit RGB"),
    ("lr/1.png", "lr/1.png", lambda path: convert(path, "RGBA"), "is 8-bit RGBA"),
    ("lr/1.png", "lr/1.png", lambda path: write(path, noise(8, 8)[..., 0].astype(np.uint16)), "is 16-bit I"),
    ("lr/1.png", "lr/1.png", lambda path: write(path, noise(8, 9)), "is 9x8, wanted 8x8"),
    ("hr/1.png", "hr/1.png", lambda path: write(path, noise(31, 32)), "is 32x31, wanted 32x32"),
]


@pytest.mark.parametrize(("touched", "named", "spoil", "reason"), OFFENCES)
def test_an_offender_is_named_with_the_reason(pairs: Path, touched: str, named: str, spoil, reason: str):
    spoil(pairs / touched)
    check = check_test_set(pairs, SMALL)
    assert not check.is_good and reason in "; ".join(check.offenders[named])


def test_every_offender_is_named_and_the_count_told(pairs: Path):
    (pairs / "lr" / "0.png").unlink()
    for number in (1, 2, 3):
        write(pairs / "lr" / f"{number}.png", noise(8, 7))
        cut_short(pairs / "hr" / f"{number}.png")
    check = check_test_set(pairs, SMALL)
    assert list(check.offenders) == [f"hr/{number}.png" for number in range(4)] + [f"lr/{n}.png" for n in (1, 2, 3)]
    assert check.problems == ["wanted 4 pairs, found 3"]


def write_16bit_png(path: Path, height: int, width: int) -> None:
    """Pillow reads such files as 8-bit RGB, and writes none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    lines = b"".join(b"\0" + bytes(range(6)) * width for _ in range(height))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def test_sixteen_bit_color_is_told_from_eight_bit(pairs: Path):
    write_16bit_png(pairs / "lr" / "1.png", 8, 8)
    assert check_test_set(pairs, SMALL).offenders == {"lr/1.png": ["is 16-bit RGB, wanted 8-bit RGB"]}


def test_sets_of_any_size_have_to_be_exactly_scale_times_as_large(pairs: Path):
    assert check_test_set(pairs, BENCHMARKS["folder"], scale=4).is_good
    check = check_test_set(pairs, BENCHMARKS["folder"], scale=2)
    assert (
        check.offenders["hr/1.png"] == ["is 32x32, wanted 16x16: 2 times lr/1.png (8x8)"] and len(check.offenders) == 4
    )


def test_images_without_references_may_be_of_any_kind(tmp_path: Path):
    write(tmp_path / "a.jpg", noise(9, 11))
    write(tmp_path / "sub" / "b.png", noise(5, 6)[..., 0])
    assert check_test_set(tmp_path, BENCHMARKS["images"]).is_good
    check = check_test_set(tmp_path, BENCHMARKS["reallr200"])
    assert check.problems == ["wanted 200 images, found 2"] and not check.offenders
    (tmp_path / "c.png").write_bytes(b"no picture")
    assert list(check_test_set(tmp_path, BENCHMARKS["images"]).offenders) == ["c.png"]


def test_a_folder_of_another_layout_is_one_problem(tmp_path: Path):
    check = check_test_set(tmp_path, BENCHMARKS["folder"])
    assert not check.is_good and "holds no pairs" in check.problems[0] and check.digests() == {}
    (tmp_path / "hr").mkdir()
    (tmp_path / "lr").mkdir()
    assert check_test_set(tmp_path, BENCHMARKS["folder"]).problems == ["holds no pairs"]


def test_the_benchmark_is_the_released_one(shared: Path):
    check = check_test_set(shared / "benchmarks" / "realsr", BENCHMARKS["realsr"])
    assert check.is_good and check.digests() == BENCHMARKS["realsr"].pixels


def test_hashes_tell_pixels_shapes_and_names_apart():
    picture = torch.from_numpy(noise(4, 6)).permute(2, 0, 1)
    changed = picture.clone()
    changed[2, 3, 5] ^= 1
    values = [pixel_hash(picture), pixel_hash(changed), pixel_hash(picture.reshape(3, 6, 4))]
    assert len(set(values)) == 3 and pixel_hash(picture.clone()) == values[0]
    assert joint_hash({"a": "1", "b": "2"}) == joint_hash({"b": "2", "a": "1"}) != joint_hash({"a": "2", "b": "1"})


def digests(root: Path, photos: Path, count: int = 7, workers: int = 0, seed: int = 3) -> dict[str, str]:
    return make_test_set(root, photos, recipe(seed), OPTIONS | {"seed": seed}, count, workers).digests()


def test_a_made_set_is_what_its_manifest_says(tmp_path: Path, photos: Path):
    root = tmp_path / "made"
    made = make_test_set(root, photos, recipe(), OPTIONS, 7)
    read = Manifest.load(root / MANIFEST)
    assert read == made and list(read.pairs) == [f"{number:05d}" for number in range(7)]
    assert sorted(pair.source for pair in read.pairs.values())[::3] == ["sub/0.png", "sub/1.png", "sub/2.png"]
    for name, pair in read.pairs.items():
        photo = load_image(photos / pair.source)
        hq, lq = (load_image(root / side / f"{name}.png") for side in ("hr", "lr"))
        assert torch.equal(hq, photo[:, pair.top : pair.top + 32, pair.left : pair.left + 32])
        assert lq.shape == (3, 8, 8) and pixel_hash(to_uint8(lq)) == pair.lr
    check = check_test_set(root, BENCHMARKS["folder"], 4, read)
    assert check.is_good and check.digests() == made.digests()
    assert json.loads((root / MANIFEST).read_text())["digests"] == made.digests()


def test_the_bad_image_is_the_degradation_before_it_is_enlarged(photos: Path):
    plan, _ = plan_cut_outs({"0": photos / "sub" / "0.png"}, recipe(), 1)
    lq, hq = recipe().make(load_image(photos / "sub" / "0.png"), plan[0])
    enlarged = Degradation(enlarge_modes=("bilinear",))(hq, numpy_generator(3, "degradation", "0", 0))
    # rounding once more moves a pixel by at most a level
    assert (resample(lq, (32, 32), "bilinear") - enlarged).abs().max() <= 1.01 / 255


def test_the_set_does_not_depend_on_workers_or_threads(tmp_path: Path, photos: Path):
    threads = torch.get_num_threads()
    alone = digests(tmp_path / "alone", photos, 20)
    assert torch.get_num_threads() == threads
    assert digests(tmp_path / "two", photos, 20, workers=2) == alone
    assert digests(tmp_path / "other", photos, 20, seed=4) != alone


def test_an_interrupted_run_goes_on_to_the_same_set(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch):
    written = []

    def save(path: Path, image: torch.Tensor) -> None:
        if len(written) == 9:
            raise KeyboardInterrupt
        written.append(path)
        save_image(path, image)

    root = tmp_path / "made"
    with monkeypatch.context() as patched:
        patched.setattr(making, "save_image", save)
        with pytest.raises(KeyboardInterrupt):
            digests(root, photos)
    kept = Manifest.load(root / MANIFEST).pairs
    times = {name: (root / "lr" / f"{name}.png").stat().st_mtime_ns for name in kept}
    assert 0 < len(kept) < 7
    assert digests(root, photos) == digests(tmp_path / "whole", photos)
    assert times == {name: (root / "lr" / f"{name}.png").stat().st_mtime_ns for name in kept}


def test_damaged_and_lost_pairs_are_made_again(tmp_path: Path, photos: Path):
    root = tmp_path / "made"
    first = digests(root, photos)
    cut_short(root / "hr" / "00002.png")
    write(root / "lr" / "00004.png", noise(8, 8))
    (root / "lr" / "00005.png").unlink()
    check = check_test_set(root, BENCHMARKS["folder"], 4, Manifest.load(root / MANIFEST))
    assert "other pixels" in check.offenders["lr/00004.png"][0] and "no partner" in check.offenders["hr/00005.png"][0]
    assert "00005 is in the manifest but not in the folder" in check.problems
    assert digests(root, photos) == first
    assert check_test_set(root, BENCHMARKS["folder"]).digests() == first


def test_more_pairs_leave_the_first_ones_as_they_are(tmp_path: Path, photos: Path):
    root = tmp_path / "made"
    few = make_test_set(root, photos, recipe(), OPTIONS, 2).pairs
    many = make_test_set(root, photos, recipe(), OPTIONS, 8).pairs
    assert len(many) == 8 and {name: many[name] for name in few} == few
    with pytest.raises(UserError, match="has 8 pairs already"):
        make_test_set(root, photos, recipe(), OPTIONS, 7)


def test_unusable_photographs_are_noted_and_change_nothing_for_the_others(tmp_path: Path, photos: Path):
    def by_photo(manifest: Manifest) -> dict:
        found: dict[str, list] = {}
        for pair in manifest.pairs.values():
            found.setdefault(pair.source, []).append(pair)
        return {source: pairs[:2] for source, pairs in found.items()}

    before = make_test_set(tmp_path / "before", photos, recipe(), OPTIONS, 6)
    write(photos / "small.png", noise(31, 90))
    (photos / "broken.png").write_bytes(b"no picture")
    after = make_test_set(tmp_path / "after", photos, recipe(), OPTIONS, 6)
    assert set(after.skipped) == {"small.png", "broken.png"}
    assert "smaller than a crop" in after.skipped["small.png"] and "no picture" in after.skipped["broken.png"]
    assert after.pairs == before.pairs
    write(photos / "new.png", noise(60, 60))
    more = by_photo(make_test_set(tmp_path / "more", photos, recipe(), OPTIONS, 8))
    assert {source: more[source] for source in by_photo(before)} == by_photo(before)


def test_crops_are_spread_over_the_photograph(tmp_path: Path):
    write(tmp_path / "a.png", noise(64, 40))
    plan, _ = plan_cut_outs({"a": tmp_path / "a.png"}, recipe(), 300)
    assert {cut_out.top for cut_out in plan} == set(range(33)) and {cut_out.left for cut_out in plan} == set(range(9))
    # a fixed place: it has to be the same on every machine and with every version
    assert [(cut_out.top, cut_out.left) for cut_out in plan[:3]] == [(31, 7), (19, 0), (11, 4)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root, photos: (root / "manifest.json").unlink(), "is no new folder"),
        (lambda root, photos: (root / "manifest.json").write_text("[]"), "is no manifest of a made set"),
        (lambda root, photos: (photos / "sub" / "1.png").unlink(), "the photographs changed"),
        (lambda root, photos: shutil.rmtree(photos / "sub"), "none of 0 photographs can be used"),
    ],
)
def test_a_set_of_something_else_is_not_touched(tmp_path: Path, photos: Path, spoil, message: str):
    root = tmp_path / "made"
    digests(root, photos)
    spoil(root, photos)
    files = {path: path.read_bytes() for path in root.rglob("*.png")}
    with pytest.raises(UserError, match=message):
        digests(root, photos)
    assert files == {path: path.read_bytes() for path in root.rglob("*.png")}


def test_other_options_and_versions_are_refused_by_name(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch):
    digests(tmp_path / "made", photos)
    with pytest.raises(UserError, match=r"other options: seed=3 \(now 5\)"):
        digests(tmp_path / "made", photos, seed=5)
    monkeypatch.setattr(making, "versions", lambda: {"numpy": "99"})
    with pytest.raises(UserError, match=r"other versions: .*numpy=.*now 99"):
        digests(tmp_path / "made", photos)


@pytest.mark.parametrize(("crop", "count", "message"), [(30, 1, "multiple of scale 4"), (32, 0, "at least 1 pair")])
def test_what_cannot_be_is_refused(tmp_path: Path, photos: Path, crop: int, count: int, message: str):
    with pytest.raises(UserError, match=message):
        make_test_set(tmp_path / "made", photos, recipe(crop=crop), OPTIONS, count)
    assert not (tmp_path / "made").exists()


def test_an_empty_check_is_good_until_something_is_found():
    assert Check().is_good and not Check(problems=["x"]).is_good and not Check(offenders={"a": ["b"]}).is_good
