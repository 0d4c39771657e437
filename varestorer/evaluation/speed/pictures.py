"""How long a whole picture takes that is restored by tiles, as `restore` does it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from varestorer.evaluation.speed.subjects import Subject
from varestorer.utils.seeds import torch_generator
from varestorer.utils.timing import Timing, in_turns


def measure_picture(subjects: Mapping[str, Subject], side: int, repeats: int, warmup: int) -> dict[str, Timing]:
    """Time `restore` of one picture of side x side pixels that keeps its size, variants in turns.

    Args:
        subjects: by the names of their variants, all on one device.
        side: of the picture in the host's memory, pixels.
        repeats: timed runs.
        warmup: runs before them.
    """
    image_3HW = torch.rand(3, side, side, generator=torch_generator(0, "picture"))
    works = {name: partial(subject.system.restore, image_3HW, scale=1) for name, subject in subjects.items()}
    device = next(iter(subjects.values())).system.device
    return in_turns(works, repeats, warmup, device)
