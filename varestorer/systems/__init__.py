"""The papers' systems, and the one door to them: `load`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from varestorer.utils.errors import UserError
from varestorer.weights.resolve import locate, release_of, system_of

SYSTEMS = {"varestorer": "VARestorer", "varsr": "VARSR", "hvar": "HVAR"}
"""Name of a system, which is that of its module, -> its class."""


def system_class(name: str) -> Any:
    """The class of a system; UserError for an unknown name."""
    if name not in SYSTEMS:
        raise UserError(f"system must be one of {', '.join(SYSTEMS)}, got {name}")
    return getattr(import_module(f"varestorer.systems.{name}"), SYSTEMS[name])


def load(name: str | Path | None = None, **options: Any) -> Any:
    """Load any paper's system, in evaluation mode; options and errors as of `System.from_pretrained`.

    A bundle's `config.json` and a run's config name their system; a published file is known by its tensors; None is
    "nano", which comes with the package.
    """
    if release := release_of(name):
        return system_class(release.system).from_pretrained(name, **options)
    path = locate(name, options)
    return system_class(system_of(path)).from_pretrained(path, **options)
