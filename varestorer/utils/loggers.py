"""Where figures and pictures go beside a run's own files: Weights & Biases, TensorBoard, Trackio, several or none.

Training and evaluation log through the same few methods, so that a figure has one name wherever it goes. A logger is
made by a factory called with the run's folder and its resolved config, in the first process only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from varestorer.utils.errors import reason
from varestorer.utils.files import atomic_write
from varestorer.utils.images import load_image, to_levels

LOG = logging.getLogger(__name__)
Cell = str | float | Path | None
"""Of a table; a path is a picture."""


class Logger:
    """Logs nowhere (`logger=none`), and what a run tells any other; keys become `<group>/<key>`.

    A group is a stage of a training, or `eval/<dataset>`.
    """

    def log_metrics(self, group: str, step: int | None, values: Mapping[str, float]) -> None:
        """Numbers of one optimizer step, or of a whole evaluation (step None)."""

    def log_image(self, group: str, step: int, path: Path) -> None:
        """A picture that was just saved, as `<group>/samples`."""

    def log_table(self, group: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Pictures of an evaluation with their figures, as `<group>/images`."""

    def log_checkpoint(self, group: str, step: int, folder: Path) -> None:
        """A checkpoint that was just written."""

    def finish(self) -> None:
        """The run ends."""


class Loggers(Logger):
    """Several at once."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = loggers
        for name in ("log_metrics", "log_image", "log_table", "log_checkpoint", "finish"):
            setattr(self, name, partial(self._all, name))

    def _all(self, name: str, *args: Any) -> None:
        for logger in self.loggers:
            getattr(logger, name)(*args)


class WandbLogger(Logger):
    """Weights & Biases; each stage has its own step axis, because stages count from 1 again."""

    library = "wandb"

    def __init__(self, run: Any, artifacts: bool = False) -> None:
        """Log to a run that `wandb.init` gave; `artifacts`: checkpoints too."""
        self._run = run
        self._artifacts = artifacts
        self._stages: set[str] = set()

    def log_metrics(self, group: str, step: int | None, values: Mapping[str, Any]) -> None:
        named = {f"{group}/{key}": value for key, value in values.items()}
        if step is not None and group not in self._stages:
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/step")
            self._stages.add(group)
        self._run.log(named if step is None else {**named, f"{group}/step": step})

    def log_image(self, group: str, step: int, path: Path) -> None:
        self.log_metrics(group, step, {"samples": self._image(path)})

    def log_table(self, group: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        cells = [[self._image(cell) if isinstance(cell, Path) else cell for cell in row] for row in rows]
        table = import_module(self.library).Table(columns=[*columns], data=cells)
        self.log_metrics(group, None, {"images": table})

    def log_checkpoint(self, group: str, step: int, folder: Path) -> None:
        """Send a checkpoint, if asked to, as a version of the artifact `<run>-<stage>`; wandb keeps a copy of it."""
        if not self._artifacts:
            return
        import wandb

        artifact = wandb.Artifact(f"{self._run.id}-{group}", type="model", metadata={"stage": group, "step": step})
        artifact.add_dir(str(folder))
        self._run.log_artifact(artifact, aliases=["latest", folder.name])

    def finish(self) -> None:
        self._run.finish()

    def _image(self, path: Path) -> Any:
        """A picture as browsers show it: its path, or the levels of other kinds of file."""
        is_plain = path.suffix.lower() in (".png", ".jpg", ".jpeg")
        return import_module(self.library).Image(str(path) if is_plain else to_levels(load_image(path)))


class TrackioLogger(WandbLogger):
    """Trackio, which has wandb's names; its own folder (`TRACKIO_DIR`) keeps all runs; `trackio show` shows them."""

    library = "trackio"

    def log_metrics(self, group: str, step: int | None, values: Mapping[str, Any]) -> None:
        self._run.log({f"{group}/{key}": value for key, value in values.items()}, step=step)

    def finish(self) -> None:
        with contextlib.redirect_stdout(StringIO()):  # it prints
            self._run.finish()


class TensorBoardLogger(Logger):
    """TensorBoard; the pictures of an evaluation are the steps of one per column."""

    def __init__(self, writer: Any) -> None:
        """Log to a `torch.utils.tensorboard.SummaryWriter`."""
        self._writer = writer

    def log_metrics(self, group: str, step: int | None, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(f"{group}/{key}", value, step or 0)

    def log_image(self, group: str, step: int, path: Path) -> None:
        self._writer.add_image(f"{group}/samples", load_image(path), step)

    def log_table(self, group: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        for number, row in enumerate(rows):
            for column, cell in zip(columns, row, strict=True):
                if isinstance(cell, Path):
                    self._writer.add_image(f"{group}/images/{column}", load_image(cell), number)

    def finish(self) -> None:
        self._writer.close()


Factory = Callable[[Path, Mapping[str, Any]], Logger]


def open_loggers(factories: Mapping[str, Factory] | None, folder: Path, config: Mapping[str, Any]) -> Logger:
    """All loggers of a config, by name; one that cannot start is a warning, and the run goes on without.

    Its folder has all. The config is what a training run or an evaluation was made with; of a training it has the git
    hash and the versions of packages.
    """
    opened: list[Logger] = []
    for name, factory in (factories or {}).items():
        try:
            opened.append(factory(folder, config))
        except Exception as error:  # noqa: BLE001  # whatever its reason, a logger must not end what it reports on
            missing = f"; pip install {name}" if isinstance(error, ImportError) else ""
            LOG.warning("%s could not start (%s%s); going on without it", name, reason(error), missing)
    return opened[0] if len(opened) == 1 else Loggers(opened)


def open_wandb(
    folder: Path,
    config: Mapping[str, Any],
    *,
    project: str = "varestorer",
    entity: str | None = None,
    artifacts: bool = False,
) -> Logger:
    """Start a run of Weights & Biases, or go on with the one this folder had; its files are in `<folder>/wandb`.

    Offline unless there is a key in `WANDB_API_KEY` or `WANDB_MODE` says otherwise (`wandb sync` uploads an offline run
    later). The entity is a user or a team, None for the key's own; `artifacts` sends every checkpoint, too.
    """
    import wandb

    path = folder / "wandb" / "run_id"
    if not path.is_file():  # drawn once and kept, so that a resume goes on with it
        with atomic_write(path) as temporary:
            temporary.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    run = wandb.init(
        dir=str(folder),
        project=project,
        entity=entity,
        name=_run_name(folder),
        config=dict(config),
        mode=mode,  # type: ignore[arg-type]  # a plain string from the environment; wandb checks it
        id=path.read_text(encoding="utf-8").strip(),
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(silent=True, console="off"),
    )
    return WandbLogger(run, artifacts)


def open_tensorboard(folder: Path, config: Mapping[str, Any]) -> Logger:
    """Event files in `<folder>/tensorboard`, with the config as a text."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    writer.add_text("config", f"```yaml\n{text}```")
    return TensorBoardLogger(writer)


def open_trackio(folder: Path, config: Mapping[str, Any], *, project: str = "varestorer") -> Logger:
    """A local run of Trackio named after the folder, or the one that had this name."""
    import trackio

    with contextlib.redirect_stdout(StringIO()):  # it prints
        run = trackio.init(
            project=project,
            name=_run_name(folder),
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
    return TrackioLogger(run)


def _run_name(folder: Path) -> str:
    return "/".join(folder.absolute().parts[-2:])
