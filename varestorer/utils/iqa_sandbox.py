"""What is put around calls into pyiqa: silence, weights, no surprise downloads."""

from __future__ import annotations

import logging
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import torch.hub

from varestorer.utils.errors import reason

log = logging.getLogger(__name__)


class _Printed(StringIO):
    """What was printed inside `quiet`."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep prints and warnings of other people's code off the terminal (to our debug log instead).

    A block inside another adds nothing: what it would put back, another thread may have changed since.
    """
    if isinstance(sys.stdout, _Printed):
        yield
        return
    printed = _Printed()
    with warnings.catch_warnings(), redirect_stdout(printed):
        warnings.simplefilter("ignore")
        yield
    if text := printed.getvalue().strip():
        log.debug("pyiqa printed: %s", text)


@contextmanager
def weights_in_place(files: Mapping[str, Path]) -> Iterator[None]:
    """Make pyiqa and torch look for weights in a hub folder that holds just these files.

    Args:
        files: place inside the hub folder (`pyiqa/x.pth`) -> the file; none: leave the hub folder as it is.
    """
    from pyiqa.utils import download_util

    with tempfile.TemporaryDirectory(prefix="varestorer-metrics-") as temporary:
        # links, because pyiqa takes some files by folder and some by name
        for place, path in files.items():
            link = Path(temporary, place)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(path.resolve())
        previous = torch.hub.get_dir()
        hub = temporary if files else previous
        if files:
            torch.hub.set_dir(hub)
        try:
            # pyiqa remembers the folder of when it was imported; TORCH_HOME may have been set since
            with replaced(download_util, "DEFAULT_CACHE_DIR", str(Path(hub, "pyiqa"))):
                yield
        finally:
            if files:
                torch.hub.set_dir(previous)


@contextmanager
def no_downloads() -> Iterator[None]:
    """Make every way in which pyiqa fetches files fail at once: for metrics outside our table of files."""
    import huggingface_hub.constants
    from pyiqa.utils import download_util

    def refuse(url: Any, *args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError(f"{Path(str(url)).name} is not on this machine and was not fetched")

    with (
        replaced(download_util, "download_url_to_file", refuse),
        replaced(torch.hub, "download_url_to_file", refuse),
        replaced(urllib.request, "urlopen", refuse),
        replaced(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
    ):
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give `owner` another attribute inside the block."""
    previous = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, previous)


@cache
def ask_network(url: str = "https://huggingface.co", seconds: float = 3) -> tuple[threading.Thread, threading.Event]:
    """Ask the host of the weights for an answer, once, in a thread: name servers may take longer than any timeout.

    Returns:
        The thread, and what is set once the host has answered.
    """
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
        except urllib.error.HTTPError:
            answered.set()
        except OSError as error:
            log.debug("%s does not answer: %s", url, reason(error))
        else:
            answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    return thread, answered


@cache
def network_reachable(seconds: float = 0.8) -> bool:
    """Whether the host of the weights answers: at once if `ask_network` was called long enough before."""
    thread, answered = ask_network()
    thread.join(seconds)
    return answered.is_set()
