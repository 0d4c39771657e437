"""What the benchmarks share: a system to measure, the lines that say where it was measured, and the folder."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from varestorer.utils import files
from varestorer.utils.errors import UsageError

if TYPE_CHECKING:
    import torch

    from varestorer.systems.varestorer import VARestorer

PAPER_MODEL = "2b"
"""The model that has a restorer in front although its config names no file."""

RESTORERS = ("auto", "published", "none")
SIZES = ("schedule", "tokenizer", "transformer", "student")
FILE = "benchmark.json"


def build_system(cfg: DictConfig, device: torch.device) -> VARestorer:
    """The system of `cfg.ckpt`, or one of the sizes of `cfg.model` with random weights, in evaluation mode.

    Random weights are drawn on the device itself; two calls give the same ones.
    """
    from varestorer.evaluation.cost import add_published_restorer, random_system
    from varestorer.systems import load

    if cfg.restorer not in RESTORERS:
        raise UsageError(f"restorer must be one of {', '.join(RESTORERS)}, got restorer={cfg.restorer}")
    if cfg.ckpt is not None:
        system = load(cfg.ckpt, device=device)
    else:
        sizes: Any = OmegaConf.to_container(cfg.model, resolve=True)
        system = random_system({name: sizes[name] for name in SIZES}, device, int(cfg.seed))
    if system.restorer is None and (cfg.restorer == "published" or is_paper_model(cfg)):
        add_published_restorer(system, int(cfg.seed))
    return system.eval().requires_grad_(False)


def is_paper_model(cfg: DictConfig) -> bool:
    """Whether the 2b sizes are measured with random weights and the restorer in front."""
    return cfg.ckpt is None and cfg.restorer != "none" and model_name(cfg) == PAPER_MODEL


def model_name(cfg: DictConfig) -> str:
    """The checkpoint's name, or that of the config in the group `model`."""
    from hydra.core.hydra_config import HydraConfig

    if cfg.ckpt is not None:
        return Path(str(cfg.ckpt)).name
    return str(HydraConfig.get().runtime.choices["model"])


def where(device: torch.device) -> dict[str, Any]:
    """Device and versions, as they are printed and kept."""
    from varestorer.utils.rates import device_description, library_versions

    return {"device": device_description(device), "versions": library_versions()}


def heading(what: str, model: str, found: Mapping[str, Any]) -> str:
    """The first two lines of a report; `found` is that of `where`."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return f"benchmark {what}: {model} on {found['device']}\n{versions}"


def out_folder(cfg: DictConfig) -> Path:
    """Where the results go."""
    if cfg.out is not None:
        return files.expand_user(cfg.out)
    return Path("outputs/benchmark") / f"{cfg.what}_{datetime.now():%Y-%m-%d_%H-%M-%S}"


def write_json(folder: Path, content: Mapping[str, Any], name: str = FILE) -> None:
    """Write `benchmark.json`, or a file of another name."""
    files.write_json(folder / name, content, indent=2)
