"""The processes that share an evaluation: one, or those that `accelerate launch` or `torchrun` started."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from varestorer.utils.device import pick_device
from varestorer.utils.errors import UserError
from varestorer.utils.locks import locked

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those of an evaluation; process 0 writes the records and speaks."""

    rank: int  # of this process, from 0
    size: int  # how many there are
    device: torch.device  # where this one works
    state: PartialState | None = None  # Accelerate's handle on the others; None for a process alone

    @classmethod
    def start(cls, device: str = "auto") -> Processes:
        """Find the other processes, if a launcher says that there are any; UserError if the device is not there."""
        picked = pick_device(device)
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls(0, 1, picked)
        state = PartialState(cpu=picked.type == "cpu")
        return cls(state.process_index, state.num_processes, state.device, state)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Of what all have to do, this one's part: every `size`-th item."""
        return items[self.rank :: self.size]

    def gather(self, items: list[T]) -> list[T]:
        """The items of all processes, in the order of the processes; all get them, and all have to ask."""
        if self.state is None:
            return items
        return list(gather_object(items))

    def of_main(self, value: T) -> T:
        """Process 0's value, for all."""
        return self.gather([value])[0]

    @contextmanager
    def keeping(self, folder: Path) -> Iterator[None]:
        """Keep a folder for these processes; UserError in all of them if another command has it."""
        with ExitStack() as stack:
            refusal = None
            if self.is_main:
                try:
                    stack.enter_context(locked(folder))
                except UserError as error:
                    refusal = str(error)
            if refusal := self.of_main(refusal):
                raise UserError(refusal)
            yield

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The others enter when process 0 is through: it may download what all need."""
        if self.state is None:
            yield
        else:
            with self.state.main_process_first():
                yield

    def end(self) -> None:
        """Let go of the others; nothing can be gathered afterwards."""
        if self.state is not None:
            self.state.destroy_process_group()


ALONE = Processes(0, 1, torch.device("cpu"))
