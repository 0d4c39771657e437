"""A limit of memory: what is reckoned, and that a whole run keeps to it."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from varestorer.systems.budget import Budget, measure
from varestorer.systems.varestorer import VARestorer
from varestorer.utils.device import parse_memory
from varestorer.utils.errors import UserError
from varestorer.utils.images import Writing, save_image

MIB = 2**20
BUDGET = Budget(1000 * MIB, 540 * MIB, 20 * MIB, 10 * MIB, reading=30, writing=20, channels=3, most=8)


@pytest.mark.parametrize(("text", "size"), [("6G", 6 * 2**30), ("1.5 GiB", 1.5 * 2**30), ("800m", 800 * MIB), ("7", 7)])
def test_sizes_are_read(text: str, size: float) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["much", "-1G", "0G", "G", "6X"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="wanted a size such as 6G"):
        parse_memory(text)


def test_larger_pictures_leave_room_for_fewer_squares_until_they_are_refused() -> None:
    sizes = [10**5 * step for step in range(1, 16)]
    fit = []
    for size in sizes:
        try:
            fit.append(BUDGET.batch_for(size, 16 * size, 16 * size))
        except UserError as error:
            assert "more than max_memory=0.98G" in str(error)
            fit.append(0)
    assert fit[0] == 8 and fit[-1] == 0 and fit == sorted(fit, reverse=True)
    largest = BUDGET.largest(4, 4) / 16
    assert sum(size <= largest for size in sizes) == sum(count > 0 for count in fit)


def test_needs_are_measured_and_too_little_is_said(tmp_path: Path) -> None:
    def restore(number: int) -> None:
        torch.ones(number, 64 * MIB // 4)

    empty = replace(BUDGET, held=0, batch_base=0, square=0, reading=0, writing=0)
    cpu = torch.device("cpu")
    found = measure(2**40, cpu, restore, "a.png", Writing(), empty)
    if found is None:
        pytest.skip("this system does not tell what a process holds")
    assert found.square == pytest.approx(64 * MIB, rel=0.2) and found.held > 50 * MIB
    assert 8 < found.writing < 60 and 12 < found.reading < 200
    assert measure(found.held + 32 * MIB, cpu, restore, "a.png", Writing(), empty) is None


RUN = """
import resource, sys
from varestorer.commands import main
from varestorer.systems.base import RestoredBatch
from varestorer.systems.varestorer import VARestorer

real, calls = VARestorer.restore_squares, []
def quick(self, squares, numbers, request):
    calls.append(numbers)
    return real(self, squares, numbers, request) if len(calls) < 8 else RestoredBatch(squares.clone(), [])
VARestorer.restore_squares = quick
sys.argv = ["varestorer", "restore", *sys.argv[1:]]
status = main()
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are in other units elsewhere")
@pytest.mark.parametrize("limit", ["1.2G", "1.6G"])
def test_the_largest_picture_keeps_to_the_limit_and_a_larger_one_is_refused(tmp_path: Path, limit: str) -> None:
    """With the networks themselves only at first: it would take minutes."""

    def run(side: int) -> tuple[str, int, int]:
        save_image(tmp_path / "a.png", torch.rand(3, side, side))
        words = [f"input={tmp_path / 'a.png'}", f"output={tmp_path / 'b.png'}", f"max_memory={limit}", "overwrite=true"]
        done = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True, check=False)
        text = done.stdout + done.stderr
        return text, int(re.findall(r"peak (\d+)", text)[0]) * 1024, done.returncode

    text, peak, status = run(4000)
    assert status == 1 and "more than max_memory" in text and peak < parse_memory(limit)
    megapixels = float(re.findall(r"results of up to ([\d.]+) megapixels", text)[0])
    text, peak, status = run(int((0.93 * megapixels * 1e6) ** 0.5 / 4))
    assert status == 0 and parse_memory(limit) * 0.7 < peak < parse_memory(limit), text


@pytest.mark.gpu
def test_on_a_gpu_what_torch_takes_keeps_to_the_limit() -> None:
    device = torch.device("cuda")
    system = VARestorer.from_pretrained(device="cuda", merge=True).accelerate()
    empty = replace(BUDGET, held=0, batch_base=0, square=0, reading=0, writing=0, most=512)

    def row(number: int) -> None:
        system.restore(torch.rand(3, 128, 128 * number), 1, trained_scale=1, overlap=0, batch=number)

    row(1)
    limit = torch.cuda.memory_allocated(device) + 512 * MIB
    found = measure(limit, device, row, "a.png", Writing(), empty)
    assert found is not None
    batch = found.batch_for(256 * 256, 1024 * 1024, 1024 * 1024)
    torch.cuda.reset_peak_memory_stats(device)
    system.restore(torch.rand(3, 256, 256), 4, batch=batch)
    assert batch > 8 and torch.cuda.max_memory_allocated(device) <= limit
