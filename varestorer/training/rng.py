"""States of the global random generators, one set per process, as JSON and tensors."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varestorer.utils.seeds import derive_seed


def seed_everything(seed: int, *keys: int | str) -> None:
    """Seed Python, NumPy and torch (all devices) from `seed` and `keys`.

    Tasks draw from generators of their own; this is for layers that cannot, such as `nn.Dropout`.
    """
    value = derive_seed(seed, *keys)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def capture_rng() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """States of this process.

    Returns:
        `{"python": ..., "numpy": ...}` of plain lists, and uint8 tensors `{"cpu": ..., "cuda": ...}` (`cuda`
        where there is one).
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    plain = {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return plain, tensors


def restore_rng(plain: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Put back what `capture_rng` gave."""
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
