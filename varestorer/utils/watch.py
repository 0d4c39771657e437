"""Where the pipeline says which part of it is at work, for whoever measures; else it costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, ExitStack, contextmanager
from typing import Any

Observer = Callable[[str], AbstractContextManager[Any]]
"""Called with the name of a part; what it returns is open while that part is at work."""

_observers: tuple[Observer, ...] = ()
_is_open = False


class watch(ContextDecorator):  # noqa: N801  # reads as a verb: `with watch("quantize")`, `@watch("restorer")`
    """Around a named part of the pipeline; a part inside another counts for the outer one."""

    def __init__(self, part: str) -> None:
        self.part = part
        self._stack: ExitStack | None = None

    def _recreate_cm(self) -> watch:  # of a decorated function: one for each call
        return watch(self.part)

    def __enter__(self) -> None:
        global _is_open
        if _observers and not _is_open:
            _is_open, self._stack = True, ExitStack()
            for observer in _observers:
                self._stack.enter_context(observer(self.part))

    def __exit__(self, *_: object) -> None:
        global _is_open
        if self._stack is not None:
            self._stack.close()
            _is_open, self._stack = False, None


@contextmanager
def observed(*observers: Observer) -> Iterator[None]:
    """Let observers see the parts of what is done inside the block."""
    global _observers
    before, _observers = _observers, observers
    try:
        yield
    finally:
        _observers = before
