"""A bundle: a whole system in one folder, as it is shared on the hub.

`config.json` (sizes), `tokenizer.safetensors`, `transformer.safetensors` (without adapters, or with them folded in),
`adapters.safetensors` (where they are kept apart), `restorer.safetensors` (where there is one) and the model card
`README.md`. Tensors have our names, the adapters' without peft's wrapping.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varestorer.transformer.adapters import assign_plain, plain_state_dict
from varestorer.utils.errors import UserError, reason
from varestorer.utils.files import file_sha256, write_json, write_text
from varestorer.weights import DEFAULT
from varestorer.weights.card import model_card
from varestorer.weights.files import check_names_and_shapes, read_metadata, read_tensors, save_tensors
from varestorer.weights.releases import HUB, fetch
from varestorer.weights.runs import is_run, latest_checkpoint

CONFIG = "config.json"
FORMAT = 1
PARTS = ("system", "schedule", "tokenizer", "transformer")
ADAPTERS, RESTORER = "adapters", "restorer"
ASSETS = Path(__file__).parents[1] / "assets"
CARD = "README.md"


def is_bundle(path: str | Path) -> bool:
    """Whether a path is a bundle's folder."""
    return tensors_file(Path(path), "transformer").is_file() and (Path(path) / CONFIG).is_file()


def tensors_file(bundle: Path, part: str) -> Path:
    """The file of a part: tokenizer, transformer, adapters or restorer."""
    return bundle / f"{part}.safetensors"


def read_config(bundle: Path) -> dict[str, Any]:
    """The bundle's `config.json`; UserError if it cannot be read, or is of another format."""
    path = bundle / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if config["format"] != FORMAT:
            got = config["format"]
            raise UserError(f"{path} is of bundle format {got}, this version reads {FORMAT}; convert it again")
        missing = [part for part in PARTS if part not in config]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no bundle's config ({reason(error)}); make one with scripts/convert.py") from error
    if missing:
        raise UserError(f"{path} is no bundle's config (no {missing[0]}); make one with scripts/convert.py")
    return config


def save_bundle(system: Any, folder: Path, half: bool = False) -> None:
    """Write a system into a folder; its `config.json` comes last, so that half a bundle is none.

    `half` stores every tensor in float16: half the space, and float32 again when it is read. UserError: a file cannot
    be written, or a weight is too large for float16.
    """
    (folder / CONFIG).unlink(missing_ok=True)
    parts = system.parts()
    for leftover in {ADAPTERS, RESTORER} - parts.keys():
        tensors_file(folder, leftover).unlink(missing_ok=True)
    for part, tensors in parts.items():
        file = tensors_file(folder, part)
        stored = {name: tensor.half() for name, tensor in tensors.items()} if half else tensors
        beyond = [name for name, tensor in stored.items() if half and not tensor.isfinite().all()]
        if beyond:
            raise UserError(
                f"{file} cannot be stored in fp16: {beyond[0]} holds larger values; store it as fp32 or bf16"
            )
        save_tensors(file, stored, adapters_metadata(system) if part == ADAPTERS else None)
    files = {f"{part}.safetensors": tensors_file(folder, part).stat().st_size for part in parts}
    config = {
        "format": FORMAT,
        "system": system.name,
        **system.config,
        "restorer": RESTORER in parts,
        "sources": sources(system),
        **({"weak": system.weak} if system.weak else {}),
    }
    blocks = "bf16" if next(system.transformer.blocks.parameters()).dtype == torch.bfloat16 else "fp32"
    card = model_card(config, files, config["sources"], "fp16" if half else blocks)
    write_text(folder / CARD, card)
    write_json(folder / CONFIG, config, indent=2)


def sources(system: Any) -> dict[str, str]:
    """SHA-256 of the files that a system came from, by their names; a bundle hands on those of its own.

    Of a run, the averaged weights of its latest checkpoint, as `teacher/step_001600`.
    """
    known: dict[str, str] = {}
    for file in system.files.values():
        if is_bundle(file):
            known |= read_config(file).get("sources", {})
        elif is_run(file):
            checkpoint = latest_checkpoint(file)
            known[f"{checkpoint.parent.name}/{checkpoint.name}"] = file_sha256(checkpoint / "ema.safetensors")
        elif file.is_file() and not is_bundle(file.parent):
            known[file.name] = file_sha256(file)
    return dict(sorted(known.items()))


def adapters_metadata(system: Any) -> dict[str, str]:
    """What has to be known to put the adapters onto a base again."""
    return {"student": json.dumps(system.config["student"])}


def adapter_tensors(system: Any) -> dict[str, Tensor]:
    """A system's adapters by their plain names; empty where it has none, or they are merged."""
    return {name: tensor for name, tensor in plain_state_dict(system.transformer).items() if ".lora_" in name}


def own_adapters(system: Any) -> dict[str, Tensor]:
    """A system's adapters, which are to be written; UserError if it has none."""
    adapters = adapter_tensors(system)
    if not adapters:
        raise UserError("the model has no adapters of its own: it has none at all, or they are merged")
    return adapters


def save_adapters(system: Any, path: Path) -> None:
    """Write the adapters, with what is needed to put them onto a teacher again; UserError if there are none."""
    save_tensors(path, own_adapters(system), adapters_metadata(system))


def student_of(path: Path) -> dict[str, Any] | None:
    """Arguments of the `StudentConfig` that a file of adapters makes; None if the path is no such file."""
    student = read_metadata(path).get("student") if path.is_file() else None
    return None if student is None else dict(json.loads(student))


def put_adapters(base: Any, path: Path, student: dict[str, Any], adapters: Mapping[str, Tensor] | None = None) -> Any:
    """The base's networks, with the teacher's weights, and the adapters of a file in place of its own, if it has any.

    The student is from `student_of`; `adapters` are what the file holds, by plain names, None to read it. UserError:
    the base's adapters are merged, or the file does not fit it.
    """
    if base.student_config.merged:
        raise UserError(
            "the adapters of the base are merged and its teacher is gone; give one with separate ones, or none"
        )
    with torch.device("meta"):
        system = type(base)(**(base.config | {"student": student}))
    adapters = read_tensors(path) if adapters is None else adapters
    check_names_and_shapes(adapter_tensors(system), adapters, str(path))
    kept = {name: t for name, t in plain_state_dict(base.transformer).items() if ".lora_" not in name}
    dtype = next(base.transformer.blocks.parameters()).dtype
    assign_plain(system.transformer, kept | {name: tensor.to(dtype) for name, tensor in adapters.items()})
    assign_plain(system.tokenizer, base.tokenizer.state_dict())
    system.restorer = base.restorer
    system.files = base.files | {"adapters": Path(path)}
    return system.eval().requires_grad_(False)


def shipped(name: str | Path) -> Path:
    """The bundle of a shipped model where `name` is one's, as in `ckpt=nano`; any other path or name as it is.

    `hub/NAME` is a published file, which is fetched if it is not in the hub's cache; UserError: the hub does not give
    it. A run, a bundle or a file of that name in the working directory comes first.
    """
    path = Path(name)
    is_there = path.is_file() or is_run(path) or is_bundle(path)
    if path.parent == Path(HUB) and not is_there:
        return fetch([path.name])[0]
    is_one = str(name) == path.name and not is_there and is_bundle(ASSETS / path)
    return ASSETS / path if is_one else path


def named_or_default(name: str | Path | None) -> Path:
    """What `ckpt=` names; the model that comes with the package, whatever the working directory holds, for None."""
    return ASSETS / DEFAULT if name is None else shipped(name)
