"""Where curves and pictures go beside `metrics.jsonl`: Weights & Biases, or nowhere.

A logger is made by a factory called with the run's folder and its resolved config, in the first process only.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

LOG = logging.getLogger(__name__)


class Logger(Protocol):
    """What a run tells a logger; keys become `<stage>/<key>`."""

    def log_metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one optimiser step."""

    def log_image(self, stage: str, step: int, path: Path) -> None:
        """A picture that was just saved."""

    def finish(self) -> None:
        """The run ends."""


LoggerFactory = Callable[[Path, Mapping[str, Any]], Logger]


class NullLogger:
    """Logs nowhere (`logger=none`)."""

    def log_metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Nothing to do."""

    def log_image(self, stage: str, step: int, path: Path) -> None:
        """Nothing to do."""

    def finish(self) -> None:
        """Nothing to do."""


class WandbLogger:
    """Weights & Biases; each stage has its own step axis, because stages count from 1 again."""

    def __init__(self, wandb_run: Any) -> None:
        """Log to a run that `wandb.init` gave."""
        self._run = wandb_run
        self._stages: set[str] = set()

    def log_metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of one optimiser step."""
        self._define(stage)
        named = {f"{stage}/{key}": value for key, value in values.items()}
        self._run.log({**named, f"{stage}/step": step})

    def log_image(self, stage: str, step: int, path: Path) -> None:
        """Send a saved picture."""
        import wandb

        self._define(stage)
        self._run.log({f"{stage}/samples": wandb.Image(str(path)), f"{stage}/step": step})

    def finish(self) -> None:
        """Flush and close."""
        self._run.finish()

    def _define(self, stage: str) -> None:
        if stage not in self._stages:
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)


def no_logger(run_dir: Path, config: Mapping[str, Any]) -> Logger:
    """Factory of `logger=none`."""
    return NullLogger()


def open_wandb(
    run_dir: Path, config: Mapping[str, Any], *, project: str = "varestorer", entity: str | None = None
) -> Logger:
    """Start a Weights & Biases run, or go on with the one this folder had.

    Offline unless there is a key in `WANDB_API_KEY` or `WANDB_MODE` says otherwise (`wandb sync` uploads an
    offline run later). Its files are under `<run_dir>/wandb`. If it cannot start, a warning says why and the
    run goes on without: `metrics.jsonl` has the same numbers.
    """
    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    try:
        import wandb

        settings = wandb.Settings(silent=True, console="off")
        wandb_run = wandb.init(
            dir=str(run_dir),
            project=project,
            entity=entity,
            name="/".join(run_dir.absolute().parts[-2:]),
            config=dict(config),
            mode=mode,  # type: ignore[arg-type]  # a plain string from the environment; wandb checks it
            id=_run_id(run_dir),
            resume="allow" if mode == "online" else None,
            settings=settings,
        )
    except Exception as error:  # noqa: BLE001  # whatever its reason, a logger must not end a training run
        LOG.warning("wandb could not start (%s); going on with metrics.jsonl alone (as logger=none)", error)
        return NullLogger()
    return WandbLogger(wandb_run)


def _run_id(run_dir: Path) -> str:
    """The id of this folder's wandb run, drawn once and kept, so that a resume goes on with it."""
    path = run_dir / "wandb" / "run_id"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
