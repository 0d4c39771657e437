"""Fixtures that every test may use."""

import gc
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the commands do; OpenMP reads it when torch is loaded


def pytest_configure(config: pytest.Config) -> None:
    """As many threads as OMP_NUM_THREADS says, or two, but no more than there are cores for each process of xdist.

    Many tiny operations run slower on more threads, and four threads on two cores mostly wait for each other.
    """
    import torch

    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    cores = max(1, (os.cpu_count() or 1) // processes)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or min(2, cores)))
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5  # seconds that torch waits for a data worker that failed


def pytest_collection_finish() -> None:
    """Take all that was imported out of the collector's sight: else each of its many turns costs half a second."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """What is frozen ends as Python ends."""
    gc.unfreeze()


def shared_folder() -> Path:
    """Folder of golden tensors and benchmark images; it need not exist."""
    return Path(os.environ.get("VARESTORER_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared folder, or a skip that says how to provide it."""
    folder = shared_folder()
    if not folder.is_dir():
        pytest.skip(f"golden files not found: {folder} (set VARESTORER_SHARED to the folder that holds fixtures/)")
    return folder


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Empty folders; `mktemp` would look through all of thousands for each."""
    root = tmp_path_factory.mktemp("caches")
    return (root / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def own_cache(caches: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep text features that a test caches out of the user's folder."""
    folder = next(caches)
    folder.mkdir()
    monkeypatch.setenv("VARESTORER_CACHE", str(folder))


@pytest.fixture
def compose() -> Callable[..., DictConfig]:
    """The config of a command: `compose("train", "+experiment=smoke", ...)`."""
    from varestorer.commands.entry import compose as compose_config

    return lambda name, *overrides: compose_config(name, list(overrides), ROOT / "configs")


@pytest.fixture
def tiny_system():  # noqa: ANN201  # the import below would make every test pay for it
    """A system of random weights whose heads and adapters are not idle, so that differences show."""
    import torch

    from varestorer.systems.varestorer import VARestorer
    from varestorer.utils.seeds import torch_generator

    system = VARestorer(
        schedule={"sides": [1, 2, 4]},
        tokenizer={
            "channels": 32,
            "multipliers": [1, 1],
            "latent_width": 8,
            "num_encoder_blocks": 1,
            "num_decoder_blocks": 1,
            "patch_size": 4,
        },
        transformer={
            "width": 32,
            "depth": 2,
            "num_heads": 2,
            "latent_width": 8,
            "text_width": 16,
            "text_length": 3,
            "num_levels": 4,
            "gamma_init": 1.0,
        },
        student={"lora_rank": 4},
    )
    generator = torch_generator(0, "test")
    with torch.no_grad():
        for name, parameter in system.transformer.named_parameters():
            if name.endswith(("bias", "lora_B.student.weight", "head.weight")):
                parameter.normal_(std=0.3, generator=generator)
    return system.eval()
