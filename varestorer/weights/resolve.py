"""Where weights come from: a run, a bundle, a published file, a shipped model, or the hub.

This is the one place that decides what a path or a name means.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from varestorer.utils.errors import UsageError, UserError, reason
from varestorer.utils.files import atomic_folder, cache_folder, check_room, expand_user, in_bytes
from varestorer.utils.hub import CACHE_OPTIONS, asking_hub, fetch_folder, is_hub_name, split_revision
from varestorer.utils.locks import locked
from varestorer.weights.bundle import (
    ADAPTERS,
    CONFIG,
    FORMAT,
    RESTORER,
    is_bundle,
    named_or_default,
    read_config,
    save_bundle,
)
from varestorer.weights.files import read_entries, read_metadata
from varestorer.weights.published import RESTORER_FILE
from varestorer.weights.published.infinity import STUDENT_FILE, TOKENIZER_FILE
from varestorer.weights.published.varsr import network_kind
from varestorer.weights.releases import Release, fetch, releases
from varestorer.weights.runs import CONFIG as RUN_CONFIG
from varestorer.weights.runs import STATE, is_run, latest_checkpoint

LOG = logging.getLogger(__name__)
ReadPublished = Callable[..., Any]
"""(the network's file, the tokenizer's, the restorer's) -> the system."""
LOCK_SECONDS = 3600  # another process converts
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
    """Refuse a file that is one part of a bundle, a run's weights, or adapters alone: a UsageError with the remedy."""
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
    """Fetch a bundle `owner/name` from the hub into its cache, sizes said first; without a hub a cached one will do.

    Options are huggingface_hub's `revision`, `cache_dir`, `token`, ... UsageError: the hub does not give it. UserError:
    it is no bundle, or there is no room for it.
    """
    known = ("revision", "force_download", "local_files_only", *CACHE_OPTIONS)
    wanted = {key: options[key] for key in known if key in options}
    with asking_hub(f"{name}, which is no path here either", UsageError, HOW):
        folder = fetch_folder(name, [CONFIG], **wanted)
        read_config(folder)  # before gigabytes of something else come
        return fetch_folder(name, ["*.json", "*.safetensors"], **(wanted | {"revision": folder.name}))


def release_of(name: str | Path | None) -> Release | None:
    """The known release that a name means, with or without a revision; None for paths and all other names."""
    given = str(name)
    return None if Path(given).exists() else releases().get(split_revision(given)[0])


def locate(name: str | Path | None, options: Mapping[str, Any], read: ReadPublished | None = None) -> Path:
    """Where a system's files are: a path, a shipped model, or the cache of the hub after fetching them.

    For the name see `System.from_pretrained`; options are huggingface_hub's `revision`, `cache_dir`, `token`, ...;
    `read` makes a system of a release's files, as `from_published` of its class. UsageError: neither a path nor a name
    that the hub knows. UserError: a release that cannot be fetched or converted.
    """
    given = str(named_or_default(name if name is None else expand_user(name)))
    if Path(given).exists() or not is_hub_name(given):
        return Path(given)
    repository, revision = split_revision(given)
    options = dict(options) | ({"revision": revision} if revision else {})
    release = release_of(given)
    return download(repository, options) if release is None or read is None else converted(release, options, read)


def converted(release: Release, options: Mapping[str, Any], read: ReadPublished) -> Path:
    """The bundle of a release in the folder `models` of our cache; its files are fetched and converted once.

    Options and `read` are those of `locate`, but the revision is that of the release's own repository.
    """
    files = fetch(release.files, options, options.get("revision"))
    cache = cache_folder()
    if cache is None:
        raise UserError(f"{release.name} is converted once, and no folder is known to keep it: set VARESTORER_CACHE")
    contents = "\n".join([str(FORMAT), *(str(file.relative_to(file.parents[2])) for file in files)])
    key = hashlib.sha256(contents.encode()).hexdigest()[:12]  # the paths hold the commits
    bundle = cache / "models" / f"{release.name.replace('/', '--')}@{key}"
    if is_bundle(bundle):
        return bundle
    with locked(bundle.with_suffix(".lock"), wait=LOCK_SECONDS):
        if not is_bundle(bundle):
            size = sum(file.stat().st_size for file in files)
            LOG.info("converting %s once, into %s (%s)", release.name, bundle, in_bytes(size))
            check_room(bundle, size)
            system = read(files[0], *map(str, files[1:]))
            if stored_precision(files[0]) == "bf16":
                system.set_precision("bf16")  # what was read is float32: nothing is lost
            with atomic_folder(bundle) as folder:
                save_bundle(system, folder)
    return bundle


def stored_precision(path: Path) -> str:
    """In which precision a published file holds the transformer's blocks."""
    blocks = {tensor.dtype for name, tensor in read_entries(path).items() if name.endswith(".sa.v_bias")}
    return "bf16" if blocks == {torch.bfloat16} else "fp32"


def companion(part: str, student_file: Path, given: str | None) -> Path:
    """The file of a part that a published student does not hold: as given, or beside it.

    UsageError: the given one does not exist. UserError: none lies beside the student.
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


def models_by_system(folder: str, *names: str) -> dict[str, list[str]]:
    """System -> models of it: those named, then the runs and bundles in a folder and its folders, newest first."""
    root = expand_user(folder)
    found = [path for path in (*root.glob("*"), *root.glob("*/*")) if is_run(path) or is_bundle(path)]
    found.sort(key=lambda path: -path.stat().st_mtime)
    models: dict[str, list[str]] = {}
    for name in dict.fromkeys([*names, *map(str, found)]):
        with suppress(UserError):  # a run without a checkpoint yet
            system = release.system if (release := release_of(name)) else system_of(locate(name, {}))
            models.setdefault(system, []).append(name)
    return models


def model_of_run(path: Path) -> DictConfig:
    """The model of a run's config; UserError if it has none, or cannot be read."""
    run_dir = latest_checkpoint(path).parents[2]
    try:
        model = OmegaConf.load(run_dir / RUN_CONFIG).model
    except (OSError, AttributeError) as error:
        raise UserError(f"the run {run_dir} has no model in its {RUN_CONFIG} ({reason(error)})") from error
    if not isinstance(model, DictConfig):
        raise UserError(f"the run {run_dir} has no model in its {RUN_CONFIG}; give another one")
    return model
