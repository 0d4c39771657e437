"""The remembered list of a folder: fast when nothing changed, never wrong about what did."""

import os
import shutil

import pytest

from varestorer.data.folders import hq_images
from varestorer.utils import scanning
from varestorer.utils.files import cache_folder
from varestorer.utils.scanning import list_images


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder, old enough to be remembered."""
    monkeypatch.setattr(scanning, "MIN_FILES", 2)
    monkeypatch.setattr(scanning, "SETTLED", -1)
    for name in ("a10.png", "a2.png", "sub/deep/b.jpg", "notes.txt", "empty/.keep"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"")
    return tmp_path / "photos"


@pytest.fixture
def walks(monkeypatch):
    """How often a folder was searched."""
    seen = []
    search = scanning.scan_folder
    monkeypatch.setattr(scanning, "scan_folder", lambda root: seen.append(root) or search(root))
    return seen


def relative(root):
    return [path.relative_to(root).as_posix() for path in list_images(root)]


def test_a_second_look_does_not_search(photos, walks, caplog, monkeypatch):
    assert relative(photos) == relative(photos) == ["a2.png", "a10.png", "sub/deep/b.jpg"]
    monkeypatch.setattr(scanning, "_REPORTED", set())  # as in another process
    list_images(photos)
    assert caplog.messages == [f"{photos}: 1 files are not used as images, by their extension: notes.txt"] * 2
    assert len(walks) == 1
    assert hq_images(photos) == list_images(photos) and len(walks) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "sub" / "deep" / "new.png").write_bytes(b""),
        lambda root: (root / "empty" / "first.png").write_bytes(b""),
        lambda root: (root / "a2.png").unlink(),
        lambda root: (root / "a2.png").rename(root / "a3.png"),
        lambda root: shutil.rmtree(root / "sub"),
        lambda root: (root / "sub").rename(root / "other"),
        lambda root: (root / "more").mkdir(),
        lambda root: (root / "sub" / "link").symlink_to(root.parent),
    ],
)
def test_changes_are_noticed(photos, walks, change):
    list_images(photos)
    change(photos)
    assert list_images(photos) == scanning.split_images(scanning.scan_folder(photos))[0]
    assert len(walks) >= 2


def test_a_time_that_was_set_back_is_noticed(photos, walks):
    list_images(photos)
    before = os.stat(photos)
    (photos / "new.png").write_bytes(b"")
    os.utime(photos, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "new.png" in relative(photos) and len(walks) == 2


def test_a_linked_folder_is_watched_where_it_is(photos, tmp_path, walks):
    (tmp_path / "elsewhere").mkdir()
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    list_images(photos)
    (tmp_path / "elsewhere" / "c.png").write_bytes(b"")
    assert "linked/c.png" in relative(photos)


def test_content_that_changes_in_place_does_not_change_the_list(photos, walks):
    list_images(photos)
    (photos / "a2.png").write_bytes(b"other")
    assert len(relative(photos)) == 3 and len(walks) == 1


def test_small_and_fresh_folders_are_not_remembered(photos, walks, monkeypatch):
    monkeypatch.setattr(scanning, "MIN_FILES", 4)
    list_images(photos)
    monkeypatch.setattr(scanning, "MIN_FILES", 2)
    monkeypatch.setattr(scanning, "SETTLED", 60.0)
    list_images(photos)
    assert not (cache_folder() / "folders").exists() and len(walks) == 2


def test_a_damaged_list_is_made_again(photos, walks, caplog):
    list_images(photos)
    (path,) = (cache_folder() / "folders").iterdir()
    for content in ("{", '{"format": 0}', "[]"):
        path.write_text(content)
        assert len(relative(photos)) == 3
    assert len(walks) == 4 and "is made again" in caplog.text


def test_a_cache_that_cannot_be_written_is_a_warning(photos, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("VARESTORER_CACHE", str(tmp_path / "file"))
    assert len(relative(photos)) == 3
    assert "not remembered" in caplog.text and "VARESTORER_CACHE" in caplog.text
