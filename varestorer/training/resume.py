"""What a resumed run may change of its config: not the model, nor which data it sees in which order."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from varestorer.utils.errors import UsageError, UserError, reason

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
