import os

import pytest
import torch

from varestorer.utils.device import pick_device
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.files import atomic_write


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
