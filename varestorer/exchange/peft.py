"""Adapters in PEFT's own file format: a folder of `adapter_config.json` and `adapter_model.safetensors`.

peft's loader puts them onto the transformer (`PeftModel.from_pretrained(system.transformer, folder)`). What else makes
the student (`StudentConfig`) peft has no place for: it stands in the header of the tensors' file.
"""

from __future__ import annotations

import json
import logging
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from varestorer.transformer.adapters import LAYERS, lora_config
from varestorer.utils.errors import UserError, reason
from varestorer.weights.bundle import adapters_metadata, own_adapters
from varestorer.weights.files import read_metadata, read_tensors, save_tensors

LOG = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
WAYS = {"lora_A": "lora_down", "lora_B": "lora_up"}
ALIEN = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias", "use_qalora")
"""Entries of a config that make other layers than a product of two matrices of one rank."""


def is_peft(folder: Path) -> bool:
    """Whether a folder holds adapters in PEFT's format."""
    return (folder / CONFIG).is_file()


def save(system: Any, folder: Path) -> None:
    """Write a system's adapters, which are not merged, into a folder that is made.

    UserError: the system has none, or a file cannot be written.
    """
    adapters, student = own_adapters(system), system.student_config
    folder.mkdir(parents=True, exist_ok=True)
    peft_way = {ours: theirs for theirs, ours in WAYS.items()}
    named = {re.sub(r"lora_(down|up)", lambda m: peft_way[m[0]], PREFIX + name): t for name, t in adapters.items()}
    save_tensors(folder / TENSORS, named, adapters_metadata(system))
    lora_config(student.lora_rank, student.lora_targets, inference_mode=True).save_pretrained(str(folder))


def read(folder: Path, base: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Adapters that peft or `save` wrote.

    Args:
        folder: theirs.
        base: the system they are meant for; says what makes its student where the files do not.
    Returns:
        arguments of the student's config, and the tensors under plain names, their scale (alpha over rank) in them.
    Raises:
        UserError: a file is missing or damaged, or holds adapters of a kind that this package has not.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, rank, alpha = config["peft_type"], int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no config of a LoRA adapter ({reason(error)}); save it again with peft") from error
    strange = [name for name in ALIEN if config.get(name)] + ([] if config.get("bias", "none") == "none" else ["bias"])
    if kind != "LORA" or rank < 1 or strange:
        got = f"{kind} of rank {rank}" + (f" with {', '.join(strange)}" if strange else "")
        raise UserError(f"{path}: only plain LoRA adapters of one rank can be read, got {got}")
    tensors = read_tensors(folder / TENSORS)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    adapters = {}
    for name, tensor in tensors.items():
        plain = re.sub(r"lora_[AB](?=\.weight$)", lambda m: WAYS[m[0]], name.removeprefix(PREFIX))
        adapters[plain] = tensor * scale if ".lora_up." in plain and scale != 1 else tensor
    if stored := read_metadata(folder / TENSORS).get("student"):
        return json.loads(stored), adapters
    LOG.warning("%s says nothing of the student beside its adapters; what the base's student is, is taken", folder)
    targets = [part for part in LAYERS if any(f".{part}." in name for name in adapters)]
    return asdict(base.student_config) | {"lora_rank": rank, "lora_targets": targets, "merged": False}, adapters
