"""Where weights come from: a run, a bundle, a published file, a shipped model, or the hub.

This is the one place that decides what a path or a name means.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from varestorer.utils.errors import UsageError, UserError, reason
from varestorer.utils.files import expand_user
from varestorer.utils.hub import is_hub_name
from varestorer.weights.bundle import ADAPTERS, RESTORER, is_bundle, named_or_default, read_config
from varestorer.weights.files import read_entries, read_metadata
from varestorer.weights.published import RESTORER_FILE
from varestorer.weights.published.infinity import (
    STUDENT_FILE,
    TOKENIZER_FILE,
)
from varestorer.weights.published.varsr import network_kind
from varestorer.weights.runs import CONFIG, is_run, latest_checkpoint
from varestorer.weights.storage import STATE

COMPANIONS = {  # of the published student: file name, where to get it
    "tokenizer": (TOKENIZER_FILE, "hub FoundationVision/Infinity"),
    "restorer": (RESTORER_FILE, "hub lxq007/DiffBIR"),
}
MODEL_PARTS = ("tokenizer", "transformer")
HOW = f"give a run of scripts/train.py, a checkpoint of one, a bundle's folder, or the published {STUDENT_FILE}"


def is_published(path: Path) -> bool:
    """Whether a path is a file of weights in somebody's published form."""
    return path.is_file() and path.suffix.lower() in (".pth", ".safetensors")


def check_is_whole(path: Path) -> None:
    """Refuse a file that is one part of a bundle, a run's weights, or adapters alone.

    Raises:
        UsageError: says what to give instead.
    """
    if path.suffix.lower() != ".safetensors":
        return
    folder = path.parent
    if (is_bundle(folder) and path.stem in (*MODEL_PARTS, ADAPTERS, RESTORER)) or (folder / STATE).is_file():
        raise UsageError(f"{path} is one file of a model; give the folder {folder}")
    if "student" in read_metadata(path):
        raise UsageError(
            f"{path} holds adapters alone; put them onto a base with scripts/convert.py input={path} base=MODEL "
            "output=FOLDER, and use the folder"
        )


def download(name: str, options: Mapping[str, Any]) -> Path:
    """Fetch a bundle from the hub into its cache.

    Args:
        name: `owner/name`.
        options: huggingface_hub's `revision`, `cache_dir`, `token`, ...
    """
    from huggingface_hub import snapshot_download

    known = ("revision", "cache_dir", "force_download", "local_files_only", "token")
    wanted = {key: options[key] for key in known if key in options}
    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"], **wanted))


def locate(name: str | Path | None, options: Mapping[str, Any]) -> Path:
    """Where a system's files are: a path, a shipped model, or the cache of the hub after fetching them.

    Args:
        name: see `System.from_pretrained`.
        options: huggingface_hub's `revision`, `cache_dir`, `token`, ...
    Raises:
        UsageError: neither a path nor a name that the hub knows.
    """
    given = str(named_or_default(name if name is None else expand_user(name)))
    if Path(given).exists() or not is_hub_name(given):
        return Path(given)
    try:
        return download(given, options)
    except (OSError, ValueError) as error:
        raise UsageError(f"{given} is no path here, and the hub does not give it: {reason(error)}; {HOW}") from error


def companion(part: str, student_file: Path, given: str | None) -> Path:
    """The file of a part that a published student does not hold: as given, or beside it.

    Raises:
        UsageError: the given one does not exist.
        UserError: none lies beside the student.
    """
    name, place = COMPANIONS[part]
    if given is not None:
        path = expand_user(given)
        if not path.exists():
            raise UsageError(f"{part}={given} does not exist; give {name} ({place})")
        return path
    path = student_file.parent / name
    if not path.is_file():
        raise UserError(
            f"{path} is missing; put it ({place}) beside {student_file.name}, or name it to scripts/convert.py "
            f"({part}=FILE) and use the bundle"
        )
    return path


def system_of(path: Path) -> str:
    """Name of the system that a path holds: of a bundle or a run what its config says; a published file has its marks.

    What holds none is left to VARestorer, whose loading says so.
    """
    if is_bundle(path):
        return str(read_config(path)["system"])
    if is_run(path):
        target = str(model_of_run(path).get("_target_", "varestorer.systems.varestorer.VARestorer"))
        return target.split(".")[-2]
    kinds = ("varsr", "c2i", "var")
    return "varsr" if is_published(path) and network_kind(read_entries(path)) in kinds else "varestorer"


def model_of_run(path: Path) -> DictConfig:
    """The model of a run's config.

    Raises:
        UserError: it has none, or cannot be read.
    """
    run_dir = latest_checkpoint(path).parents[2]
    try:
        model = OmegaConf.load(run_dir / CONFIG).model
    except (OSError, AttributeError) as error:
        raise UserError(f"the run {run_dir} has no model in its {CONFIG} ({reason(error)})") from error
    if not isinstance(model, DictConfig):
        raise UserError(f"the run {run_dir} has no model in its {CONFIG}; give another one")
    return model
