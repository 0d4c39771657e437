"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Two threads at most: many tiny operations run slower on more."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))


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
