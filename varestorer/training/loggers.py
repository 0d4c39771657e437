"""Where curves and pictures go beside `metrics.jsonl`: Weights & Biases, or nowhere.

A logger is made by a factory called with the run's folder and its resolved config, in the first process only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from varestorer.utils.wandb_run import open_wandb_run


class Logger(Protocol):
    """What a run tells a logger; keys become `<stage>/<key>`."""

    def log_metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one optimiser step."""

    def log_image(self, stage: str, step: int, path: Path) -> None:
        """A picture that was just saved."""

    def log_checkpoint(self, stage: str, step: int, folder: Path) -> None:
        """A checkpoint that was just written."""

    def finish(self) -> None:
        """The run ends."""


class NullLogger:
    """Logs nowhere (`logger=none`)."""

    def log_metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Nothing to do."""

    def log_image(self, stage: str, step: int, path: Path) -> None:
        """Nothing to do."""

    def log_checkpoint(self, stage: str, step: int, folder: Path) -> None:
        """Nothing to do."""

    def finish(self) -> None:
        """Nothing to do."""


class WandbLogger:
    """Weights & Biases; each stage has its own step axis, because stages count from 1 again."""

    def __init__(self, wandb_run: Any, artifacts: bool = False) -> None:
        """Log to a run that `wandb.init` gave; `artifacts`: checkpoints too."""
        self._run = wandb_run
        self._artifacts = artifacts
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

    def log_checkpoint(self, stage: str, step: int, folder: Path) -> None:
        """Send a checkpoint, if asked to, as a version of the artifact `<run>-<stage>`; wandb keeps a copy of it."""
        if not self._artifacts:
            return
        import wandb

        artifact = wandb.Artifact(f"{self._run.id}-{stage}", type="model", metadata={"stage": stage, "step": step})
        artifact.add_dir(str(folder))
        self._run.log_artifact(artifact, aliases=["latest", folder.name])

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
    run_dir: Path,
    config: Mapping[str, Any],
    *,
    project: str = "varestorer",
    entity: str | None = None,
    artifacts: bool = False,
) -> Logger:
    """Factory of `logger=wandb`: a run of Weights & Biases, or the one this folder had (see `utils.wandb_run`).

    The config has the git hash and the versions of packages under `environment`. Where wandb cannot start, training
    goes on without: `metrics.jsonl` has the same numbers.

    Args:
        run_dir: the run's folder.
        config: resolved.
        project: on the server.
        entity: user or team; None for the key's own.
        artifacts: send every checkpoint, too.
    """
    wandb_run = open_wandb_run(run_dir, config, project=project, entity=entity)
    return NullLogger() if wandb_run is None else WandbLogger(wandb_run, artifacts)
