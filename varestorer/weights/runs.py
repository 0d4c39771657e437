"""The weights of a run, read from its folder; training writes them (`training.checkpoint`).

`<run>/checkpoints/` holds `initial.safetensors` (a start that was drawn at random), a folder per stage with
`step_000100/` in it, and `latest`, a line of text naming the newest whole checkpoint as `<stage>/<step>`. Where
`trainer.keep_best` is set, a stage's folder also has `best`, a JSON object that names its best checkpoint.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from varestorer.utils.errors import UserError, reason
from varestorer.weights import storage

LOG = logging.getLogger(__name__)
FOLDER = "checkpoints"
INITIAL = "initial.safetensors"
LATEST = "latest"
BEST = "best"
CONFIG = "config.yaml"


def is_run(path: str | Path) -> bool:
    """Whether a path is a run's folder, a checkpoint in one, or its `latest` or `best`."""
    path = Path(path)
    if path.is_file():
        return path.name in (LATEST, BEST) and FOLDER in (path.parent.name, path.parents[1].name)
    return (path / FOLDER).is_dir() or (path / storage.STATE).is_file()


def load_initial(run_dir: Path) -> dict[str, Tensor] | None:
    """What `save_initial` kept; None if the run started from files alone."""
    path = run_dir / FOLDER / INITIAL
    return storage.read_tensors(path) if path.is_file() else None


def newest_checkpoint(run_dir: Path, stage: str | None = None) -> Path | None:
    """Newest whole checkpoint of a run, or of one of its stages; None if there is none.

    Damaged ones are named in a warning and the one before is taken.
    """
    for folder in _candidates(run_dir / FOLDER, stage):
        problem = storage.damage(folder)
        if problem is None:
            return folder
        LOG.warning("damaged checkpoint %s (%s): taking the one before", folder, problem)
    return None


def latest_checkpoint(run_dir: str | Path, stage: str | None = None) -> Path:
    """Folder of the newest whole checkpoint.

    Args:
        run_dir: a run's folder, its `checkpoints/latest`, a stage's `best`, or a checkpoint's own folder.
        stage: look at this stage only.
    Raises:
        UserError: there is none.
    """
    path = Path(run_dir)
    if path.name == LATEST and path.parent.name == FOLDER:
        path = path.parents[1]
    if path.name == BEST and path.is_file():
        path = _best(path)
    if (path / storage.STATE).is_file():
        problem = storage.damage(path)
        if problem is not None:
            raise UserError(f"damaged checkpoint {path}: {problem}; give another one, or the run's folder")
        return path
    found = newest_checkpoint(path, stage)
    if found is None:
        of_stage = f" of stage {stage}" if stage else ""
        raise UserError(f"no checkpoint{of_stage} in {path}; give a run's folder (with {FOLDER}/ in it)")
    return found


def load_ema(path: str | Path) -> dict[str, Tensor]:
    """Averaged weights (float32, CPU) of what one stage trained: of a checkpoint, or a run's latest."""
    return storage.read_tensors(latest_checkpoint(path) / "ema.safetensors")


def load_run_weights(path: str | Path) -> dict[str, Tensor]:
    """All the weights a run made: its random start, then the averaged weights of each stage in turn.

    Args:
        path: a run's folder, or one of its checkpoints (later stages are then left out).
    Returns:
        tensors by their name in the system; parts that came from weight files are not in it.
    """
    last = latest_checkpoint(path)
    run_dir = last.parents[2]
    weights = load_initial(run_dir) or {}
    for folder in [*_earlier_stages(run_dir, last), last]:
        weights.update(storage.read_tensors(folder / "ema.safetensors"))
    return weights


def _earlier_stages(run_dir: Path, last: Path) -> list[Path]:
    """Newest checkpoint of each stage before that of `last`, in order."""
    index, _ = place_of(last)
    newest = [newest_checkpoint(run_dir, folder.name) for folder in _stage_folders(run_dir / FOLDER)]
    found = sorted((folder for folder in newest if folder is not None), key=place_of)
    return [folder for folder in found if place_of(folder)[0] < index]


def _candidates(folder: Path, stage: str | None) -> Iterator[Path]:
    """Checkpoints to try, best first: the one `latest` names, then newest first."""
    stages = [folder / stage] if stage else _stage_folders(folder)
    found = sorted((path for one in stages for path in step_folders(one)), key=place_of, reverse=True)
    if stage is None and (folder / LATEST).is_file():
        name = (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
        if folder / name in found:
            found.sort(key=lambda path: path != folder / name)
        else:
            LOG.warning("%s names no checkpoint of this run (%r): looking for the newest", folder / LATEST, name)
    yield from found


def _best(path: Path) -> Path:
    """The checkpoint that a stage's `best` names."""
    try:
        return path.parent / str(storage.read_json(path)["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} names no checkpoint ({reason(error)}); give one of {path.parent}/step_*") from error


def _stage_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.is_dir() and not path.name.startswith("."))


def place_of(path: Path) -> tuple[int, int]:
    """Place of a checkpoint in its run: stage, step; one whose state cannot be read comes last."""
    try:
        return int(storage.read_json(path / storage.STATE)["stage_index"]), step_of(path)
    except (OSError, ValueError, KeyError, TypeError):
        return -1, step_of(path)


def step_folders(stage_folder: Path) -> list[Path]:
    """The checkpoints of a stage, oldest first."""
    found = [path for path in stage_folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step_"))
