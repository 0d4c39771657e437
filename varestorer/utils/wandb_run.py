"""The one door to Weights & Biases: starting a run that belongs to a folder."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from varestorer.utils.errors import reason
from varestorer.utils.files import atomic_write

LOG = logging.getLogger(__name__)


def open_wandb_run(
    folder: Path, config: Mapping[str, Any], *, project: str = "varestorer", entity: str | None = None
) -> Any | None:
    """Start a Weights & Biases run, or go on with the one this folder had.

    Offline unless there is a key in `WANDB_API_KEY` or `WANDB_MODE` says otherwise (`wandb sync` uploads an offline
    run later). Its files are under `<folder>/wandb`.

    Args:
        folder: of a training run or of an evaluation.
        config: what the run was configured with.
        project: on the server.
        entity: user or team; None for the key's own.
    Returns:
        What `wandb.init` gave; None if it could not start, and a warning says why: the folder has the same figures.
    """
    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    try:
        import wandb

        return wandb.init(
            dir=str(folder),
            project=project,
            entity=entity,
            name="/".join(folder.absolute().parts[-2:]),
            config=dict(config),
            mode=mode,  # type: ignore[arg-type]  # a plain string from the environment; wandb checks it
            id=_run_id(folder),
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
    except Exception as error:  # noqa: BLE001  # whatever its reason, a logger must not end what it reports on
        LOG.warning("wandb could not start (%s); going on without it (as logger=none)", reason(error))
        return None


def _run_id(folder: Path) -> str:
    """The id of this folder's run, drawn once and kept, so that a resume goes on with it."""
    path = folder / "wandb" / "run_id"
    if not path.is_file():
        with atomic_write(path) as temporary:
            temporary.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
