"""From a dataset to batches, for any number of workers and processes."""

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from varestorer.data.datasets import Sample
from varestorer.data.workers import ErrorsAsValues, watched, worker_options
from varestorer.utils.errors import UserError
from varestorer.utils.seeds import torch_generator

WORKERS_KEY = "trainer.num_workers"


class Batch(TypedDict):
    """B pairs: `hq`, `lq` (B, 3, H, W) float32 in [0, 1]; B names; `key` (B,) int64 sample numbers.

    Data sets with text add `text`: of each prompt its features (T, E), or None for the null text. Those with classes
    add `label` (B,) int64; where a mixture has some without, these are 0.
    """

    hq: Tensor
    lq: Tensor
    name: list[str]
    key: Tensor
    text: NotRequired[list[Tensor | None]]
    label: NotRequired[Tensor]


class ShardedNumbers:
    """Endless lists of sample numbers: this process's part of every global batch.

    Global batch g holds the numbers `start + g * batch_size * world` and following; process r takes every
    `world`-th of them from the r-th on.
    """

    def __init__(self, batch_size: int, start_sample: int, rank: int, world: int) -> None:
        self.first, self.size, self.world = start_sample + rank, batch_size * world, world

    def __iter__(self) -> Iterator[list[int]]:
        return ([*range(first, first + self.size, self.world)] for first in count(self.first, self.size))


class PairLoader(DataLoader[Any]):
    """A DataLoader that raises, here, the UserErrors its workers met.

    Its workers start with `iter`, not with the first batch, and are `workers.watched`, as `wants_stop` is for.
    """

    wants_stop: Callable[[], bool] = staticmethod(lambda: False)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        return map(self._whole, watched(super().__iter__, WORKERS_KEY, self.wants_stop))

    @staticmethod
    def _whole(batch: Any) -> Batch:
        if isinstance(batch, UserError):
            raise batch
        return batch


def collate(samples: list[Sample | UserError]) -> Batch | UserError:
    """Stack samples of equal size; the first error, if any, takes the batch's place."""
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    good = [sample for sample in samples if not isinstance(sample, UserError)]
    hq_B3HW = torch.stack([sample["hq"] for sample in good])
    is_undone = all(sample["lq"] is sample["hq"] for sample in good)
    batch: Batch = {
        "hq": hq_B3HW,
        "lq": hq_B3HW if is_undone else torch.stack([sample["lq"] for sample in good]),
        "name": [sample["name"] for sample in good],
        "key": torch.tensor([sample["key"] for sample in good]),
    }
    if "text" in good[0]:
        batch["text"] = [sample["text"] for sample in good]
    if any("label" in sample for sample in good):
        batch["label"] = torch.tensor([sample.get("label", 0) for sample in good])
    return batch


def build_loader(
    dataset: Dataset[Sample],
    batch_size: int,
    start_sample: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world: int = 1,
    prepare_worker: Callable[[int], None] | None = None,
) -> PairLoader:
    """Build an endless loader of `Batch` whose batches are a function of the position alone.

    Args:
        dataset: samples by number (`PhotoCrops`, `PairedCrops`).
        batch_size: samples of one batch of this process.
        start_sample: number of the first global sample, e.g. `step * batch_size * world` on resuming.
        num_workers: worker processes; the batches are the same for any number.
        rank, world: number of this process, and of processes.
        prepare_worker: called in each worker, with its number, before it makes anything.
    """
    if batch_size < 1 or not 0 <= rank < world or start_sample < 0 or num_workers < 0:
        raise ValueError(
            "wanted batch_size >= 1, 0 <= rank < world, start_sample >= 0, num_workers >= 0, got "
            f"{batch_size=}, {rank=}, {world=}, {start_sample=}, {num_workers=}"
        )
    if num_workers > 1:
        getattr(dataset, "read_ahead", lambda: None)()
    return PairLoader(
        ErrorsAsValues(dataset),
        batch_sampler=ShardedNumbers(batch_size, start_sample, rank, world),  # type: ignore[arg-type]
        collate_fn=collate,
        **worker_options(num_workers, prepare_worker),
        # without one torch draws the workers' seed from the global generator
        generator=torch_generator(0, "loader"),
    )
