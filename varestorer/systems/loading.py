"""A system with its weights, from a run, a bundle, a published file or the hub."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor, nn

from varestorer.conditioning.restorer import PUBLISHED_FILE
from varestorer.utils.errors import UsageError, UserError, reason
from varestorer.utils.files import expand_user
from varestorer.utils.hub import is_hub_name
from varestorer.weights.bundles import ADAPTERS, CONFIG, RESTORER, is_bundle, read_config, tensors_file
from varestorer.weights.files import read_metadata
from varestorer.weights.manifest import read_entries
from varestorer.weights.published import STUDENT_FILE, TOKENIZER_FILE
from varestorer.weights.runs import CONFIG as RUN_CONFIG
from varestorer.weights.runs import is_run, latest_checkpoint, load_run_weights
from varestorer.weights.shipped import named_or_default
from varestorer.weights.sizes import adapter_rank, tokenizer_sizes, transformer_sizes
from varestorer.weights.storage import STATE

COMPANIONS = {  # of the published student: file name, where to get it
    "tokenizer": (TOKENIZER_FILE, "hub FoundationVision/Infinity"),
    "restorer": (PUBLISHED_FILE, "hub lxq007/DiffBIR"),
}
MODEL_PARTS = ("tokenizer", "transformer")
HOW = f"give a run of scripts/train.py, a checkpoint of one, a bundle's folder, or the published {STUDENT_FILE}"


def build(
    system_class: Any,
    path: Path,
    tokenizer_file: str | None = None,
    restorer_file: str | None = None,
    merge: bool = False,
) -> Any:
    """The system that a path holds.

    Args:
        system_class: what to build.
        path: a run, a checkpoint of one, a bundle or the published student.
        tokenizer_file: of the published student, where it does not lie beside it.
        restorer_file: likewise.
        merge: fold the adapters into the base weights.

    Raises:
        UsageError: no such path, or one of a part of a model.
        UserError: the path holds no system, or its files do not fit.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist; {HOW}")
    if is_bundle(path):
        return _from_bundle(system_class, path, merge)
    if _is_published(path):
        _check_is_whole(path)
        if hasattr(system_class, "from_published"):
            return system_class.from_published(path, tokenizer_file)
        system = _from_published(system_class, path, tokenizer_file, restorer_file)
    elif is_run(path):
        system = _from_run(system_class, path)
    else:
        raise UserError(f"{path} holds no model; {HOW}")
    return system.merge_adapters() if merge else system


SYSTEMS = {"hvar": "varestorer.systems.hvar.HVAR"}
"""Name of a system in a bundle -> its class; VARestorer where it is none of these."""


def class_of(name: str | Path | None) -> Any:
    """The class of the system that `System.from_pretrained` would load: what a run's or a bundle's config names."""
    from hydra.utils import get_class

    path = locate(name, {})
    target = "varestorer.systems.varestorer.VARestorer"
    if is_bundle(path):
        target = SYSTEMS.get(read_config(path).get("system", ""), target)
    elif is_run(path):
        config = latest_checkpoint(path).parents[2] / RUN_CONFIG
        target = (OmegaConf.select(OmegaConf.load(config), "model._target_") if config.is_file() else None) or target
    return get_class(target)


def check_is_student(system: Any, path: str | Path) -> None:
    """Refuse a published teacher where a student is asked; runs and bundles may hold students without adapters.

    Args:
        system: loaded from the path.
        path: what the user named as `ckpt=`.
    Raises:
        UsageError: the path is a published file without adapters.
    """
    student = getattr(system, "student_config", None)
    if student is not None and student.lora_rank == 0 and _is_published(expand_user(path)):
        raise UsageError(f"ckpt={path} is a teacher without adapters; use steps=multi, or give {STUDENT_FILE}")


def _is_published(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in (".pth", ".safetensors")


def _check_is_whole(path: Path) -> None:
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


def load_into(system: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy a run's weights into a system that may have more (those that come from files).

    Raises:
        UserError: the system has no place for some of them, or another shape.
    """
    try:
        unexpected = system.load_state_dict(weights, strict=False).unexpected_keys
    except RuntimeError as error:  # torch's word for tensors of another shape
        raise UserError(f"{source} was made with another model: {reason(error)}") from error
    if unexpected:
        raise UserError(f"{source} was made with another model: this one has no {unexpected[0]}")


def _from_run(system_class: Any, path: Path) -> Any:
    """Rebuild the model of a run's config and fill it with the run's weights."""
    run_dir = latest_checkpoint(path).parents[2]
    try:
        model = OmegaConf.to_container(OmegaConf.load(run_dir / RUN_CONFIG).model)
    except (OSError, AttributeError) as error:
        raise UserError(f"the run {run_dir} has no model in its {RUN_CONFIG} ({reason(error)})") from error
    options = {key: value for key, value in dict(model).items() if not str(key).startswith("_")}  # type: ignore[arg-type]
    system = system_class(**options)
    load_into(system, load_run_weights(path), f"the run {run_dir}")
    return system


def _from_bundle(system_class: Any, bundle: Path, merge: bool) -> Any:
    """A bundle's system; merging as the weights are read needs no adapters, see `adapters.folded`."""
    config = read_config(bundle)
    _check_entries(system_class, config, bundle / CONFIG)
    restorer = tensors_file(bundle, RESTORER)
    if config["restorer"] and not restorer.is_file():
        raise UserError(f"the bundle {bundle} has lost its {restorer.name}; download or convert it again")
    return system_class(
        schedule=config["schedule"],
        tokenizer=config["tokenizer"],
        transformer=config["transformer"],
        student=config["student"] | ({"merged": True} if merge and config["student"].get("lora_rank") else {}),
        restorer=str(restorer) if config["restorer"] else None,
        weights={"tokenizer": str(bundle), "transformer": str(bundle)},
    )


def _check_entries(system_class: Any, config: Mapping[str, Any], path: Path) -> None:
    """Refuse a config with entries that a later version may know.

    Raises:
        UserError: names them.
    """
    unknown = [
        f"{part}.{key}"
        for part, make in system_class.makers.items()
        for key in sorted(config[part].keys() - inspect.signature(make).parameters)
    ]
    if unknown:
        raise UserError(f"{path} has entries this version does not know ({', '.join(unknown)}); update varestorer")


def _from_published(
    system_class: Any, student_file: Path, tokenizer_file: str | None, restorer_file: str | None
) -> Any:
    """The released student, or a network of other sizes in its form."""
    tokenizer = _companion("tokenizer", student_file, tokenizer_file)
    restorer = _companion("restorer", student_file, restorer_file)
    student = read_entries(student_file)
    return system_class(
        schedule={"size": "0.25M"},
        tokenizer=tokenizer_sizes(read_entries(tokenizer)),
        transformer=transformer_sizes(student),
        student={"lora_rank": adapter_rank(student)},
        restorer=str(restorer),
        weights={"tokenizer": str(tokenizer), "transformer": str(student_file)},
    )


def _companion(part: str, student_file: Path, given: str | None) -> Path:
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
