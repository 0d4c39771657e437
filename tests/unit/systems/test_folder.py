"""The batch runner with a stand-in for the network."""

import json
import logging
import os
import re
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import Tensor

from varestorer.systems import folder
from varestorer.systems.folder import FolderReport, Restored, RestoreImage, restore_files
from varestorer.systems.plan import Job, plan_restoration, target_names
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.image_files import READS_HEIC, write_16_bits
from varestorer.utils.images import Picture, Writing, heat_map, load_image, load_picture, resize, save_image
from varestorer.utils.seeds import derive_seed


def double(image_3HW: Tensor, job: Job, seed: int) -> Restored:
    """Twice the size, with one pixel that tells the seed."""
    out = image_3HW.repeat_interleave(2, 1).repeat_interleave(2, 2)
    out[:, 0, 0] = seed % 256 / 255
    return Restored(out)


def doubt(image_3HW: Tensor, job: Job, seed: int) -> Restored:
    """Twice the size, with an uncertainty that grows from left to right."""
    out = double(image_3HW, job, seed).image
    ramp = torch.linspace(0, 1, out.shape[2]).expand(out.shape[1:])
    return Restored(out, ramp, {"caption": f"a picture called {job.name}"})


def write_image(path: Path, size: tuple[int, int] = (6, 4), value: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def run(source: Path, output: Path, restore=double, **options) -> tuple[FolderReport, dict]:
    report = restore_files(plan_restoration(source, output), restore, **options)
    return report, json.loads(report.path.read_text())


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_keeps_its_subfolders_and_reports_each_file(tmp_path: Path) -> None:
    for name in ("a.png", "deep/er/b.jpg", "10.png", "9.png"):
        write_image(tmp_path / "in" / name)
    report, entries = run(tmp_path / "in", tmp_path / "out", seed=7, settings={"prompt": "a dog"})
    assert files_in(tmp_path / "out") == {"a.png", "deep/er/b.png", "10.png", "9.png", "restore.json"}
    assert (report.num_restored, report.num_skipped, report.failed) == (4, 0, {})
    assert list(entries) == ["9.png", "10.png", "a.png", "deep/er/b.jpg"]
    entry = entries["deep/er/b.jpg"]
    assert (entry["output"], entry["seed"], entry["prompt"]) == ("deep/er/b.png", 7, "a dog")
    assert entry["seconds"] >= 0
    assert load_image(tmp_path / "out/deep/er/b.png").shape == (3, 8, 12)


def test_colliding_names_keep_their_extension() -> None:
    assert target_names(["a.jpg", "b.jpg"]) == {"a.jpg": "a.png", "b.jpg": "b.png"}
    assert target_names(["a.jpg", "x/a.png"]) == {"a.jpg": "a.png", "x/a.png": "x/a.png"}
    assert target_names(["a.jpg", "a.png"]) == {"a.jpg": "a.jpg.png", "a.png": "a.png.png"}
    assert target_names(["A.jpg", "a.png"]) == {"A.jpg": "A.jpg.png", "a.png": "a.png.png"}
    chained = target_names(["a.jpg", "a.png", "a.jpg.png"])
    assert chained == {"a.jpg": "a.jpg.png", "a.png": "a.png.png", "a.jpg.png": "a.jpg.png.png"}


def test_no_result_gets_the_name_of_a_heat_map() -> None:
    names = ["a.jpg", "a.uncertainty.png", "b.png", "c.uncertainty.jpg"]
    assert target_names(names) == {
        "a.jpg": "a.jpg.png",
        "a.uncertainty.png": "a.uncertainty.png.png",
        "b.png": "b.png",
        "c.uncertainty.jpg": "c.uncertainty.png",
    }
    nested = target_names(["a.png", "a.uncertainty.png", "a.uncertainty.uncertainty.png"])
    files = [name for target in nested.values() for name in (target, Job(Path(), "", target).heat_map)]
    assert len(set(files)) == 6


def test_both_of_a_colliding_pair_are_written(tmp_path: Path) -> None:
    write_image(tmp_path / "in/a.jpg", value=10)
    write_image(tmp_path / "in/a.png", value=200)
    run(tmp_path / "in", tmp_path / "out")
    dark, bright = load_image(tmp_path / "out/a.jpg.png"), load_image(tmp_path / "out/a.png.png")
    assert dark[0, 5, 5] < 0.1 and bright[0, 5, 5] > 0.7


def test_bad_files_are_named_and_the_rest_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "in"
    write_image(source / "good.png", size=(40, 40))
    (source / "truncated.png").write_bytes((source / "good.png").read_bytes()[:60])
    (source / "empty.jpg").write_bytes(b"")
    (source / "text.png").write_text("hello")
    (source / "notes.cr2").write_text("hello")
    for name in ("notes.txt", "good.xmp", "good.MP4", ".DS_Store"):
        (source / name).write_text("hello")
    (source / ".hidden").write_text("hello")
    with caplog.at_level(logging.WARNING):
        report, entries = run(source, tmp_path / "out")
    assert report.num_restored == 1
    assert set(report.failed) == {"truncated.png", "empty.jpg", "text.png", "notes.cr2"}
    assert files_in(tmp_path / "out") == {"good.png", "restore.json"}
    for name in report.failed:
        assert set(entries[name]) == {"error"}
        assert name in caplog.text
    assert "3 side files are left alone: good.MP4, good.xmp, notes.txt" in caplog.text


def test_a_folder_that_cannot_be_read_fails_and_what_systems_leave_is_skipped(tmp_path: Path, monkeypatch) -> None:
    source = tmp_path / "in"
    for name in ("a.png", "locked/b.png", "@eaDir/a.png", "#recycle/c.png"):
        write_image(source / name)
    (source / "Thumbs.db").write_bytes(b"")
    (source / "link").symlink_to(source / "nowhere")
    scandir = os.scandir

    def refuse(path):
        if Path(path) == source / "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    report, entries = run(source, tmp_path / "out")
    assert report.num_restored == 1 and set(report.failed) == {"locked", "link"}
    assert "cannot be read (Permission denied)" in entries["locked"]["error"]


def test_the_result_depends_on_seed_and_name_only(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        write_image(tmp_path / "in" / name)
    run(tmp_path / "in", tmp_path / "all", seed=3)
    run(tmp_path / "in/b.png", tmp_path / "one", seed=3)
    run(tmp_path / "in/b.png", tmp_path / "other", seed=4)
    assert (tmp_path / "all/b.png").read_bytes() == (tmp_path / "one/b.png").read_bytes()
    assert (tmp_path / "all/b.png").read_bytes() != (tmp_path / "other/b.png").read_bytes()
    first = round(load_image(tmp_path / "all/b.png")[0, 0, 0].item() * 255)
    assert first == derive_seed(3, "b.png") % 256


def test_two_pictures_of_one_name_in_two_folders_get_two_seeds(tmp_path: Path) -> None:
    seeds: dict[str, int] = {}

    def note(image_3HW: Tensor, job: Job, seed: int) -> Restored:
        seeds[job.name] = seed
        return double(image_3HW, job, seed)

    for name in ("a/x.png", "b/x.png"):
        write_image(tmp_path / "in" / name)
    run(tmp_path / "in", tmp_path / "out", note, seed=3)
    assert seeds == {name: derive_seed(3, name) for name in ("a/x.png", "b/x.png")}
    assert len(set(seeds.values())) == 2


def test_two_runs_into_one_folder_both_stay_in_the_report(tmp_path: Path) -> None:
    """One begins and ends while the other is at work, and each also fails at a file."""
    for name in ("one/a.png", "one/both.png", "two/b.png", "two/both.png"):
        write_image(tmp_path / name)
    (tmp_path / "one/bad1.png").write_text("no picture")
    (tmp_path / "two/bad2.png").write_text("no picture")

    def other(image_3HW: Tensor, job: Job, seed: int) -> Restored:
        if job.name == "a.png":
            run(tmp_path / "two", tmp_path / "out", settings={"ckpt": "two"})
        return double(image_3HW, job, seed)

    _, entries = run(tmp_path / "one", tmp_path / "out", other, settings={"ckpt": "one"})
    assert list(entries) == ["a.png", "b.png", "bad1.png", "bad2.png", "both.png"]
    assert entries["b.png"]["ckpt"] == "two" and "error" in entries["bad2.png"]
    # errors of before are not kept: the next run may be about them
    (tmp_path / "two/bad2.png").unlink()
    _, entries = run(tmp_path / "two", tmp_path / "out")
    assert list(entries) == ["a.png", "b.png", "both.png"]


def test_what_another_run_made_meanwhile_keeps_its_entry(tmp_path: Path) -> None:
    for name in ("in/a.png", "in/b.png", "out/b.png"):  # the result of b is there, its entry is not yet
        write_image(tmp_path / name)
    made = {"output": "b.png", "seconds": 2.0, "seed": 1}

    def late(image_3HW: Tensor, job: Job, seed: int) -> Restored:
        (tmp_path / "out/restore.json").write_text(json.dumps({"b.png": made}))
        return double(image_3HW, job, seed)

    _, entries = run(tmp_path / "in", tmp_path / "out", late)
    assert entries["b.png"] == {**made, "skipped": True} and entries["a.png"]["output"] == "a.png"


def test_any_name_is_restored_and_recorded(tmp_path: Path) -> None:
    names = [
        os.fsdecode(b"Mu\xf1oz.png"),
        "x" * 251 + ".png",
        "é" * 125 + ".jpg",
        "a\nb.png",
        "\x1b[31mc.png",
        "d,\"'.png",
    ]
    for name in names:
        (tmp_path / "in").mkdir(exist_ok=True)
        write_image(tmp_path / "plain.png").rename(tmp_path / "in" / name)
    report, entries = run(tmp_path / "in", tmp_path / "out", doubt)
    assert report.failed == {} and set(entries) == set(names)
    for entry in entries.values():
        assert {entry["output"], entry["uncertainty"]} < files_in(tmp_path / "out")
    assert run(tmp_path / "in", tmp_path / "out", doubt)[0].num_skipped == len(names)


def test_results_are_skipped_unless_overwritten_and_keep_their_record(tmp_path: Path) -> None:
    write_image(tmp_path / "in/a.png")
    _, before = run(tmp_path / "in", tmp_path / "out", seed=1)
    write_image(tmp_path / "in/b.png")
    report, entries = run(tmp_path / "in", tmp_path / "out", seed=2)
    assert (report.num_restored, report.num_skipped) == (1, 1)
    assert entries["a.png"] == before["a.png"] | {"skipped": True}
    assert (entries["a.png"]["seed"], entries["b.png"]["seed"]) == (1, 2)
    report, entries = run(tmp_path / "in", tmp_path / "out", seed=2, overwrite=True)
    assert (report.num_restored, entries["a.png"]["seed"]) == (2, 2)
    assert "skipped" not in entries["a.png"]


def test_results_of_other_settings_are_named_as_far_as_they_are_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_image(tmp_path / "in/a.jpg")
    run(tmp_path / "in", tmp_path / "out", seed=1, settings={"scale": 4, "tile": None})
    again = {"seed": 1, "settings": {"scale": 4.0, "tile": None, "later": 5}}
    assert run(tmp_path / "in", tmp_path / "out", **again)[0].num_differing == 0
    assert caplog.text == ""
    report, entries = run(tmp_path / "in", tmp_path / "out", seed=1, settings={"scale": 2, "tile": 64})
    assert (report.num_skipped, report.num_differing, entries["a.jpg"]["scale"]) == (1, 1, 4)
    assert "a.png was made with scale=4 tile=null, not scale=2 tile=64; overwrite=true makes it again" in caplog.text
    assert run(tmp_path / "in", tmp_path / "out", seed=2)[0].num_differing == 1
    assert run(tmp_path / "in", tmp_path / "out", seed=2, overwrite=True)[0].num_differing == 0


def test_an_older_file_in_the_place_of_an_input_is_restored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "in" / name, value=200)
    run(tmp_path / "in", tmp_path / "out")
    os.utime(tmp_path / "in/a.png")  # a newer time does not make it another file
    os.utime(write_image(tmp_path / "in/b.png", value=10), (1.5e9, 1.5e9))
    (tmp_path / "out/restore.json").unlink()  # as if the machine had stopped before it was written
    with caplog.at_level(logging.INFO):
        report, _ = run(tmp_path / "in", tmp_path / "out")
    assert (report.num_restored, report.num_skipped) == (1, 1) and "b.png was made from another file" in caplog.text
    assert load_image(tmp_path / "out/b.png")[0, 5, 5] < 0.1
    assert run(tmp_path / "in", tmp_path / "out")[0].num_skipped == 2


def test_a_result_of_a_removed_input_is_not_taken_for_that_of_its_namesake(tmp_path: Path) -> None:
    write_image(tmp_path / "in/a.jpg", value=200)
    run(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in/a.jpg").unlink()
    write_image(tmp_path / "in/a.png", value=10)
    run(tmp_path / "in", tmp_path / "out")
    assert load_image(tmp_path / "out/a.png")[0, 5, 5] < 0.1


def test_a_picture_that_does_not_say_what_it_was_made_from_is_left_alone_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_image(tmp_path / "in/a.jpg")
    somebodys = write_image(tmp_path / "out/a.png", value=77).read_bytes()
    report, _ = run(tmp_path / "in", tmp_path / "out")
    assert report.num_skipped == 1 and (tmp_path / "out/a.png").read_bytes() == somebodys
    assert "a.png does not say what it was made from; overwrite=true makes it again" in caplog.text


def test_an_earlier_report_is_kept_for_results_that_exist(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        write_image(tmp_path / "in" / name)
        _, entries = run(tmp_path / "in" / name, tmp_path / "out")
    assert list(entries) == ["a.png", "b.png", "c.png"]
    (tmp_path / "out/a.png").unlink()
    _, entries = run(tmp_path / "in/c.png", tmp_path / "out")
    assert list(entries) == ["b.png", "c.png"]


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}', '{"a": {}}', "\x00"])
def test_a_strange_report_is_replaced(tmp_path: Path, content: str) -> None:
    write_image(tmp_path / "in/a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/restore.json").write_text(content)
    _, entries = run(tmp_path / "in", tmp_path / "out")
    assert list(entries) == ["a.png"]


def test_memory_running_out_is_one_files_failure_and_a_bug_is_not(tmp_path: Path) -> None:
    write_image(tmp_path / "in/a.png", size=(9, 9))
    write_image(tmp_path / "in/b.png")

    def fail_on_large(error: Exception):
        def restore(image_3HW: Tensor, job: Job, seed: int) -> Restored:
            if image_3HW.shape[-1] == 9:
                raise error
            return Restored(image_3HW)

        return restore

    on_cpu = RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")
    for error in (MemoryError(), torch.cuda.OutOfMemoryError("CUDA"), on_cpu):
        report, _ = run(tmp_path / "in", tmp_path / "out", fail_on_large(error), overwrite=True)
        assert "not enough memory" in report.failed["a.png"] and report.num_restored == 1
    with pytest.raises(RuntimeError, match="a bug"):
        run(tmp_path / "in", tmp_path / "out", fail_on_large(RuntimeError("a bug")), overwrite=True)


def test_an_interrupted_run_reports_what_it_did(tmp_path: Path) -> None:
    write_image(tmp_path / "in/a.png")
    write_image(tmp_path / "in/b.png", size=(9, 9))

    def restore(image_3HW: Tensor, job: Job, seed: int) -> Restored:
        if image_3HW.shape[-1] == 9:
            raise KeyboardInterrupt
        return Restored(image_3HW)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "in", tmp_path / "out", restore)
    assert files_in(tmp_path / "out") == {"a.png", "restore.json"}
    assert list(json.loads((tmp_path / "out/restore.json").read_text())) == ["a.png"]


def test_an_output_inside_the_input_is_not_restored_again(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    run(tmp_path, tmp_path / "restored")
    report, _ = run(tmp_path, tmp_path / "restored", overwrite=True)
    assert (report.num_restored, report.failed) == (1, {})
    assert files_in(tmp_path) == {"a.png", "restored/a.png", "restored/restore.json"}


def test_the_output_may_be_the_folder_around_the_input(tmp_path: Path) -> None:
    write_image(tmp_path / "photos/a.png")
    report, _ = run(tmp_path / "photos", tmp_path)
    assert (report.num_restored, report.failed) == (1, {})
    assert files_in(tmp_path) == {"photos/a.png", "a.png", "restore.json"}


def test_inputs_are_never_overwritten(tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png")
    photo = write_image(tmp_path / "b.jpg")
    with pytest.raises(UsageError, match="the input folder itself"):
        plan_restoration(tmp_path, tmp_path / "." / "")
    with pytest.raises(UsageError, match=r"overwrite the input .*a\.png"):
        plan_restoration(image, tmp_path)
    run(photo, tmp_path)
    assert files_in(tmp_path) == {"a.png", "b.jpg", "b.png", "restore.json"}


@pytest.mark.parametrize("name", ["a.png", "a.uncertainty.png"])
def test_results_do_not_overwrite_another_input(tmp_path: Path, name: str) -> None:
    # the folder in the input folder has its name: its results would land in the input folder
    write_image(tmp_path / "x" / name)
    write_image(tmp_path / "x/x/a.jpg")
    with pytest.raises(UsageError, match=rf"overwrite the input .*x/{name}; give another output folder"):
        plan_restoration(tmp_path / "x", tmp_path)


def test_wrong_commands_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere does not exist"):
        plan_restoration(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty has no images"):
        plan_restoration(tmp_path / "empty", tmp_path / "out")
    image = write_image(tmp_path / "a.png")
    with pytest.raises(UsageError, match=r"would overwrite the input .*a\.png"):
        plan_restoration(image, image)
    (tmp_path / "notes").write_text("")
    with pytest.raises(UsageError, match=r"notes is a file"):
        plan_restoration(image, tmp_path / "notes")
    with pytest.raises(UsageError, match=r"better\.jpg is a file, and input=.* a folder"):
        plan_restoration(tmp_path, tmp_path / "better.jpg")
    with pytest.raises(UsageError, match=r"better\.jpg and format=png contradict"):
        plan_restoration(image, tmp_path / "better.jpg", ending=".png")


def test_one_picture_may_become_a_file_of_any_name_and_format(tmp_path: Path) -> None:
    source = write_image(tmp_path / "a.png")
    for ending, kind in {"jpg": "JPEG", "webp": "WEBP", "avif": "AVIF", "tif": "TIFF", "png": "PNG"}.items():
        plan = plan_restoration(source, tmp_path / "out" / f"better.{ending}")
        report = restore_files(plan, double)
        assert report.path == tmp_path / "out" / f"better.{ending}" and report.num_restored == 1
        with Image.open(report.path) as file:
            assert file.format == kind and file.size == (12, 8)
        assert restore_files(plan, double).num_skipped == 1
    write_image(source, value=120)
    assert restore_files(plan, double).num_restored == 1  # of another file than before
    assert "restore.json" not in files_in(tmp_path)


def photo_of_a_camera(path: Path, size: tuple[int, int] = (6, 4)) -> None:
    exif = Image.Exif()
    exif[0x0110], exif[0x0112], exif[0x0131] = "Camera 5", 6, "Firmware 1"  # model, turned by a quarter, software
    exif[0x8769] = {0x9003: "2024:05:06 07:08:09", 0xA002: 6, 0x927C: b"maker"}
    exif[0x8825] = {1: "N", 2: (48.0, 8.0, 0.0)}
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, (200, 90, 40)).save(path, exif=exif, dpi=(300, 300))


@pytest.mark.parametrize("ending", [".jpg", ".png", ".webp", ".avif", ".tif"])
def test_date_camera_and_resolution_stay_and_the_place_only_if_asked(tmp_path: Path, ending: str) -> None:
    photo_of_a_camera(tmp_path / "in" / "a.jpg")
    for gps in (False, True):
        plan = plan_restoration(tmp_path / "in", tmp_path / f"out{gps}", ending=ending)
        restore_files(plan, double, writing=Writing(gps=gps))
        with Image.open(tmp_path / f"out{gps}" / f"a{ending}") as file:
            exif = file.getexif()
            assert file.size == (8, 12) and exif.get(0x0112, 1) == 1  # turned, once
            assert exif[0x0110] == "Camera 5" and "Firmware" not in str(exif.get(0x0131))
            taken = exif.get_ifd(0x8769)
            assert taken[0x9003] == "2024:05:06 07:08:09" and 0xA002 not in taken and 0x927C not in taken
            assert bool(exif.get_ifd(0x8825)) == gps
            if ending in (".jpg", ".png", ".tif"):
                assert file.info["dpi"] == pytest.approx((300, 300), abs=0.1)


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_sixteen_bits_come_back_as_sixteen(tmp_path: Path, ending: str) -> None:
    def ramp(image_3HW: Tensor, job: Job, seed: int) -> Restored:
        ramp_W = torch.linspace(0, 1, 3000)  # more levels than eight bits have
        return Restored(torch.stack([ramp_W, ramp_W.flip(0), ramp_W / 2])[:, None].repeat(1, 2, 1))

    deep = np.full((4, 6, 3), 12345, dtype=np.uint16)
    (tmp_path / "in").mkdir()
    write_16_bits(tmp_path / "in" / f"rgb{ending}", deep, {})
    write_16_bits(tmp_path / "in" / f"rgba{ending}", np.dstack([deep, deep[..., :1]]), {})
    Image.fromarray(deep[..., 0]).save(tmp_path / "in" / f"gray{ending}")
    plan = plan_restoration(tmp_path / "in", tmp_path / "out", ending=ending)
    assert restore_files(plan, ramp).num_restored == 3
    wanted = (torch.linspace(0, 1, 3000) * 65535).round()
    for name in ("rgb", "rgba"):
        file = str(tmp_path / "out" / f"{name}{ending}")
        got = cv2.imread(file, cv2.IMREAD_UNCHANGED)  # BGR
        assert got.dtype == np.uint16 and got.shape == (2, 3000, len(name))
        assert np.array_equal(got[1, :, 2], wanted.numpy().astype(np.uint16))
        assert load_picture(file).bits == 16


@pytest.mark.skipif(not READS_HEIC, reason="pillow-heif is not installed")
def test_heic_is_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (64, 48), (200, 90, 40)).save(tmp_path / "in" / "a.heic")
    _, entries = run(tmp_path / "in", tmp_path / "out")
    assert entries["a.heic"]["output"] == "a.png"
    assert (load_image(tmp_path / "out" / "a.png")[:, 20, 20] * 255 - torch.tensor([200.0, 90, 40])).abs().max() < 4


def test_without_its_reader_heic_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varestorer.utils.image_files.READS_HEIC", False)
    (tmp_path / "a.heic").write_bytes(b"some")
    report = restore_files(plan_restoration(tmp_path / "a.heic", tmp_path / "out"), double)
    assert "pip install pillow-heif" in report.failed["a.heic"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file"):
        restore_files(plan_restoration(image, tmp_path / "file/out"), double)


def test_alpha_is_resized_and_kept_with_the_color_profile(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.new("RGBA", (8, 6), (200, 100, 50, 255))
    image.paste((10, 20, 30, 0), (0, 0, 4, 6))
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in/a.png", icc_profile=profile)
    write_image(tmp_path / "in/b.png")
    run(tmp_path / "in", tmp_path / "out")
    before, after = load_picture(tmp_path / "in/a.png"), load_picture(tmp_path / "out/a.png")
    assert before.alpha is not None and after.alpha is not None
    assert after.icc_profile == profile and after.image.shape == (3, 12, 16)
    assert (after.alpha - resize(before.alpha, (12, 16))).abs().max() <= 0.5 / 255 + 1e-6
    assert (after.alpha[..., 0].max(), after.alpha[..., -1].min()) == (0, 1)
    # what nobody sees has run into no edge, and is not kept either
    assert ((after.image * 255).round() == torch.tensor([200, 100, 50])[:, None, None]).all()
    plain = load_picture(tmp_path / "out/b.png")
    assert (plain.alpha, plain.icc_profile) == (None, None)


def test_a_gray_file_comes_back_with_one_channel_and_others_as_they_were(tmp_path: Path) -> None:
    gray = Image.linear_gradient("L").resize((8, 6))
    (tmp_path / "in").mkdir()
    kinds = {"L": "L", "1": "L", "LA": "LA", "I;16": "I;16", "RGB": "RGB", "RGBA": "RGBA"}
    for number, mode in enumerate(kinds):
        gray.convert(mode).save(tmp_path / "in" / f"{number}.png")
    run(tmp_path / "in", tmp_path / "out")
    for number, mode in enumerate(kinds.values()):
        with Image.open(tmp_path / "out" / f"{number}.png") as file:
            assert file.mode == mode


def test_colors_that_a_restoration_gave_to_gray_are_kept(tmp_path: Path) -> None:
    Image.new("L", (8, 6), 90).save(tmp_path / "a.png")
    tint = torch.tensor([1, 0.5, 0.2])[:, None, None]
    run(tmp_path / "a.png", tmp_path / "out", lambda image, job, seed: Restored(image * tint))
    with Image.open(tmp_path / "out" / "a.png") as file:
        assert file.mode == "RGB" and file.getpixel((2, 2)) == (90, 45, 18)


def test_what_was_left_out_of_an_image_is_logged_and_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "in").mkdir()
    first, second = (Image.new("L", (6, 4), value) for value in (255, 0))
    first.save(tmp_path / "in/a.gif", save_all=True, append_images=[second])
    write_image(tmp_path / "in/b.png")
    with caplog.at_level(logging.INFO):
        _, entries = run(tmp_path / "in", tmp_path / "out")
    assert entries["a.gif"]["note"] == "animated: first of 2 frames" and "note" not in entries["b.png"]
    assert "a.gif: animated: first of 2 frames" in caplog.text
    assert load_image(tmp_path / "out/a.png")[:, 1:, 1:].min() == 1


def test_uncertainty_becomes_a_heat_map_beside_the_result(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "deep/b.png"):
        write_image(tmp_path / "in" / name)
    _, entries = run(tmp_path / "in", tmp_path / "out", doubt, settings={"prompt": None})
    maps = {"a.jpg": "a.jpg.uncertainty.png", "a.png": "a.png.uncertainty.png", "deep/b.png": "deep/b.uncertainty.png"}
    assert {name: entry["uncertainty"] for name, entry in entries.items()} == maps
    results = {"a.jpg.png", "a.png.png", "deep/b.png"}
    assert files_in(tmp_path / "out") == {*maps.values(), *results, "restore.json"}
    assert entries["deep/b.png"]["caption"] == "a picture called deep/b.png"
    with Image.open(tmp_path / "out/deep/b.uncertainty.png") as file:
        assert file.size == (12, 8)
    heat = load_image(tmp_path / "out/deep/b.uncertainty.png")
    assert (heat - heat_map(torch.linspace(0, 1, 12).expand(8, 12))).abs().max() <= 0.5 / 255 + 1e-6
    brightness = heat.mean(dim=(0, 1))
    assert (brightness.diff() > 0).all() and brightness[0] < 0.01 and brightness[-1] > 0.8


def test_uncertainty_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 6\), got \(2, 3\)"):
        Restored(torch.zeros(3, 4, 6), torch.zeros(2, 3))


def test_pending_are_the_jobs_without_a_result(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        write_image(tmp_path / "in" / name)
    run(tmp_path / "in/b.png", tmp_path / "out")
    plan = plan_restoration(tmp_path / "in", tmp_path / "out")
    assert [job.name for job in plan.pending(overwrite=False)] == ["a.png", "c.png"]
    assert plan.pending(overwrite=True) == plan.jobs


def test_the_report_is_in_natural_order_whatever_was_skipped(tmp_path: Path) -> None:
    write_image(tmp_path / "in/10.png")
    run(tmp_path / "in", tmp_path / "out")
    for name in ("9.png", "11.png"):
        write_image(tmp_path / "in" / name)
    _, entries = run(tmp_path / "in", tmp_path / "out")
    assert list(entries) == ["9.png", "10.png", "11.png"]


def test_an_over_large_file_is_named_with_the_remedy_and_the_rest_goes_on(tmp_path: Path) -> None:
    write_image(tmp_path / "in/a.png", size=(40, 30))
    write_image(tmp_path / "in/b.png")
    report, entries = run(tmp_path / "in", tmp_path / "out", max_pixels=1000)
    assert report.num_restored == 1 and entries["a.png"]["error"].endswith("allow it with max_pixels=1200")
    report, _ = run(tmp_path / "in", tmp_path / "out", max_pixels=1200)
    assert (report.num_restored, report.num_skipped, report.failed) == (1, 1, {})


@pytest.mark.parametrize("restore", [double, doubt])
@pytest.mark.parametrize("part", ["result", "heat map"])
def test_what_the_disk_refuses_is_reported_and_the_rest_is_tried(
    tmp_path: Path, restore: RestoreImage, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"result": "b", "heat map": "b.uncertainty"}
    full = names[part] if restore is doubt else "b"
    for name in ("a.png", "b.png", "c.png"):
        write_image(tmp_path / "in" / name)
    save = Image.Image.save

    def save_half(image: Image.Image, path: Path, **options) -> None:
        save(image, path, **options)
        if re.match(rf"\.{full}\.[0-9a-f]+\.tmp", path.name):
            path.write_bytes(path.read_bytes()[:20])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save_half)
    report, entries = run(tmp_path / "in", tmp_path / "out", restore)
    assert report.num_restored == 2 and set(report.failed) == {"b.png"}
    assert f"cannot write {tmp_path}/out/{full}.png: " in entries["b.png"]["error"]
    assert "No space left on device" in entries["b.png"]["error"] and "\n" not in entries["b.png"]["error"]
    assert {name for name in files_in(tmp_path / "out") if "b" in Path(name).stem.split(".")} == set()
    monkeypatch.undo()
    report, entries = run(tmp_path / "in", tmp_path / "out", restore)
    assert (report.num_restored, report.num_skipped, report.failed) == (1, 2, {})


def test_a_file_too_large_for_the_system_is_not_left_half_written(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    noise = torch.rand(3, 150, 150, generator=torch.Generator().manual_seed(0))
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "in" / name)

    def restore(image_3HW: Tensor, job: Job, seed: int) -> Restored:
        return Restored(noise if job.name == "a.png" else image_3HW)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        report, entries = run(tmp_path / "in", tmp_path / "out", restore)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert set(report.failed) == {"a.png"} and "File too large" in entries["a.png"]["error"]
    assert files_in(tmp_path / "out") == {"b.png", "restore.json"}


def test_files_are_read_ahead_and_written_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.png", "c.png"):
        write_image(tmp_path / "in" / name)
    read = {name: threading.Event() for name in ("a.png", "b.png", "c.png")}

    def load(path: Path, max_pixels: int | None) -> Picture:
        read[path.name].set()
        return load_picture(path, max_pixels)

    def restore(image_3HW: Tensor, job: Job, seed: int) -> Restored:
        if job.name == "a.png":
            assert read["b.png"].wait(10)  # while this thread is busy with a.png
        if job.name == "c.png":
            wait_for(tmp_path / "out/a.png")
        return Restored(image_3HW)

    monkeypatch.setattr("varestorer.systems.folder.load_picture", load)
    report, _ = run(tmp_path / "in", tmp_path / "out", restore)
    assert (report.num_restored, report.failed) == (3, {})


def wait_for(path: Path) -> None:
    """Return when a file is there."""
    for _ in range(1000):
        if path.exists():
            return
        time.sleep(0.01)
    pytest.fail(f"{path} was not written")


def test_no_more_than_a_few_pictures_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        write_image(tmp_path / f"in/{number}.png")
    begun: list[Path] = []
    ended: list[Path] = []

    def load(path: Path, max_pixels: int | None) -> Picture:
        begun.append(path)
        assert len(begun) - len(ended) <= 3 + folder.WRITERS
        return load_picture(path, max_pixels)

    def save(path: Path, *picture: object) -> None:
        save_image(path, *picture)
        ended.append(path)

    monkeypatch.setattr(folder, "load_picture", load)
    monkeypatch.setattr(folder, "save_image", save)
    report, _ = run(tmp_path / "in", tmp_path / "out")
    assert report.num_restored == len(begun) == len(ended) == 12


def test_failures_are_listed_in_the_order_of_the_files(tmp_path: Path) -> None:
    for name in ("1.png", "3.png"):
        write_image(tmp_path / "in" / name)
    for name in ("2.png", "10.png", "0.cr2"):
        (tmp_path / "in" / name).write_text("no image")
    report, _ = run(tmp_path / "in", tmp_path / "out")
    assert list(report.failed) == ["0.cr2", "2.png", "10.png"]
