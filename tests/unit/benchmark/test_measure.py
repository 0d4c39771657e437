"""One clock: variants in turns, their parts, medians and spreads, memory, and the rates of a device."""

import math
from itertools import count

import pytest
import torch

from varestorer.benchmark import measure as measure_module
from varestorer.benchmark import roofline
from varestorer.benchmark.counting import Count
from varestorer.benchmark.measure import REST, Clock, Meter, Timing, measure, peak_memory
from varestorer.benchmark.roofline import Rates, copy_bandwidth, device_description, library_versions, matrix_rate
from varestorer.utils.watch import observed, watch

CPU = torch.device("cpu")


def test_median_and_distance_of_the_quartiles() -> None:
    found = Timing([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.median, found.spread) == (3.0, 2.0)
    assert Timing([7.0]).spread == 0


def test_works_take_turns_after_their_warm_up_and_the_first_run_is_told() -> None:
    calls: list[str] = []
    told: list[str] = []
    works = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = measure(works, 3, 2, CPU, told=lambda name, seconds: told.append(name))
    assert "".join(calls) == "aabb" + "ababab" and told == ["a", "b"]
    assert [len(found[name].whole.seconds) for name in "ab"] == [3, 3]


def test_when_time_is_up_each_work_is_still_timed_once() -> None:
    calls: list[str] = []
    works = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = measure(works, 9, 9, CPU, most_seconds=-1)
    assert "".join(calls) == "ab" + "ab" and len(found["a"].whole.seconds) == 1


def test_a_work_that_fails_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("too little memory\nmore of it")

    assert list(measure({"broken": fail, "whole": lambda: None}, 1, 1, CPU)) == ["whole"]
    assert "broken is not measured: too little memory more of it" in caplog.text


def test_the_parts_make_up_the_whole() -> None:
    @watch("outer")
    def outer() -> None:
        with watch("inner"):  # counts for the outer one
            pass

    def work() -> None:
        outer()
        with watch("last"):
            pass

    measured = measure({"x": work}, 2, 1, CPU)["x"]
    assert list(measured.parts) == ["outer", "last", REST]
    for turn in range(2):
        assert math.isclose(sum(part.seconds[turn] for part in measured.parts.values()), measured.whole.seconds[turn])


def test_a_part_is_seen_only_while_somebody_looks() -> None:
    reading = count()
    with watch("x"):
        pass
    meter = Meter(lambda: next(reading))
    with pytest.raises(KeyError), observed(meter):
        with watch("x"):
            pass
        with watch("x"):
            raise KeyError
    with watch("x"):
        pass
    assert meter.sums(5) == {"x": 2, REST: 3} and next(reading) == 4


def test_peak_memory_sees_what_is_freed_again() -> None:
    peak = peak_memory(lambda: torch.ones(64, 2**18).sum(), CPU)
    if peak is None:
        pytest.skip("this system does not tell the memory of a process")
    assert 60e6 < peak < 140e6
    done: list[int] = []
    assert peak_memory(lambda: done.append(1), torch.device("meta")) is None and done == [1]


def test_a_floor_is_the_larger_of_two_times() -> None:
    cost = Count(flops=100, bytes=30)
    assert Rates({"fp32": 10}, 30).floor(cost, "fp32") == 10
    assert Rates({"fp32": 1000}, 30).floor(cost, "fp32") == 1


def test_time_is_what_passes_between_the_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr(measure_module.time, "perf_counter", lambda: float(next(ticks)))
    clock = Clock(CPU)
    assert clock.time(lambda: [next(ticks) for _ in range(4)]) == 5.0
    start, end = clock.mark(), clock.mark()
    assert clock.between(start, end) == 1.0


def test_rates_are_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_least", lambda work, device: [work(), 2.0][1])
    monkeypatch.setitem(roofline.MATRIX_SIDES, "cpu", (4, 8))
    monkeypatch.setitem(roofline.COPY_BYTES, "cpu", 1000)
    assert matrix_rate(CPU, torch.float32) == 8**3
    assert copy_bandwidth(CPU) == 1000


def test_device_and_versions_have_names() -> None:
    assert "thread" in device_description(CPU)
    assert library_versions()["torch"].partition("+")[0] == torch.__version__.partition("+")[0]


@pytest.mark.gpu
def test_events_tell_the_time_of_a_gpu() -> None:
    device = torch.device("cuda")
    x = torch.rand(2048, 2048, device=device)
    found = measure({"product": lambda: x @ x, "nothing": lambda: None}, 5, 2, device)
    assert found["product"].whole.median > found["nothing"].whole.median > 0
