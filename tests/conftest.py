"""Fixtures that every test may use."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Two threads at most, or as many as OMP_NUM_THREADS says: many tiny operations run slower on more."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or min(2, os.cpu_count() or 1)))


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


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep text features that a test caches out of the user's folder."""
    monkeypatch.setenv("VARESTORER_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def compose() -> Callable[..., DictConfig]:
    """The config of a command: `compose("train", "+experiment=smoke", ...)`."""
    from varestorer.commands.entry import compose as compose_config

    return lambda name, *overrides: compose_config(name, list(overrides), ROOT / "configs")


@pytest.fixture
def tiny_system():  # noqa: ANN201  # the import below would make every test pay for it
    """A system of random weights whose heads and adapters are not idle, so that differences show."""
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
