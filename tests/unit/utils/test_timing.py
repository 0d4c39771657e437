"""One clock: variants in turns, medians and spreads, and the rates of a device."""

from itertools import count

import pytest
import torch

from varestorer.utils import rates, timing
from varestorer.utils.rates import copy_bandwidth, device_description, library_versions, matrix_rate
from varestorer.utils.timing import Clock, Timing, in_turns

CPU = torch.device("cpu")


def test_median_and_distance_of_the_quartiles() -> None:
    found = Timing([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.median, found.spread) == (3.0, 2.0)
    assert Timing([7.0]).spread == 0


def test_variants_take_turns_after_their_warm_up() -> None:
    calls: list[str] = []
    works = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = in_turns(works, repeats=3, warmup=2, device=CPU)
    assert "".join(calls) == "aabb" + "ababab"
    assert [len(timings[name].seconds) for name in "ab"] == [3, 3]


def test_time_is_what_passes_between_the_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(ticks)))
    clock = Clock(CPU)
    assert clock.time(lambda: [next(ticks) for _ in range(4)]) == 5.0
    start, end = clock.mark(), clock.mark()
    assert clock.between(start, end) == 1.0


def test_rates_are_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def two_seconds(works, repeats, warmup, device):
        for work in works.values():
            work()
        return {name: Timing([2.0]) for name in works}

    monkeypatch.setattr(rates, "in_turns", two_seconds)
    monkeypatch.setitem(rates.MATRIX_SIDES, "cpu", (4, 8))
    monkeypatch.setitem(rates.COPY_BYTES, "cpu", 1000)
    assert matrix_rate(CPU, torch.float32) == 8**3
    assert copy_bandwidth(CPU) == 1000


def test_device_and_versions_have_names() -> None:
    assert "thread" in device_description(CPU)
    assert library_versions()["torch"].partition("+")[0] == torch.__version__.partition("+")[0]


@pytest.mark.gpu
def test_events_tell_the_time_of_a_gpu() -> None:
    device = torch.device("cuda")
    x = torch.rand(2048, 2048, device=device)
    found = in_turns({"product": lambda: x @ x, "nothing": lambda: None}, repeats=5, warmup=2, device=device)
    assert found["product"].median > found["nothing"].median > 0
