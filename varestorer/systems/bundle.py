"""Writing a system as a bundle, see `weights.bundles`. The same system gives the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from varestorer.transformer.adapters import plain_state_dict
from varestorer.utils.errors import UserError
from varestorer.utils.files import atomic_write, write_json, write_text
from varestorer.weights.bundles import ADAPTERS, CONFIG, FORMAT, RESTORER, is_bundle, read_config, tensors_file
from varestorer.weights.card import model_card
from varestorer.weights.runs import is_run, latest_checkpoint
from varestorer.weights.storage import file_sha256

if TYPE_CHECKING:
    from varestorer.systems.varestorer import VARestorer

CARD = "README.md"


def save_bundle(system: VARestorer, folder: Path, half: bool = False) -> None:
    """Write a system into a folder; its `config.json` comes last, so that half a bundle is none.

    Args:
        system: what to write.
        folder: where to.
        half: store every tensor in float16, which takes half the space and is float32 again when it is read.

    Raises:
        UserError: a file cannot be written, or a weight is too large for float16.
    """
    (folder / CONFIG).unlink(missing_ok=True)
    parts = _parts(system)
    for leftover in {ADAPTERS, RESTORER} - parts.keys():
        tensors_file(folder, leftover).unlink(missing_ok=True)
    for part, tensors in parts.items():
        file = tensors_file(folder, part)
        stored = _halved(tensors, file) if half else tensors
        save_tensors(file, stored, adapters_metadata(system) if part == ADAPTERS else None)
    files = {f"{part}.safetensors": tensors_file(folder, part).stat().st_size for part in parts}
    config = {"format": FORMAT, **system.config, "restorer": system.restorer is not None, "sources": sources(system)}
    card = model_card(config, files, config["sources"], "fp16" if half else precision(system))
    write_text(folder / CARD, card)
    write_json(folder / CONFIG, config, indent=2)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all.

    Args:
        path: the file.
        tensors: from any device.
        metadata: of the header; one entry at most, as safetensors writes several in a random order.
    Raises:
        UserError: it cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(plain, temporary, metadata or {"format": "pt"})
        temporary.chmod(0o644)  # safetensors lets nobody else read


def _halved(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Tensors in float16.

    Raises:
        UserError: a value that float16 cannot hold.
    """
    stored = {name: tensor.half() for name, tensor in tensors.items()}
    beyond = [name for name, tensor in stored.items() if not tensor.isfinite().all()]
    if beyond:
        raise UserError(f"{file} cannot be stored in fp16: {beyond[0]} holds larger values; store it as fp32 or bf16")
    return stored


def sources(system: VARestorer) -> dict[str, str]:
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


def _parts(system: VARestorer) -> dict[str, dict[str, Tensor]]:
    """Tensors of each file."""
    transformer = plain_state_dict(system.transformer)
    adapters = {name: tensor for name, tensor in transformer.items() if ".lora_" in name}
    parts = {
        "tokenizer": dict(system.tokenizer.state_dict()),
        "transformer": {name: tensor for name, tensor in transformer.items() if name not in adapters},
        ADAPTERS: adapters,
        RESTORER: {} if system.restorer is None else dict(system.restorer.published_state_dict()),
    }
    return {part: tensors for part, tensors in parts.items() if tensors}


def adapters_metadata(system: VARestorer) -> dict[str, str]:
    """What has to be known to put the adapters onto a base again."""
    return {"student": json.dumps(system.config["student"])}


def precision(system: VARestorer) -> str:
    """What the blocks of the transformer are kept in, as `VARestorer.set_precision` names it."""
    dtype = next(system.transformer.blocks.parameters()).dtype
    return "bf16" if dtype == torch.bfloat16 else "fp32"
