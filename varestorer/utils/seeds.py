"""Reproducible randomness: every draw comes from a seed and a few keys, never from a global generator.

A stream is named by its keys, for example `numpy_generator(seed, "crop", sample)`: two streams with
different keys are independent, and a stream does not depend on what was drawn before it, on the number of
workers or on the batch it was part of.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varestorer.utils.device import to_device
from varestorer.utils.files import name_bytes


def derive_seed(seed: int, *keys: int | str) -> int:
    """Hash a seed and keys to a new seed in [0, 2**63), the same on every machine and Python version.

    Keys are integers and strings naming the stream; `1` and `"1"` differ, and so do `("a", "b")`, `("ab",)`.
    """
    digest = hashlib.blake2b(digest_size=8)
    for key in (seed, *keys):
        text = f"s{key}" if isinstance(key, str) else f"i{int(key)}"
        digest.update(name_bytes(f"{len(text)}:{text};"))
    return int.from_bytes(digest.digest(), "big") >> 1


def torch_generator(seed: int, *keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Torch generator of the stream `keys` (CPU and CUDA generators give different numbers)."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *keys))


def numpy_generator(seed: int, *keys: int | str) -> np.random.Generator:
    """NumPy generator (PCG64) of the stream `keys`."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, *keys)))


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's global generators inside the block; put them back afterwards."""
    # CUDA's generators are touched only once CUDA is in use: asking for their state would start it
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed_all(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def uniform_per_sample(
    shape: tuple[int, ...],
    seed: int,
    keys: Sequence[int] | Tensor,
    stream: str,
    device: torch.device | str = "cpu",
    draw: Callable[..., Tensor] = Tensor.uniform_,
) -> Tensor:
    """Uniform numbers (B, *shape) float32 in [0, 1) whose row `b` depends on `(seed, stream, keys[b])` alone.

    They are drawn on the CPU and moved, so that a sample gets the same ones on every device, in every batch and in
    every process of a distributed run. The keys are B integers, one a sample (e.g. its global number), the stream is
    the name of what the numbers are for (e.g. `"bits"`), and `draw` fills a row in place.
    """
    numbers = keys.tolist() if isinstance(keys, Tensor) else [int(key) for key in keys]
    out = torch.empty((len(numbers), *shape), dtype=torch.float32)
    for row, key in zip(out, numbers, strict=True):
        draw(row, generator=torch_generator(seed, stream, key))
    return to_device(out, torch.device(device))


normal_per_sample = partial(uniform_per_sample, draw=Tensor.normal_)
"""Standard normal numbers; arguments as `uniform_per_sample`."""


def seed_everything(seed: int, *keys: int | str) -> None:
    """Seed Python, NumPy and torch (all devices) from `seed` and `keys`.

    Tasks draw from generators of their own; this is for layers that cannot, such as `nn.Dropout`.
    """
    value = derive_seed(seed, *keys)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def capture_rng() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """States of this process: of Python and NumPy as plain lists, and as uint8 tensors that of the CPU and of CUDA."""
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
