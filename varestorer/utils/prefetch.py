"""Making the next things in other threads while the present one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def prefetch(
    make: Callable[[Item], Made], items: Iterable[Item], depth: int = 1, threads: int = 1, finish: bool = False
) -> Iterator[Made]:
    """Yield `make(item)` of each item, in order, made by other threads that are at most `depth` items ahead.

    What `make` raises is raised here, at its item's turn; nothing is begun after that, or once the caller stops. Items
    are taken in this thread. More than `depth + 1` threads would have nothing to do. `finish`: make all of the items
    that were taken even if this ends early.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")
    waiting: deque[Future[Made]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=not finish)
