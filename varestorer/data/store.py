"""Reading the images of a data set again and again: a bounded cache, and patience with a few broken files.

Beside the config the images decide which picture a sample number shows, as the order of all samples is drawn for a
list of photographs: one that came, went or got another name changes it from the first epoch on; so do other shards,
other texts, and other shares of a mixture. So their `Contents` are kept with a checkpoint, and compared by a resume.
"""

import logging
import os
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import accumulate, chain
from pathlib import Path

from torch import Tensor
from torch.utils.data import get_worker_info

from varestorer.data.shards import Packed
from varestorer.utils.device import num_bytes
from varestorer.utils.errors import UserError
from varestorer.utils.image_files import open_image
from varestorer.utils.images import load_image, to_uint8
from varestorer.utils.scanning import first_names

log = logging.getLogger(__name__)

Item = tuple[Path | Packed, ...]
CACHE_BYTES = 2**30  # over all the loader's workers of a process
MAX_BROKEN = 0.05
HEADERS_TO_CHECK = 300
PIXELS_TO_CHECK = 32_000_000  # about a second of decoding
THREADS, AT_ONCE = 16, 1000  # on a network a look at a file is mostly waiting

Contents = dict[str, str]
"""In the data set's order: name -> what tells it from another of this name."""


class ImageStore:
    """Decoded images by number; an item is a tuple of files, or members of shards, that belong together (maybe a pair).

    Broken files are met with a warning, once, and replaced by the next good item, so that what a number gives depends
    on the files alone. Up to `HEADERS_TO_CHECK` files are looked at in the beginning (a small folder: all of them,
    wholly), the rest when their turn comes. `root` is for messages. UserError, which names it and files, now or in
    `read`: no usable item, or more than 5 % broken ones.
    """

    def __init__(self, items: Sequence[Item], root: str) -> None:
        self.items = list(items)
        self.root = root
        self._broken: dict[int, str] = {}
        self._cache: OrderedDict[int, tuple[Tensor, ...]] = OrderedDict()
        self._cached_bytes = 0
        self._check_some()

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> tuple[int, tuple[Tensor, ...]]:
        """Read item `index`, or the first good one after it: its number, and one uint8 (3, H, W) picture a file."""
        for candidate in chain(range(index, len(self.items)), range(index)):
            images = self._try(candidate)
            if images is not None:
                return candidate, images
        raise UserError(f"{self.root}: none of {len(self.items)} images can be read")

    def read_all(self) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """(number, pictures) of every good item in turn, as `read` gives them."""
        for index in range(len(self.items)):
            images = self._try(index)
            if images is not None:
                yield index, images

    def read_ahead(self) -> None:
        """Read all images now if the cache can hold them together: workers that start afterwards have them in common.

        Workers that each read for themselves have a part of the cache each, too small for the images of all.
        """

        def decoded_bytes(item: Item) -> int:
            try:
                return 3 * sum(map(_num_pixels, item))
            except UserError:  # a broken one is met when it is read
                return 0

        # of a large folder the first headers alone are looked at
        if all(size <= CACHE_BYTES for size in accumulate(map(decoded_bytes, self.items))):
            for index in range(len(self.items)):
                self._try(index)

    def _try(self, index: int) -> tuple[Tensor, ...] | None:
        """The pictures of an item, None if it is broken."""
        if index in self._broken:
            return None
        try:
            return self._load(index)
        except UserError as error:
            self._note(index, error)
            self._stop_if_too_many(len(self.items))
            return None

    def _load(self, index: int) -> tuple[Tensor, ...]:
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        images = tuple(to_uint8(_load(path)) for path in self.items[index])
        self._cache[index] = images
        self._cached_bytes += num_bytes(images)
        worker = get_worker_info()
        limit = CACHE_BYTES // (worker.num_workers if worker else 1)
        while self._cached_bytes > limit and len(self._cache) > 1:
            self._cached_bytes -= num_bytes(self._cache.popitem(last=False)[1])
        return images

    def _note(self, index: int, error: UserError) -> None:
        log.warning("skipping a broken image: %s", error)
        self._broken[index] = str(error)

    def _stop_if_too_many(self, total: int) -> None:
        if len(self._broken) > MAX_BROKEN * total:
            examples = "; ".join(list(self._broken.values())[:5])
            of = f"of {total}" + (" looked at" if total < len(self.items) else "")
            raise UserError(
                f"{self.root}: {len(self._broken)} {of} images are broken (more than {MAX_BROKEN:.0%}); "
                f"repair or remove them: {examples}"
            )

    def _check_some(self) -> None:
        """Open evenly spread files, and decode as many of them as `PIXELS_TO_CHECK` allows."""
        count = min(len(self.items), HEADERS_TO_CHECK)
        budget = PIXELS_TO_CHECK
        for number in range(count):
            index = number * len(self.items) // count
            try:
                for path in self.items[index]:
                    num_pixels = _num_pixels(path)
                    if num_pixels <= budget:
                        _load(path)
                        budget -= num_pixels
            except UserError as error:
                self._note(index, error)
        self._stop_if_too_many(count)


def _load(path: Path | Packed) -> Tensor:
    return path.load() if isinstance(path, Packed) else load_image(path)


def _num_pixels(path: Path | Packed) -> int:
    if isinstance(path, Packed):
        return path.num_pixels()
    with open_image(path) as file:
        return file.width * file.height


def contents_of(dataset: object) -> Contents | None:
    """What a data set says of itself by its `contents()`; None for one that has none."""
    say = getattr(dataset, "contents", None)
    return None if say is None else say()


def file_contents(items: Iterable[tuple[Path | Packed, ...]], root: str | os.PathLike | None) -> Contents:
    """Files of an `ImageStore` with their sizes, and shards with a hash of what is where in them.

    Names are relative to the data set's `root`, so that it may move; None: names alone.
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

    def sizes(start: int) -> list[str]:
        told = []
        for path in paths[start : start + AT_ONCE]:
            try:
                told.append(f"{path.stat().st_size} bytes")
            except OSError:  # it is a broken one when its turn comes
                told.append("unreadable")
        return told

    with ThreadPoolExecutor(THREADS) as pool:
        told = chain.from_iterable(pool.map(sizes, range(0, len(paths), AT_ONCE)))
        found = dict(zip(names, told, strict=True))
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
