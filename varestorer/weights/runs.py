"""The weights of a run, read from its folder; training writes them (`training.checkpoint`).

`<run>/checkpoints/` holds `initial.safetensors` (a start that was drawn at random), a folder per stage with
`step_000100/` in it, and `latest`, a line of text naming the newest whole checkpoint as `<stage>/<step>`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from varestorer.utils.errors import UserError
from varestorer.weights import storage

LOG = logging.getLogger(__name__)
FOLDER = "checkpoints"
INITIAL = "initial.safetensors"
LATEST = "latest"
CONFIG = "config.yaml"


def is_run(path: str | Path) -> bool:
    """Whether a path is a run's folder, or a checkpoint in one."""
    path = Path(path)
    return (path / FOLDER).is_dir() or (path / "state.json").is_file()


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
        run_dir: a run's folder, its `checkpoints/latest`, or a checkpoint's own folder.
        stage: look at this stage only.
    Raises:
        UserError: there is none.
    """
    path = Path(run_dir)
    if path.name == LATEST and path.parent.name == FOLDER:
        path = path.parents[1]
    if (path / "state.json").is_file():
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
    index, _ = _place(last)
    newest = [newest_checkpoint(run_dir, folder.name) for folder in _stage_folders(run_dir / FOLDER)]
    found = sorted((folder for folder in newest if folder is not None), key=_place)
    return [folder for folder in found if _place(folder)[0] < index]


def _candidates(folder: Path, stage: str | None) -> Iterator[Path]:
    """Checkpoints to try, best first: the one `latest` names, then newest first."""
    named = None
    if stage is None and (folder / LATEST).is_file():
        named = folder / (folder / LATEST).read_text(encoding="utf-8").strip()
        yield named
    stages = [folder / stage] if stage else _stage_folders(folder)
    found = [path for one in stages for path in one.glob("step_*")]
    for path in sorted(found, key=_place, reverse=True):
        if path != named:
            yield path


def _stage_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.is_dir() and not path.name.startswith("."))


def _place(path: Path) -> tuple[int, int]:
    """Place of a checkpoint in its run: stage, step; one whose state cannot be read comes last."""
    try:
        return int(storage.read_json(path / "state.json")["stage_index"]), step_of(path)
    except (OSError, ValueError, KeyError):
        return -1, step_of(path)


def step_of(path: Path) -> int:
    """The step a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step_"))
