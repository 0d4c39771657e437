"""A limit of memory that restoring keeps to: what squares and files need is measured, the batch follows.

On a CPU the limit is of the whole process; on a GPU of what torch allocates there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from varestorer.systems.base import DEVICE_PIXELS
from varestorer.utils.device import memory_in_use, peak_memory
from varestorer.utils.errors import UserError
from varestorer.utils.images import Writing, holds_alpha, load_picture, resize, save_image

SPARE = 1.15  # what is needed may exceed what was measured
PROBE_SIDE = 1024  # pixels, of the picture that is written and read to see what that takes
GIVEN = 16  # bytes a pixel of an input, with its transparency
FLOAT = 4


@dataclass(frozen=True)
class Budget:
    """What is needed beside what is held, in bytes.

    Attributes:
        limit: that is kept to.
        held: by the process, or on the device, while there is no picture.
        batch_base: of a batch, whatever its size.
        square: of each square in it.
        reading: of a pixel of an input while it is read, 0 on a device.
        writing: of a pixel of a result while it is written, 0 on a device.
        channels: of a result while it is made.
        most: squares of a batch.
    """

    limit: int
    held: int
    batch_base: float
    square: float
    reading: float
    writing: float
    channels: int
    most: int

    def stages(self, given: int, made: int, wanted: int) -> tuple[float, float, float]:
        """Bytes while a picture is read, restored and written, but for squares.

        Given are the pixels of the input, of the result before it is reduced, and of the result.
        """
        pixel = FLOAT * self.channels
        if not self.writing:  # on a device; large pictures are put together on the host
            return 0.0, GIVEN * given + (pixel + FLOAT) * made if made <= DEVICE_PIXELS else 0.0, 0.0
        restoring = GIVEN * given + (pixel + FLOAT) * made + (pixel * wanted if wanted != made else 0)
        return self.reading * given, restoring, GIVEN * given + pixel * wanted + self.writing * wanted

    @property
    def free(self) -> float:
        """Bytes that may be reckoned with."""
        return (self.limit - self.held) / SPARE

    def batch_for(self, given: int, made: int, wanted: int) -> int:
        """Squares at once that a picture leaves room for; UserError if there is none, or not for the picture."""
        reading, restoring, writing = self.stages(given, made, wanted)
        squares = int((self.free - restoring - self.batch_base) // max(self.square, 1.0))
        if squares >= 1 and max(reading, writing) <= self.free:
            return min(squares, self.most)
        need = self.held + SPARE * max(reading, restoring + self.batch_base + self.square, writing)
        raise UserError(
            f"it needs {gigabytes(need)}, more than max_memory={gigabytes(self.limit)}: lower scale, raise max_memory, "
            "or cut the image"
        )

    def largest(self, scale: float, trained_scale: float) -> int:
        """Pixels of the largest result."""
        shares = self.stages(10**6, int(10**6 * max(scale, trained_scale) ** 2), int(10**6 * scale**2))
        rooms = self.free, self.free - self.batch_base - self.square, self.free
        bounds = [max(room, 0) / share for room, share in zip(rooms, shares, strict=True) if share]
        return int(min(bounds, default=0) * 10**6 * scale**2)


def measure(
    limit: int, device: torch.device, restore: Callable[[int], object], target: str, writing: Writing, budget: Budget
) -> Budget | None:
    """See what restoring needs here, of `limit` bytes; None where not even one square fits.

    `restore` restores so many squares at once; the target is the name of a result; of the budget count its channels and
    its largest batch. UserError: this device or this system does not tell.
    """
    restore(1)  # kernels and tables that stay
    needs = [peak_memory(partial(restore, number), device) for number in (1, 2)]
    held = memory_in_use(device)
    if needs[0] is None or needs[1] is None or held is None:
        raise UserError(f"max_memory can be kept to on CUDA, and on CPUs under Linux, not on {device.type} here")
    square = max(needs[1] - needs[0], needs[0] / 4)  # the allocator may have had room left for the second one
    reading, writes = (0.0, 0.0) if device.type != "cpu" else _of_files(target, writing)
    base = max(needs[0] - square, 0)
    found = replace(budget, limit=limit, held=held, batch_base=base, square=square, reading=reading, writing=writes)
    return found if found.free >= found.batch_base + found.square else None


def _of_files(target: str, writing: Writing) -> tuple[float, float]:
    """Bytes a pixel while a picture is read, and while it is written; of 16 bits with transparency, where it can be."""
    cpu, side = torch.device("cpu"), PROBE_SIDE
    noise = torch.rand(4, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
    channels = resize(noise, (side, side))
    alpha = channels[3:] if holds_alpha(target) else None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"probe{Path(target).suffix}"
        save = partial(save_image, path, channels[:3], alpha, writing=replace(writing, bits=16))
        save()  # what writers load stays
        per_pixel = (peak_memory(save, cpu) or 0) / side**2
        load_picture(path)
        return (peak_memory(lambda: load_picture(path), cpu) or 0) / side**2, max(per_pixel, 1.0)


def gigabytes(size: float) -> str:
    """2G, 0.85G."""
    return f"{size / 2**30:.2f}".rstrip("0").rstrip(".") + "G"
