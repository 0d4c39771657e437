"""Data workers that cannot do their work end a command in one line; what is slow is waited for."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from varestorer.data import workers
from varestorer.data.loader import build_loader
from varestorer.data.workers import StopWaitingError, deaths_explained, watched, worker_options
from varestorer.utils.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are watched by torch alone")


class Numbers(Dataset):
    """0, 1, 2, ..., but for what `fault` does at 3."""

    def __init__(self, fault=lambda: None) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return 8

    def __getitem__(self, n: int) -> object:
        found = self.fault() if n == 3 and get_worker_info() else None
        return n if found is None else found


def numbers(fault=lambda: None, **options):
    loader = DataLoader(Numbers(fault), batch_size=None, **worker_options(2))
    return watched(loader.__iter__, "some.workers", **options)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(workers, "POLL", 0.2)
    monkeypatch.setattr(workers, "STALLED", 1.4)
    monkeypatch.setattr(workers, "TICKS", 2)


def stopped():
    os.kill(os.getpid(), signal.SIGSTOP)


def busy():
    end = time.process_time() + 1.5
    while time.process_time() < end:
        pass


FAULTS = {
    "a value that cannot be handed over": lambda: lambda: None,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "ended": lambda: os._exit(3),
    "stopped": stopped,
    "asleep": lambda: time.sleep(60),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_that_gives_nothing_ends_the_work_in_one_line(fault):
    start = time.monotonic()
    with (
        pytest.raises(UserError, match=r"the data workers failed: .*--shm-size.*set some.workers=0$") as caught,
        deaths_explained("some.workers"),
    ):
        list(numbers(FAULTS[fault]))
    assert "\n" not in str(caught.value) and time.monotonic() - start < 20


def test_the_death_of_a_worker_is_explained_in_the_middle_of_other_work():
    others = {child.pid for child in torch.multiprocessing.active_children()}  # of tests before this one
    with pytest.raises(UserError, match=r"the data workers failed: .*Killed"), deaths_explained("some.workers"):
        made = numbers(lambda: time.sleep(60))
        next(made)
        pid = next(child.pid for child in torch.multiprocessing.active_children() if child.pid not in others)
        os.kill(pid, signal.SIGKILL)
        for _ in range(20):  # until the parent is told, on a busy machine too
            busy()


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="of somebody else"), deaths_explained("some.workers"):
        raise RuntimeError("of somebody else")

    def fail():
        raise OSError("in a data set")

    with pytest.raises(OSError, match="Caught OSError in DataLoader worker"):
        list(numbers(fail))


def test_a_worker_that_works_for_long_is_waited_for():
    assert list(numbers(busy)) == list(range(8))


def test_who_wants_to_stop_need_not_wait():
    made = numbers(lambda: time.sleep(60), wants_stop=lambda: True)
    with pytest.raises(StopWaitingError):
        list(made)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of torch's unfinished iterator
def test_workers_that_cannot_be_started(monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.multiprocessing, "Queue", fail)
    with pytest.raises(UserError, match="cannot be started: .*No space left.*some.workers=0"):
        numbers()


def test_a_loader_of_pairs_is_watched_too():
    class Pairs(Numbers):
        def __getitem__(self, n):
            super().__getitem__(n)
            return {"hq": torch.zeros(3, 2, 2), "lq": torch.zeros(3, 2, 2), "name": str(n), "key": n}

    for fault in (stopped, FAULTS["killed"]):
        with pytest.raises(UserError, match="set trainer.num_workers=0"), deaths_explained("trainer.num_workers"):
            for batch in build_loader(Pairs(fault), 2, num_workers=1):
                assert batch["key"][0] < 8


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="wants to mount a small /dev/shm")
def test_shared_memory_that_is_too_small(tmp_path):
    code = """
import torch
from torch.utils.data import DataLoader
from varestorer.data.workers import deaths_explained, watched, worker_options
from varestorer.utils.errors import UserError
loader = DataLoader([torch.zeros(2_000_000)] * 4, batch_size=None, **worker_options(1))
try:
    with deaths_explained("k"):
        list(watched(loader.__iter__, "k"))
except UserError as error:
    print(error)
"""
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    words = ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert done.stdout.startswith("the data workers failed") and "of 1 MB free" in done.stdout
    assert "a data worker cannot hand over what it made" in done.stderr
