"""The folder of a run: its config, metrics, pictures and checkpoints."""

from __future__ import annotations

import json
import logging
import math
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor, stack

import varestorer
from varestorer.training.stopping import StopRequest
from varestorer.utils.errors import UsageError, reason
from varestorer.utils.files import atomic_write, sync, writing_errors
from varestorer.utils.images import save_image
from varestorer.utils.loggers import Logger
from varestorer.weights.runs import FOLDER, GO_ON, remove_leftovers

LOG = logging.getLogger(__name__)
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
NONFINITE = "nonfinite.jsonl"
FINISHED = "finished"
PACKAGES = ("torch", "torchvision", "numpy", "accelerate", "peft", "transformers", "pyiqa", "hydra-core")


class Run:
    """Where one run writes. The first process writes, the others only ask.

    Attributes:
        run_dir: the folder.
        accelerator: of this process.
        seed: of the run.
        stages: names of its stages in order.
        logger: gets the same numbers and pictures.
        stop: whether a signal asked the run to stop.
        accept_other_data: a resume may go on with other data than those of its checkpoints.
    """

    def __init__(self, run_dir: Path, accelerator: Accelerator, seed: int = 0, logger: Logger | None = None) -> None:
        """Open a new or existing folder; stages derive their seeds from the run's.

        The logger gets the same numbers and pictures as the folder.
        """
        self.run_dir = run_dir
        self.accelerator = accelerator
        self.seed = seed
        self.logger: Logger = logger or Logger()
        self.stop = StopRequest()
        self.stages: list[str] = []
        self.accept_other_data = False
        self._start = time.monotonic()
        run_dir.mkdir(parents=True, exist_ok=True)
        if self.is_main:
            checkpoints = run_dir / FOLDER
            remove_leftovers(run_dir, run_dir / "samples", checkpoints, *checkpoints.glob("*/"))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return bool(self.accelerator.is_main_process)

    def stage_index(self, stage: str) -> int:
        """Place of a stage among the run's stages, in the order they were first met."""
        if stage not in self.stages:
            self.stages.append(stage)
        return self.stages.index(stage)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write `config.yaml`, the resolved config."""
        if self.is_main:
            text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
            with atomic_write(self.run_dir / CONFIG) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def rewind(self, stage: str, step: int) -> None:
        """Drop the lines of `metrics.jsonl` that a resume at `step` of `stage` will write again.

        Lines of later stages stay, behind those of this one: what a stage repeats is what they were built on.
        """
        if not self.is_main:
            return
        for path in (self.run_dir / METRICS, self.run_dir / NONFINITE):
            if path.is_file():
                lines = kept_lines(path, stage, step)
                lines.sort(key=lambda line: self.stage_index(json.loads(line)["stage"]))
                with atomic_write(path) as temporary:
                    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        seconds = max((line["seconds"] for line in self._lines()), default=0.0)
        self._start = min(self._start, time.monotonic() - seconds)

    def log(
        self,
        stage: str,
        step: int,
        values: Mapping[str, float],
        lr: float,
        grad_norm: float,
        *,
        skipped: bool = False,
        speed: Mapping[str, float] | None = None,
    ) -> None:
        """Add one optimizer step to `metrics.jsonl` and the logger.

        Args:
            stage: its name.
            step: from 1.
            values: `loss` and its parts; what is not finite is written as null (JSON has no NaN).
            lr: learning rate of this step.
            grad_norm: of all gradients, before clipping.
            skipped: the step did not touch the weights; its line says so.
            speed: of this step, for the logger only.
        """
        if not self.is_main:
            return
        numbers = {**values, "lr": lr, "grad_norm": grad_norm}
        finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        seconds = round(time.monotonic() - self._start, 3)
        line = {"stage": stage, "step": step, **finite, "seconds": seconds, **({"skipped": True} if skipped else {})}
        self._append(METRICS, line)
        self.logger.log_metrics(stage, step, {**numbers, "seconds": seconds, **(speed or {})})

    def log_nonfinite(self, stage: str, step: int, problem: str, names: list[str], keys: list[int]) -> None:
        """Add a step whose loss or gradient is not finite, as `problem` says, to `nonfinite.jsonl`.

        `names` and `keys` are files and sample numbers of the whole batch.
        """
        if self.is_main:
            self._append(NONFINITE, {"stage": stage, "step": step, "problem": problem, "files": names, "keys": keys})

    def log_checkpoint(self, stage: str, step: int, folder: Path) -> None:
        """Tell the logger of a checkpoint that was written."""
        if self.is_main:
            self.logger.log_checkpoint(stage, step, folder)

    def mean_since(self, stage: str, step: int, key: str) -> float | None:
        """Mean of a number of `metrics.jsonl` after `step` of `stage`; None if it never was finite there.

        Returns None in all processes but the first.
        """
        lines = self._lines() if self.is_main else []
        found = [line.get(key) for line in lines if line["stage"] == stage and line["step"] > step]
        numbers = [value for value in found if value is not None]
        return math.fsum(numbers) / len(numbers) if numbers else None

    def save_samples(self, stage: str, step: int, columns: Mapping[str, Tensor]) -> None:
        """Save a picture `samples/<stage>_<step>.png`: a row per sample, a column per entry, (B,3,H,W) in [0, 1]."""
        from torchvision.utils import make_grid

        if not self.is_main:
            return
        pictures = [images.detach().float().cpu().clamp(0, 1) for images in columns.values()]
        cells = rearrange(stack(pictures), "column row c h w -> (row column) c h w")
        path = self.run_dir / "samples" / f"{stage}_{step:06d}.png"
        save_image(path, make_grid(cells, nrow=len(columns), padding=2, pad_value=1.0))
        self.logger.log_image(stage, step, path)

    def sync_metrics(self) -> None:
        """Put the metrics on the disk, before a checkpoint that relies on them."""
        if self.is_main and (self.run_dir / METRICS).is_file():
            with writing_errors(self.run_dir / METRICS, GO_ON):
                sync(self.run_dir / METRICS)

    def mark_finished(self) -> None:
        """Say in the folder that nothing is left to do: `resume=auto` then looks for another run."""
        if self.is_main:
            with atomic_write(self.run_dir / FOLDER / FINISHED) as temporary:
                temporary.write_text(f"{datetime.now().astimezone().isoformat()}\n", encoding="utf-8")

    def discard_if_unbegun(self) -> None:
        """Remove the folder if no step was taken: a refused command leaves nothing behind."""
        if self.is_main and not any((self.run_dir / name).exists() for name in (METRICS, NONFINITE)):
            shutil.rmtree(self.run_dir, ignore_errors=True)

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        path = self.run_dir / name
        with writing_errors(path, GO_ON), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _lines(self) -> list[dict[str, Any]]:
        path = self.run_dir / METRICS
        return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def kept_lines(path: Path, stage: str, step: int) -> list[str]:
    """Lines of a metrics file without those after `step` of `stage`; a half-written line ends them."""
    kept: list[str] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if line["stage"] != stage or line["step"] <= step:
            kept.append(text)
    return kept


def choose_run_dir(experiment: str, run_dir: str | Path | None, resume: bool, root: Path = Path("outputs")) -> Path:
    """The folder a run writes to.

    Args:
        experiment: name of the experiment.
        run_dir: the folder asked for; None for `<root>/<experiment>/<YYYY-mm-dd_HH-MM-SS>`.
        resume: go on with `run_dir` if it holds a run, else with the newest unfinished run of the experiment.
        root: of all runs.
    Raises:
        UsageError: `run_dir` holds a run and `resume` was not asked for.
    """
    if run_dir is not None:
        folder = Path(run_dir)
        if holds_run(folder) and not resume:
            raise UsageError(f"{folder} holds a run: add resume=auto to go on with it, or give another run_dir")
        return folder
    runs = sorted(path for path in (root / experiment).glob("*") if holds_run(path))
    unfinished = [path for path in runs if not (path / FOLDER / FINISHED).exists()]
    if resume and unfinished:
        return unfinished[-1]
    return _new_folder(root / experiment)


def holds_run(folder: Path) -> bool:
    """Whether a folder was written to by a run."""
    return any((folder / name).exists() for name in (CONFIG, METRICS, FOLDER))


def environment() -> dict[str, Any]:
    """Versions: `git` (commit, `-dirty` when files differ from it; None outside a checkout), packages."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {"git": git_commit(), "python": platform.python_version(), "packages": versions}


def git_commit() -> str | None:
    """Commit of the checkout this package is imported from."""
    root = Path(varestorer.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        LOG.info("no git hash in config.yaml: %s", reason(error))
        return None
    return answer.stdout.strip()


def _new_folder(parent: Path) -> Path:
    """Make `<parent>/<time>`; two runs of the same second get different names."""
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in ("", *(f"_{number}" for number in range(2, 1000))):
        folder = parent / f"{name}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise UsageError(f"{parent} has too many runs of this second; give run_dir=")
