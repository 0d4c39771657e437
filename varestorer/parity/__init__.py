"""Comparison of our networks with golden tensors, by paper.

Every module here has `compare(folder)`, which yields a `Check` for each golden tensor of a folder of its form.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch

from varestorer.parity.golden import Check

FORMS = {"hit.json": "hvar", "*.io.safetensors": "varsr"}
"""Pattern of a file that tells the form of a folder -> the module that compares it; "infinity" where none is there."""


def compare(folder: str | Path) -> Iterator[Check]:
    """Every golden tensor of a folder, compared one after the other."""
    form = next((name for pattern, name in FORMS.items() if any(Path(folder).glob(pattern))), "infinity")
    with _one_thread():
        yield from import_module(f"{__name__}.{form}").compare(folder)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in the order of one thread, as they were when the tensors were made.

    Attention on random weights is sharp: with two threads the features of `isr10` differ by 5e-4 instead of 7e-6.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
