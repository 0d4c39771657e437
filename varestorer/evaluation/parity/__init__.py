"""Comparison of our networks with golden tensors, by paper.

Every module here has `compare(folder)`, which yields a `Check` for each golden tensor of a folder of its form.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from varestorer.utils.checks import Check

FORMS = {"hit.json": "hvar", "*.io.safetensors": "varsr"}
"""Pattern of a file that tells the form of a folder -> the module that compares it; "infinity" where none is there."""


def form_of(folder: str | Path) -> str:
    """The module that compares a folder."""
    return next((name for pattern, name in FORMS.items() if any(Path(folder).glob(pattern))), "infinity")


def compare(folder: str | Path) -> Iterator[Check]:
    """Every golden tensor of a folder, compared one after the other."""
    yield from import_module(f"{__name__}.{form_of(folder)}").compare(folder)
