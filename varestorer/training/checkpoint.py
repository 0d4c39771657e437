"""Checkpoints: the whole of resume. What lies where in a run, and how its weights are found, is `weights.runs`.

A checkpoint holds `model`, `ema`, `optimizer` and `rng` as safetensors, `state.json`, and `data.json` with what decides
which picture a sample number shows. With `trainer.keep_best` each has a score, and the stage's folder a file `best`:
`{"checkpoint": "step_000100", "metric": ..., "mode": "min", "value": ...}`.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

from varestorer.data.store import changes
from varestorer.training.optim import Ema, load_optimizer_tensors, optimizer_tensors
from varestorer.training.parallel import all_gathered, sharded_like
from varestorer.utils.errors import UserError
from varestorer.utils.files import atomic_write, sync, write_json
from varestorer.utils.seeds import capture_rng, restore_rng
from varestorer.weights.runs import (
    BEST,
    FOLDER,
    INITIAL,
    LATEST,
    STATE,
    newest_checkpoint,
    place_of,
    read_json,
    read_tensors,
    sealed_folder,
    step_folders,
    step_of,
    write_tensors,
)

LOG = logging.getLogger(__name__)
DATA = "data.json"
OTHER_DATA = "resume_other_data"  # the key of the config


@dataclass
class Trained:
    """All that changes while a stage trains, beside the generators and the position in the data."""

    parameters: dict[str, nn.Parameter]
    optimizer: Optimizer
    ema: Ema
    step: int = 0  # optimizer steps taken
    samples: int = 0  # samples seen: the position in the endless sequence of the data
    skipped: int = 0  # steps in a row, up to this one, that were left out because something was not finite


@dataclass(frozen=True)
class Score:
    """What `keep_best` compares.

    Attributes:
        metric: a key of `metrics.jsonl`.
        mode: "min" or "max": which value is better.
        value: its mean over the last `checkpoint_every` steps; None if it never was finite.
    """

    metric: str
    mode: str
    value: float | None

    @property
    def badness(self) -> float:
        """Smaller is better, whatever the mode."""
        if self.value is None:
            return math.inf
        return self.value if self.mode == "min" else -self.value


@dataclass(frozen=True)
class Checkpointer:
    """Saves and restores one stage of a run.

    Attributes:
        run_dir: the run's folder.
        stage: name of the stage; `stage_index` its place among the run's stages.
        accelerator: of this process; every process calls `save`, the first one writes.
        frozen_sha256: of the tensors that do not train, which a checkpoint relies on without holding them.
        keep_last: newest checkpoints of the stage to keep.
        data: what decides which picture a sample number shows, see `data.store.Contents`; None: nobody knows.
        accept_other_data: go on though it is not what the checkpoint was made with.
    """

    run_dir: Path
    stage: str
    stage_index: int
    accelerator: Accelerator
    frozen_sha256: str
    keep_last: int = 2
    data: Mapping[str, str] | None = None
    accept_other_data: bool = False

    def save(self, trained: Trained, schedule: Mapping[str, Any], score: Score | None = None) -> Path:
        """Write a checkpoint of the present state, then point `latest` (and `best`) to it and drop old ones.

        Args:
            trained: what to save.
            schedule: what the learning rate follows, for the reader of `state.json`.
            score: what tells the best checkpoint from the others; None keeps the newest ones only.
        Returns:
            its folder.
        Raises:
            UserError: it cannot be written; older checkpoints are untouched.
        """
        generators = gather_object([capture_rng()])
        tensors = self._tensors(trained)
        folder = self.run_dir / FOLDER / self.stage / f"step_{trained.step:06d}"
        if self.accelerator.is_main_process:
            with sealed_folder(folder) as temporary:
                for name, content in tensors.items():
                    write_tensors(temporary / f"{name}.safetensors", content)
                if self.data is not None:
                    write_json(temporary / DATA, self.data)
                self._write(
                    temporary, trained, {"schedule": dict(schedule), "score": score and vars(score)}, generators
                )
            self._settle(folder, score)
        self.accelerator.wait_for_everyone()
        return folder

    def restore(self, trained: Trained) -> None:
        """Put the newest whole checkpoint of this stage into `trained` and the generators, if there is one.

        Raises:
            UserError: the checkpoint was made on another frozen base or of other data, or holds other parameters.
        """
        folder = newest_checkpoint(self.run_dir, self.stage)
        if folder is None:
            return
        state = read_json(folder / STATE)
        if state["frozen_sha256"] != self.frozen_sha256:
            raise UserError(
                f"{folder} was trained on other frozen weights (sha256 {state['frozen_sha256'][:12]}, now "
                f"{self.frozen_sha256[:12]}); give the weights and model options it was started with"
            )
        self._check_data(folder)
        model = read_tensors(folder / "model.safetensors")
        _load_parameters(trained.parameters, model, folder)
        trained.ema.load(read_tensors(folder / "ema.safetensors"))
        optimizer = read_tensors(folder / "optimizer.safetensors")
        load_optimizer_tensors(trained.optimizer, trained.parameters, optimizer)
        trained.step, trained.samples, trained.skipped = state["step"], state["samples"], state["skipped"]
        self._restore_generators(folder, state["rng"])
        if self.accelerator.is_main_process:
            self._settle(folder, _score(folder))  # a kill may have come between saving and this
        LOG.info("%s: going on from %s", self.stage, folder)

    def _check_data(self, folder: Path) -> None:
        """Refuse a checkpoint of other data: from here on each sample number would show another picture."""
        if self.data is None:
            return
        if not (folder / DATA).is_file():
            LOG.info("%s does not say of which data it is: not compared", folder)
            return
        told = changes(read_json(folder / DATA), self.data)
        if told is None:
            return
        message = f"the data of stage {self.stage} changed since {folder} was saved: {told}"
        if not self.accept_other_data:
            raise UserError(
                f"{message}. All samples would come in another order than in the run so far; bring the files back, "
                f"start a new run, or go on with other data on purpose: {OTHER_DATA}=true"
            )
        LOG.warning("%s; going on, as %s=true", message, OTHER_DATA)

    def _tensors(self, trained: Trained) -> dict[str, dict[str, Tensor]]:
        """What goes into each file, whole; empty in all processes but the first. All have to ask."""
        files: dict[str, Mapping[str, Tensor]] = {
            "model": trained.parameters,
            "ema": trained.ema.averages,
            "optimizer": optimizer_tensors(trained.optimizer, trained.parameters),
        }
        is_main = self.accelerator.is_main_process
        return {name: all_gathered(tensors, is_main) for name, tensors in files.items()}

    def _write(self, folder: Path, trained: Trained, notes: Mapping[str, Any], generators: list[Any]) -> None:
        tensors = {f"{k}/{rank}": v for rank, (_, found) in enumerate(generators) for k, v in found.items()}
        write_tensors(folder / "rng.safetensors", tensors)
        state = {
            "stage": self.stage,
            "stage_index": self.stage_index,
            "step": trained.step,
            "samples": trained.samples,
            "skipped": trained.skipped,
            **notes,
            "frozen_sha256": self.frozen_sha256,
            "rng": [plain for plain, _ in generators],
        }
        write_json(folder / STATE, state)

    def _restore_generators(self, folder: Path, plain: list[dict[str, Any]]) -> None:
        rank = self.accelerator.process_index
        if rank >= len(plain):
            return  # more processes than before: the new ones keep the seed of their rank
        tensors = read_tensors(folder / "rng.safetensors")
        mine = {k.removesuffix(f"/{rank}"): v for k, v in tensors.items() if k.endswith(f"/{rank}")}
        restore_rng(plain[rank], mine)

    def _settle(self, folder: Path, score: Score | None) -> None:
        """Point `latest` and `best` to a checkpoint that is whole, where they should, and drop old ones."""
        later = (
            place_of(path)[0] > self.stage_index for one in folder.parents[1].glob("*/") for path in step_folders(one)
        )
        if not any(later):
            with atomic_write(folder.parents[1] / LATEST) as temporary:
                temporary.write_text(f"{self.stage}/{folder.name}\n", encoding="utf-8")
                sync(temporary)
        # later ones than this were found damaged
        kept = [*_up_to(folder)[-self.keep_last :], None if score is None else self._mark_best(folder, score)]
        for other in step_folders(folder.parent):
            if other not in kept:
                shutil.rmtree(other)

    def _mark_best(self, newest: Path, score: Score) -> Path | None:
        """Name the best checkpoint so far in `best`; the earliest, where several are equally good."""
        scores = {folder: _score(folder) for folder in _up_to(newest)}
        rated = {f: s for f, s in scores.items() if s is not None and (s.metric, s.mode) == (score.metric, score.mode)}
        best = min(rated, key=lambda folder: rated[folder].badness, default=None)
        if best is None or rated[best].value is None:
            return None
        with atomic_write(newest.parent / BEST) as temporary:
            temporary.write_text(json.dumps({"checkpoint": best.name, **vars(rated[best])}) + "\n", encoding="utf-8")
            sync(temporary)
        return best


def _up_to(newest: Path) -> list[Path]:
    return [folder for folder in step_folders(newest.parent) if step_of(folder) <= step_of(newest)]


def _score(folder: Path) -> Score | None:
    """The score a checkpoint was saved with; None if it has none, or cannot be read."""
    try:
        return Score(**read_json(folder / STATE)["score"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_initial(run_dir: Path, state: Mapping[str, Tensor]) -> None:
    """Keep a system's starting weights when part of them was drawn at random, so nothing is ever redrawn."""
    with atomic_write(run_dir / FOLDER / INITIAL) as temporary:
        write_tensors(temporary, state)
        sync(temporary)


@torch.no_grad()
def _load_parameters(parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor], source: Path) -> None:
    """Copy saved tensors into parameters of exactly the same names and shapes."""
    want = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    have = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if want != have:
        differ = sorted(n for n in want.keys() | have.keys() if want.get(n) != have.get(n))
        raise UserError(
            f"{source} holds other parameters than this model trains: {len(differ)} differ, such as "
            f"{differ[0]} ({have.get(differ[0])} there, {want.get(differ[0])} here); resume with the "
            "run's own model options"
        )
    for name, parameter in parameters.items():
        parameter.copy_(sharded_like(saved[name], parameter))
