import errno
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from varestorer.utils import locks, scanning
from varestorer.utils.device import pick_device
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.files import (
    atomic_write,
    cache_folder,
    check_writable,
    expand_user,
    fitting_name,
    original_name,
    read_text,
    write_json,
    write_text,
)
from varestorer.utils.locks import locked
from varestorer.weights.files import load_torch_file
from varestorer.weights.runs import read_tensors


def test_writes_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "new" / "a.txt"
    with atomic_write(target) as path:
        assert path.suffix == ".txt" and path.parent == target.parent
        path.write_text("hello")
        assert not target.exists()
    assert target.read_text() == "hello"
    assert os.listdir(target.parent) == ["a.txt"]


def test_failure_keeps_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="halfway"), atomic_write(target) as path:
        path.write_text("half")
        raise RuntimeError("halfway")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("write: No space left on device")]
)
def test_full_disk_is_a_user_error_naming_the_file(tmp_path, error):
    with pytest.raises(UserError, match="a.bin.*No space left"), atomic_write(tmp_path / "a.bin") as path:
        path.write_text("half")
        raise error
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_a_file_is_a_user_error(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="taken"), atomic_write(tmp_path / "taken" / "a.txt"):
        pass


def test_exit_statuses():
    assert UserError("x").exit_status == 1
    assert UsageError("x").exit_status == 2 and isinstance(UsageError("x"), UserError)


def test_devices(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:1", "mps"):
        with pytest.raises(UserError, match=f"device={name}"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto").type == "cuda" and pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="2 CUDA devices"):
        pick_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:", "", "tpu"])
def test_unknown_device_names(name):
    with pytest.raises(UsageError, match="must be auto"):
        pick_device(name)


LATIN1 = os.fsdecode(b"Mu\xf1oz")


def test_temporary_names_are_never_the_same_not_even_on_two_hosts(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)  # as a process on another machine may have
    with atomic_write(tmp_path / "a.png") as one, atomic_write(tmp_path / "a.png") as other:
        assert one != other and one.suffix == ".png"
        one.touch()
        other.touch()


@pytest.mark.parametrize(
    "name", ["x" * 251 + ".png", "é" * 125 + ".json", "x" * 255, "a." + "x" * 250, LATIN1 + ".txt"]
)
def test_any_name_that_the_system_allows_can_be_written(tmp_path, name):
    write_text(tmp_path / name, "hello")
    assert os.listdir(tmp_path) == [name] and read_text(tmp_path / name) == "hello"


def test_longer_names_are_shortened_and_stay_apart(tmp_path):
    names = [f"sub/{'é' * 120}{end}" for end in ("a", "b")]
    fitted = [fitting_name(name, ".uncertainty.png") for name in names]
    assert len(set(fitted)) == 2
    for name in fitted:
        write_text(tmp_path / name, "")
        assert name.startswith("sub/é") and name.endswith(".uncertainty.png")
    assert fitting_name("sub/short", ".png") == "sub/short.png"


def test_names_that_are_not_utf8_survive_in_json_and_text(tmp_path):
    content = {LATIN1: ["é", "a\nb", "\x1b[31m"]}
    write_json(tmp_path / "a.json", content)
    assert json.loads((tmp_path / "a.json").read_bytes().decode("utf-8")) == content
    assert "é" in (tmp_path / "a.json").read_text(encoding="utf-8")
    write_text(tmp_path / "a.txt", LATIN1)
    assert (tmp_path / "a.txt").read_bytes() == rb"Mu\udcf1oz" and original_name(
        read_text(tmp_path / "a.txt")
    ) == LATIN1


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa dog")
    assert read_text(tmp_path / "a.txt") == "a dog"


def test_files_under_names_that_are_not_utf8_reach_libraries_that_want_utf8(tmp_path):
    path = tmp_path / LATIN1 / "weights.safetensors"
    path.parent.mkdir()
    save_file({"a": torch.arange(3)}, path)
    assert read_tensors(path)["a"].tolist() == [0, 1, 2]
    torch.save({"a": torch.arange(4)}, path.with_suffix(".pth").open("wb"))
    assert load_torch_file(path.with_suffix(".pth"), "cpu")["a"].tolist() == [0, 1, 2, 3]


def test_without_a_home_there_is_no_cache_and_a_tilde_is_refused(tmp_path, monkeypatch):
    def nobody(*args):
        raise KeyError("no such user")

    for name in ("HOME", "XDG_CACHE_HOME", "VARESTORER_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(pwd, "getpwnam", nobody)
    assert cache_folder() is None and scanning.cache_path("folders", tmp_path) is None
    scanning.write_cache(None, {})
    assert scanning.read_cache(None) is None
    with pytest.raises(UsageError, match="~/photos: no home folder is known"):
        expand_user("~/photos")
    assert expand_user("~backup.png") == Path("~backup.png")  # a name, as there is no such user


def test_folders_that_cannot_be_written_are_found_without_leaving_anything(tmp_path):
    check_writable(tmp_path / "a" / "b", "out")
    assert os.listdir(tmp_path) == []
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"cannot write out=.*taken/x"):
        check_writable(tmp_path / "taken" / "x", "out")


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    folder = tmp_path / "out"
    with locked(folder):
        with pytest.raises(UserError, match=rf"out is being written by another command \(process {os.getpid()} on "):
            with locked(folder):
                pass
        (folder / "result").touch()
    with locked(folder):  # free again
        pass
    assert os.listdir(folder) == ["result"]
    with locked(tmp_path / "unused"):
        pass
    assert not (tmp_path / "unused").exists()


def test_a_lock_is_free_once_its_process_is_killed(tmp_path):
    imports = "import time; from pathlib import Path; from varestorer.utils.locks import locked"
    code = f"{imports}\nwith locked(Path({str(tmp_path)!r})): print(1, flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"1\n"
    with pytest.raises(UserError, match="being written"), locked(tmp_path):
        pass
    other.kill()
    other.wait()
    with locked(tmp_path):
        pass


def test_where_there_are_no_locks_the_work_goes_on_with_a_warning(tmp_path, monkeypatch, caplog):
    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with locked(tmp_path):
        assert os.listdir(tmp_path) == []
    assert "no locks in" in caplog.text
