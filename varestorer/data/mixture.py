"""Several data sets as one, in given shares."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from varestorer.data.datasets import Sample
from varestorer.data.degradation.pipeline import check_weights
from varestorer.data.store import Contents, contents_of
from varestorer.utils.errors import UserError
from varestorer.utils.seeds import numpy_generator

BLOCK = 1000


class Mixture(Dataset[Sample]):
    """Data sets mixed sample by sample.

    Of every 1000 samples of a run each source gives its share, in an order keyed by (seed, block). A source is asked
    for its samples 0, 1, 2, ... in its own order, so it goes through its own epochs. Sample n is still a function of n
    alone.

    Args:
        sources: data sets of crops, by names of your choice.
        weights: the share of each, by the same names; they need not sum to one, and are kept to a thousandth.
        crop: side of the crops of all of them, pixels.
        seed: of the order.
    Raises:
        UserError: other crops, or weights that are not those of the sources, not positive or below a thousandth.
    """

    def __init__(self, sources: Mapping[str, Any], weights: Mapping[str, float], crop: int, seed: int) -> None:
        check_weights("data.weights", weights, sources, "data.sources")
        for name, source in sources.items():
            if source.crop != crop:
                raise UserError(f"data.sources.{name}.crop is {source.crop}, but data.crop is {crop}: set them alike")
        self.sources, self.seed, self.crop = list(sources.values()), seed, crop
        self.names = list(sources)
        self.shares = _shares([weights[name] for name in sources])
        self.has_text = any(getattr(source, "texts", None) is not None for source in self.sources)
        self._starts = [0, *accumulate(self.shares)][:-1]
        self._block, self._places = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        """Number of images of all sources; sample numbers go on beyond it."""
        return sum(map(len, self.sources))

    def read_ahead(self) -> None:
        """Before workers start: see `ImageStore.read_ahead`."""
        for source in self.sources:
            getattr(source, "read_ahead", lambda: None)()

    def contents(self) -> Contents:
        """The share of each source, and which files and texts its samples are of."""
        contents: Contents = {}
        for name, share, source in zip(self.names, self.shares, self.sources, strict=True):
            contents[f"share of {name}"] = f"{share} of {BLOCK}"
            contents |= {f"{name}: {what}": mark for what, mark in (contents_of(source) or {}).items()}
        return contents

    def __getitem__(self, n: int) -> Sample:
        """Make sample n, any number >= 0."""
        source, number = self.place(n)
        sample: Sample = self.sources[source][number]
        finished: Sample = {**sample, "key": n}
        if self.has_text:
            finished["text"] = sample.get("text")
        return finished

    def place(self, n: int) -> tuple[int, int]:
        """Which source gives sample n, and the number it has there."""
        block, place = divmod(n, BLOCK)
        if block != self._block:
            self._block = block
            self._places = numpy_generator(self.seed, "mixture", block).permutation(BLOCK)
        ticket = int(self._places[place])
        source = bisect_right(self._starts, ticket) - 1
        # the samples of a source keep their order: count those of the block that came before
        start, end = self._starts[source], self._starts[source] + self.shares[source]
        earlier = self._places[:place]
        rank = int(np.count_nonzero((earlier >= start) & (earlier < end)))
        return source, block * self.shares[source] + rank


def _shares(weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to weights that sum to `BLOCK` (largest remainders)."""
    exact = BLOCK * np.asarray(weights, dtype=np.float64) / sum(weights)
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: BLOCK - shares.sum()]] += 1
    if shares.min() < 1:
        raise UserError(f"data.weights={list(weights)}: a share is below one in {BLOCK}; leave that source out")
    return shares.tolist()
