"""A bundle: a whole system in one folder, as it is shared on the hub.

`config.json` (sizes), `tokenizer.safetensors`, `transformer.safetensors` (without adapters, or with them folded in),
`adapters.safetensors` (where they are kept apart), `restorer.safetensors` (where there is one) and the model card
`README.md`. Tensors have our names, the adapters' without peft's wrapping.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from varestorer.utils.errors import UserError, reason

CONFIG = "config.json"
FORMAT = 1
PARTS = ("schedule", "tokenizer", "transformer", "student", "restorer")
ADAPTERS, RESTORER = "adapters", "restorer"


def is_bundle(path: str | Path) -> bool:
    """Whether a path is a bundle's folder."""
    return tensors_file(Path(path), "transformer").is_file() and (Path(path) / CONFIG).is_file()


def tensors_file(bundle: Path, part: str) -> Path:
    """The file of a part: tokenizer, transformer, adapters or restorer."""
    return bundle / f"{part}.safetensors"


def read_config(bundle: Path) -> dict[str, Any]:
    """The bundle's `config.json`.

    Raises:
        UserError: it cannot be read, or is of another format.
    """
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
