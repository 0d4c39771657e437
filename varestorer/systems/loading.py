"""A system with its weights, from whatever `ckpt=` names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from varestorer.conditioning.restorer import PUBLISHED_FILE
from varestorer.systems.varestorer import VARestorer
from varestorer.transformer.adapters import merge_adapters
from varestorer.utils.errors import UsageError, UserError
from varestorer.weights.published import STUDENT_FILE, TOKENIZER_FILE
from varestorer.weights.runs import CONFIG, is_run, latest_checkpoint, load_run_weights

HOW = f"give a run of scripts/train.py, a checkpoint of one, or the published {STUDENT_FILE}"


def load_system(ckpt: str | Path, device: torch.device | str = "cpu", merge: bool = False) -> VARestorer:
    """The system a checkpoint belongs to, in evaluation mode.

    Args:
        ckpt: a run's folder (the averaged weights of its latest checkpoint), a checkpoint's folder, or the published
            student, with its tokenizer and restorer beside it.
        device: where it runs.
        merge: fold the adapters into the weights: faster, but without the teacher, so for `steps="one"` alone.

    Raises:
        UsageError: no such path.
        UserError: the path holds no checkpoint, or one that does not fit its config.
    """
    path = Path(ckpt)
    if not path.exists():
        raise UsageError(f"ckpt={path} does not exist; {HOW}")
    if path.is_file() and path.suffix in (".pth", ".safetensors"):
        system = _published(path)
    elif is_run(path):
        system = _from_run(path)
    else:
        raise UserError(f"ckpt={path} holds no checkpoint; {HOW}")
    if merge:
        merge_adapters(system.transformer)
    return system.to(device).eval().requires_grad_(False)


def load_into(system: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy a run's weights into a system that may have more (those that come from files).

    Raises:
        UserError: the system has no place for some of them, or another shape.
    """
    try:
        unexpected = system.load_state_dict(weights, strict=False).unexpected_keys
    except RuntimeError as error:  # torch's word for tensors of another shape
        raise UserError(f"{source} was made with another model: {error}") from error
    if unexpected:
        raise UserError(f"{source} was made with another model: this one has no {unexpected[0]}")


def _from_run(path: Path) -> VARestorer:
    """Rebuild the model of a run's config and fill it with the run's weights."""
    run_dir = latest_checkpoint(path).parents[2]
    try:
        model = OmegaConf.to_container(OmegaConf.load(run_dir / CONFIG).model)
    except (OSError, AttributeError) as error:
        raise UserError(f"the run {run_dir} has no model in its {CONFIG} ({error})") from error
    options = {key: value for key, value in dict(model).items() if not str(key).startswith("_")}  # type: ignore[arg-type]
    system = VARestorer(**options)
    load_into(system, load_run_weights(path), f"the run {run_dir}")
    return system


def _published(path: Path) -> VARestorer:
    """The released student of 2b sizes; tokenizer and restorer lie in the same folder."""
    return VARestorer(
        schedule={"size": "0.25M"},
        tokenizer={},
        transformer={},
        student={},
        restorer=str(path.parent / PUBLISHED_FILE),
        weights={"tokenizer": str(path.parent / TOKENIZER_FILE), "transformer": str(path)},
    )
