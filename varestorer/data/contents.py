"""What decides which picture a sample number shows, beside the config: kept with a checkpoint, compared by a resume.

The order of all samples is drawn for a list of photographs. One that came, went or got another name changes which
picture sample n is, from the first epoch on; so do other shards, other texts, and other shares of a mixture.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import chain
from pathlib import Path

from varestorer.data.shards import Packed
from varestorer.utils.scanning import first_names

Contents = dict[str, str]
"""In the data set's order: name -> what tells it from another of this name."""

THREADS, AT_ONCE = 16, 1000  # on a network a look at a file is mostly waiting


def contents_of(dataset: object) -> Contents | None:
    """What a data set says of itself by its `contents()`; None for one that has none."""
    say = getattr(dataset, "contents", None)
    return None if say is None else say()


def file_contents(items: Iterable[tuple[Path | Packed, ...]], root: str | os.PathLike | None) -> Contents:
    """Files with their sizes, and shards with a hash of what is where in them.

    Args:
        items: of an `ImageStore`.
        root: of the data set, to which names are relative, so that it may move; None: names alone.
    """
    paths: list[Path] = []
    shards: dict[Path, list[str]] = defaultdict(list)
    for file in chain.from_iterable(items):
        if isinstance(file, Packed):
            shards[file.shard].append(str((file.image, file.features)))
        else:
            paths.append(file)
    folder = None if root is None else Path(root).expanduser()
    names = [path.name if folder is None else os.path.relpath(path, folder) for path in paths]
    parts = [paths[start : start + AT_ONCE] for start in range(0, len(paths), AT_ONCE)]
    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(names, chain.from_iterable(pool.map(_sizes, parts)), strict=True))
    return found | {
        path.name: f"{len(samples)} samples, {sha256(' '.join(samples).encode(errors='backslashreplace')).hexdigest()}"
        for path, samples in shards.items()
    }


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> str | None:
    """What is added, removed, renamed and changed, counted, with a few names; None where nothing is."""
    if list(before.items()) == list(after.items()):
        return None
    added = {name: mark for name, mark in after.items() if name not in before}
    gone: dict[str, list[str]] = defaultdict(list)
    for name, mark in before.items():
        if name not in after:
            gone[mark].append(name)
    renamed = {name: gone[mark].pop(0) for name, mark in added.items() if gone[mark]}
    lists = {
        "added": [name for name in added if name not in renamed],
        "removed": list(chain.from_iterable(gone.values())),
        "renamed": [f"{old} -> {new}" for new, old in renamed.items()],
        "changed": [name for name, mark in before.items() if after.get(name, mark) != mark],
    }
    told = [f"{len(names)} {kind} ({first_names(names)})" for kind, names in lists.items() if names]
    return "; ".join(told) or "the same files in another order"


def _sizes(paths: Iterable[Path]) -> list[str]:
    return [_size(path) for path in paths]


def _size(path: Path) -> str:
    try:
        return f"{path.stat().st_size} bytes"
    except OSError:  # it is a broken one when its turn comes
        return "unreadable"
