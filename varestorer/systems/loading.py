"""A system with its weights, from a run, a bundle, a published file or the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from torch import Tensor, nn

from varestorer.conditioning.restorer import PUBLISHED_FILE
from varestorer.systems.parts import check_part
from varestorer.utils.errors import UsageError, UserError
from varestorer.weights.bundles import RESTORER, is_bundle, read_config, tensors_file
from varestorer.weights.files import read_tensors
from varestorer.weights.published import STUDENT_FILE, TOKENIZER_FILE
from varestorer.weights.runs import CONFIG, is_run, latest_checkpoint, load_run_weights
from varestorer.weights.sizes import adapter_rank, tokenizer_sizes, transformer_sizes

if TYPE_CHECKING:
    from varestorer.systems.varestorer import VARestorer

HOW = f"give a run of scripts/train.py, a checkpoint of one, a bundle's folder, or the published {STUDENT_FILE}"


def build(
    system_class: type[VARestorer], path: Path, tokenizer_file: str | None = None, restorer_file: str | None = None
) -> VARestorer:
    """The system that a path holds.

    Args:
        system_class: what to build.
        path: a run, a checkpoint of one, a bundle or the published student.
        tokenizer_file: of the published student, where it does not lie beside it.
        restorer_file: likewise.

    Raises:
        UsageError: no such path.
        UserError: the path holds no system, or its files do not fit.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist; {HOW}")
    if path.is_file() and path.suffix in (".pth", ".safetensors"):
        return _from_published(system_class, path, tokenizer_file, restorer_file)
    if is_bundle(path):
        return _from_bundle(system_class, path)
    if is_run(path):
        return _from_run(system_class, path)
    raise UserError(f"{path} holds no model; {HOW}")


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


def _from_run(system_class: type[VARestorer], path: Path) -> VARestorer:
    """Rebuild the model of a run's config and fill it with the run's weights."""
    run_dir = latest_checkpoint(path).parents[2]
    try:
        model = OmegaConf.to_container(OmegaConf.load(run_dir / CONFIG).model)
    except (OSError, AttributeError) as error:
        raise UserError(f"the run {run_dir} has no model in its {CONFIG} ({error})") from error
    options = {key: value for key, value in dict(model).items() if not str(key).startswith("_")}  # type: ignore[arg-type]
    system = system_class(**options)
    load_into(system, load_run_weights(path), f"the run {run_dir}")
    return system


def _from_bundle(system_class: type[VARestorer], bundle: Path) -> VARestorer:
    config = read_config(bundle)
    restorer = tensors_file(bundle, RESTORER)
    if config["restorer"] and not restorer.is_file():
        raise UserError(f"the bundle {bundle} has lost its {restorer.name}; download or convert it again")
    return system_class(
        schedule=config["schedule"],
        tokenizer=config["tokenizer"],
        transformer=config["transformer"],
        student=config["student"],
        restorer=str(restorer) if config["restorer"] else None,
        weights={"tokenizer": str(bundle), "transformer": str(bundle)},
    )


def _from_published(
    system_class: type[VARestorer], student_file: Path, tokenizer_file: str | None, restorer_file: str | None
) -> VARestorer:
    """The released student, or a network of other sizes in its form."""
    tokenizer = Path(tokenizer_file or student_file.parent / TOKENIZER_FILE)
    check_part("tokenizer", tokenizer)
    student = read_tensors(student_file)
    return system_class(
        schedule={"size": "0.25M"},
        tokenizer=tokenizer_sizes(read_tensors(tokenizer, nested=("vae",))),
        transformer=transformer_sizes(student),
        student={"lora_rank": adapter_rank(student)},
        restorer=restorer_file or str(student_file.parent / PUBLISHED_FILE),
        weights={"tokenizer": str(tokenizer), "transformer": str(student_file)},
    )
