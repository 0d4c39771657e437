"""From a dataset to batches, for any number of workers and processes."""

from collections.abc import Callable, Iterator
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from varestorer.data.datasets import Sample
from varestorer.data.degradation import Plan
from varestorer.data.degradation.batched import degrade
from varestorer.data.workers import watched, worker_options
from varestorer.utils.errors import UserError
from varestorer.utils.seeds import torch_generator

DEGRADING_DEVICES = ("cpu", "cuda")
WORKERS_KEY = "trainer.num_workers"


class Batch(TypedDict):
    """B pairs: `hq`, `lq` (B, 3, H, W) float32 in [0, 1]; B names; `key` (B,) int64 sample numbers.

    Data sets with text add `text`: of each prompt its features (T, E), or None for the null text. `plan` is what is
    still to be done to each `lq` (None: nothing); `PairLoader` does it and takes it out.
    """

    hq: Tensor
    lq: Tensor
    name: list[str]
    key: Tensor
    text: NotRequired[list[Tensor | None]]
    plan: NotRequired[list[Plan | None]]


class ShardedNumbers:
    """Endless lists of sample numbers: this process's part of every global batch.

    Global batch g holds the numbers `start + g * batch_size * world` and following; process r takes every
    `world`-th of them from the r-th on.
    """

    def __init__(self, batch_size: int, start_sample: int, rank: int, world: int) -> None:
        self.batch_size, self.start, self.rank, self.world = batch_size, start_sample, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.rank
        while True:
            yield [first + i * self.world for i in range(self.batch_size)]
            first += self.batch_size * self.world


class _ErrorsAsValues(Dataset[Any]):
    """Hands a UserError over as a value: torch would bury its message in the worker's traceback."""

    def __init__(self, make: Callable[[int], Sample]) -> None:
        self.make = make

    def __getitem__(self, n: int) -> Sample | UserError:
        try:
            return self.make(n)
        except UserError as error:
            return error


class PairLoader(DataLoader[Any]):
    """A DataLoader that raises, here, the UserErrors its workers met, and does what they left to the device.

    Its workers start with `iter`, not with the first batch, and are `workers.watched`.

    Attributes:
        device: where batches are degraded that have plans; their tensors are on it then.
        wants_stop: see `workers.watched`.
    """

    device: torch.device | str = "cpu"
    wants_stop: Callable[[], bool] = staticmethod(lambda: False)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        return self._finished(watched(super().__iter__, WORKERS_KEY, self.wants_stop))

    def _finished(self, batches: Iterator[Any]) -> Iterator[Batch]:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield carry_out_plans(batch, self.device)


def carry_out_plans(batch: Batch, device: torch.device | str) -> Batch:
    """Degrade, on a device, the pictures of a batch that have plans; a batch without plans stays where it is."""
    plans = batch.get("plan")
    if plans is None:
        return batch
    rows = [row for row, plan in enumerate(plans) if plan is not None]
    index = torch.tensor(rows, device=device)
    hq, lq = (batch[side].to(device, non_blocking=True) for side in ("hq", "lq"))  # type: ignore[literal-required]
    done = degrade(hq[index], [plan for plan in plans if plan is not None])
    finished: Batch = {**batch, "hq": hq, "lq": lq.index_copy(0, index, done)}
    del finished["plan"]
    return finished


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
    if any("plan" in sample for sample in good):
        batch["plan"] = [sample.get("plan") for sample in good]
    return batch


def build_loader(
    dataset: Dataset[Sample],
    batch_size: int,
    start_sample: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str | None = None,
    prepare_worker: Callable[[int], None] | None = None,
) -> PairLoader:
    """Build an endless loader whose batches are a function of the position alone.

    Args:
        dataset: samples by number (`PhotoCrops`, `PairedCrops`).
        batch_size: samples of one batch of this process.
        start_sample: number of the first global sample, e.g. `step * batch_size * world` on resuming.
        num_workers: worker processes; the batches are the same for any number.
        rank: number of this process.
        world: number of processes.
        device: where to degrade batches of data sets with `degrade_on=device`; their workers do it if this is None, or
            of a kind that cannot (Apple's has no Poisson noise).
        prepare_worker: called in each worker, with its number, before it makes anything.
    Returns:
        Iterable of `Batch`.
    """
    if batch_size < 1 or not 0 <= rank < world or start_sample < 0 or num_workers < 0:
        raise ValueError(
            "wanted batch_size >= 1, 0 <= rank < world, start_sample >= 0, num_workers >= 0, got "
            f"{batch_size=}, {rank=}, {world=}, {start_sample=}, {num_workers=}"
        )
    can_degrade = device is not None and torch.device(device).type in DEGRADING_DEVICES
    planned = getattr(dataset, "planned", None) if can_degrade else None
    if num_workers > 1:
        getattr(dataset, "read_ahead", lambda: None)()
    loader = PairLoader(
        _ErrorsAsValues(planned or dataset.__getitem__),
        batch_sampler=ShardedNumbers(batch_size, start_sample, rank, world),  # type: ignore[arg-type]
        collate_fn=collate,
        **worker_options(num_workers, prepare_worker),
        # without one torch draws the workers' seed from the global generator
        generator=torch_generator(0, "loader"),
    )
    loader.device = device or "cpu"
    return loader
