"""Making things in another thread, a few ahead."""

import threading
from collections.abc import Iterator

import pytest

from varestorer.utils.prefetch import prefetch


def test_order_is_kept_and_another_thread_does_it() -> None:
    made = list(prefetch(lambda item: (item * 2, threading.current_thread()), range(5), depth=2))
    assert [number for number, _ in made] == [0, 2, 4, 6, 8]
    assert len({thread for _, thread in made}) == 1 and made[0][1] is not threading.main_thread()


def test_no_more_than_depth_items_are_begun() -> None:
    begun = []
    stream = prefetch(begun.append, range(100), depth=3)
    for taken in range(1, 6):
        next(stream)
        assert len(begun) <= taken + 3
    stream.close()
    assert len(begun) <= 5 + 3


def test_an_error_comes_at_its_turn() -> None:
    def make(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        return item

    stream = prefetch(make, range(9))
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(stream)


def test_nothing_gives_nothing() -> None:
    assert list(prefetch(str, [])) == []


def test_items_that_were_taken_are_finished_where_that_is_asked() -> None:
    made = []
    go_on = threading.Event()

    def make(item: int) -> None:
        assert go_on.wait(10)
        made.append(item)

    def items() -> Iterator[int]:
        yield from range(3)
        go_on.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(prefetch(make, items(), depth=4, finish=True))
    assert made == [0, 1, 2]


def test_several_threads_keep_the_order() -> None:
    both = threading.Barrier(2, timeout=10)

    def make(item: int) -> int:
        both.wait()  # no thread alone gets past this
        return item * 2

    assert list(prefetch(make, range(6), depth=2, threads=2)) == [0, 2, 4, 6, 8, 10]
