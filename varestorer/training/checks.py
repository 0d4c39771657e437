"""What can be known before a run begins: refused then, in one line and with status 2, and not hours later.

Among it what a resumed run may not change of its config: the model, and which data it sees in which order.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from varestorer.data.datasets import INSIDE
from varestorer.losses.perceptual import WITH_WEIGHTS, perceptual_loss, perceptual_parts
from varestorer.training.config import TrainerConfig
from varestorer.utils.errors import UsageError, UserError, reason
from varestorer.utils.schema import typed
from varestorer.weights.bundle import shipped
from varestorer.weights.files import read_tensors
from varestorer.weights.load import check_part

LOG = logging.getLogger(__name__)
NOTHING = "(nothing)"
# these count as each stage sees them, so `stages` has them all
SHARED = ("trainer", "optimizer", "data", "degradation")
PASSING = ("run_dir", "resume", "resume_other_data")
FIXED = re.compile(
    r"seed|order of stages|model\..+|stages\.[^.]+\.(task\..+|data\..+|data|trainer\.batch_size|optimizer\._target_)",
    re.DOTALL,
)
# of a task: what changes memory or the reports alone
HARMLESS = re.compile(r"stages\.[^.]+\.task\.(checkpoint_activations|log_each_bit|scores)")


def check_stages(stages: Mapping[str, DictConfig], num_processes: int, device: torch.device) -> None:
    """Check all stages of a run, each the whole config as it sees it, against its model, its files and its processes.

    UsageError: names the stage, the key, what it was and what it has to be.
    """
    model = next(iter(stages.values())).model
    with _refused("the model"):
        _check_weights(model)
    side = _side(model)
    for name, cfg in stages.items():
        with _refused(f"stage {name}"):
            trainer = typed(TrainerConfig, cfg.trainer)
            trainer.micro_batch(num_processes)
            trainer.keeps_base_in_bf16(device)
            if trainer.validate_every and cfg.heldout is None:
                raise UsageError("trainer.validate_every needs held-out pairs: set heldout, or validate_every=0")
            _check_call(cfg.stages[name].task, "task", system=None)
            _check_optimizer(cfg.optimizer)
            if side is not None:
                _check_crops(cfg, cfg.stages[name].task, side)
            _check_folders(cfg)
            _check_task_files(cfg.stages[name].task, _published(model))


@contextmanager
def _refused(where: str) -> Iterator[None]:
    """Whatever is wrong is wrong with the command: nothing has begun."""
    try:
        yield
    except UserError as error:
        raise UsageError(f"{where}: {error}") from error


def _check_weights(model: DictConfig) -> None:
    """Files of the model are there, and hold numbers of a kind that networks compute with."""
    files = {f"weights.{part}": file for part, file in (model.get("weights") or {}).items()}
    for key, file in {**files, "restorer": model.get("restorer")}.items():
        if not isinstance(file, str):
            continue
        path = shipped(file)
        if not path.exists():
            if (part := key.removeprefix("weights.")) in _published(model):
                check_part(part, path, _published(model))
            raise UsageError(f"weights not found: {path}; set model.{key} to a file, a run or a bundle")
        for one in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
            read_tensors(one, nested=("vae", "state_dict"))


def _published(model: DictConfig) -> dict[str, str]:
    """Parts of the system whose weights somebody published: `System.published`; none for a system of another kind."""
    return getattr(get_object(model._target_), "published", {})


def _side(model: DictConfig) -> int | None:
    """Side of the squares that a model of this config takes, pixels; None for one that takes any."""
    sizes = OmegaConf.merge(model, {key: None for key in ("weights", "restorer") if key in model})
    with torch.device("meta"):
        system = instantiate(sizes, _convert_="all")
    side: int | None = getattr(system, "tile", None)
    return side


def _check_crops(cfg: DictConfig, task: DictConfig, side: int) -> None:
    """Crops of training and of the pictures that are shown have the size that the model takes."""
    if getattr(get_object(task._target_), "takes_any_size", False):
        return
    side = max([side, *(task.get("tiles") or [])])
    for key in ("data", "heldout"):
        node = cfg[key]
        if node is not None and "crop" in node and node.crop != side:
            raise UsageError(
                f"{key}.crop={node.crop}, but this model takes squares of {side} pixels (model.schedule and "
                f"model.tokenizer): set data.crop={side}"
            )


def _check_folders(cfg: DictConfig) -> None:
    """Folders of photographs and texts are there."""
    for section in ("data", "heldout"):
        for key, value in _leaves(cfg[section], section):
            is_place = key.endswith(".root") or (key.endswith(".text") and value != INSIDE)
            if isinstance(value, str) and is_place and not Path(value).expanduser().is_dir():
                raise UsageError(f"{key}={value} is no folder that can be read; give one that exists")


def _leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, DictConfig):
        for name in node:
            yield from _leaves(node[name], ".".join((key, str(name))))
    else:
        yield key, node


def _check_task_files(task: DictConfig, published: Mapping[str, str]) -> None:
    """A separate teacher is there, and so are the weights of a perceptual loss."""
    teacher = task.get("teacher")
    if isinstance(teacher, str) and teacher != "start":
        check_part("transformer", shipped(teacher), published)
    perceptual = task.get("perceptual")
    if perceptual and OmegaConf.select(task, "weights.perceptual") != 0:
        for name in sorted({name for name, _ in perceptual_parts(perceptual)} & {*WITH_WEIGHTS}):
            perceptual_loss(name)


def _check_optimizer(node: DictConfig) -> None:
    """The optimizer takes its options."""
    make = instantiate(node, _convert_="all")
    try:
        make([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        raise UsageError(f"optimizer: {reason(error)}") from error


def _check_call(node: DictConfig, key: str, **given: Any) -> None:
    """What a config names takes its options, as far as their names say."""
    options = {str(name): None for name in node if not str(name).startswith("_")}
    try:
        inspect.signature(get_object(node._target_)).bind(**options, **given)
    except TypeError as error:
        raise UsageError(f"{key}: {reason(error)} of {node._target_}") from error


def check_resumable(path: Path, config: Mapping[str, Any]) -> None:
    """Compare a run's `config.yaml` with the config that is to go on with it; changes that are allowed are logged.

    Args:
        path: the `config.yaml`; nothing is compared where it does not exist.
        config: as it will be written there, each stage with its whole `trainer`, `optimizer` and `data`.
    Raises:
        UsageError: the model, a stage or its data changed; lists each key with its old and new value.
        UserError: the file cannot be read.
    """
    if not path.is_file():
        return
    changed = differences(_read(path), yaml.safe_load(yaml.safe_dump(dict(config), sort_keys=False)))
    fixed = [line for key, line in changed.items() if FIXED.fullmatch(key) and not HARMLESS.match(key)]
    if fixed:
        listed = "\n".join(f"  {line}" for line in fixed)
        raise UsageError(
            f"{path.parent} was started with another config, and what the model or its data depend on cannot change "
            f"in a run:\n{listed}\ngive the run's own values, or another run_dir for a new run"
        )
    for line in changed.values():
        LOG.info("changed since the run was started: %s", line)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """The keys whose values differ, each with a line `key: old -> new`."""
    before, after = _settings(old), _settings(new)
    keys = [*before, *(key for key in after if key not in before)]
    pairs = {key: (before.get(key, NOTHING), after.get(key, NOTHING)) for key in keys}
    return {key: f"{key}: {one} -> {other}" for key, (one, other) in pairs.items() if one != other}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in config.items() if key not in SHARED + PASSING}
    return {"order of stages": ", ".join(config.get("stages") or {}), **_flat(own)}


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys; an empty mapping stays a value."""
    if not isinstance(value, Mapping) or (key and not value):
        return {key: value}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{key}.{name}" if key else str(name))
    return flat


def _read(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        config = error
    if not isinstance(config, dict):
        why = reason(config) if isinstance(config, Exception) else "it holds no keys"
        raise UserError(
            f"cannot read {path} ({why}), so nobody knows whether this command fits the run; put it back, or remove "
            "it to go on without comparing"
        )
    return config
