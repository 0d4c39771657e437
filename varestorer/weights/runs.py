"""The folder of a run on the disk: its checkpoints, and the weights in them (`training.checkpoint` decides on them).

`<run>/checkpoints/` holds `initial.safetensors` (a start that was drawn at random), a folder per stage with
`step_000100/` in it, and `latest`, a line of text naming the newest whole checkpoint as `<stage>/<step>`. Where
`trainer.keep_best` is set, a stage's folder also has `best`, a JSON object that names its best checkpoint.

A checkpoint is written aside, synced and renamed, and checked by size and SHA-256 when it is read: `*.safetensors` for
tensors, `state.json` for everything else, `checksums.json` with `{file: {"size", "sha256"}}` of the others.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from varestorer.utils.errors import UserError, reason
from varestorer.utils.files import atomic_folder, file_sha256, sync, utf8_path, write_json
from varestorer.utils.finite import check_weights

LOG = logging.getLogger(__name__)
FOLDER = "checkpoints"
INITIAL = "initial.safetensors"
LATEST = "latest"
BEST = "best"
CONFIG = "config.yaml"
CHECKSUMS = "checksums.json"
STATE = "state.json"
GO_ON = "checkpoints are untouched: check the folder and its free space, then go on with resume=auto"


def is_run(path: str | Path) -> bool:
    """Whether a path is a run's folder, a checkpoint in one, or its `latest` or `best`."""
    path = Path(path)
    if path.is_file():
        return path.name in (LATEST, BEST) and FOLDER in (path.parent.name, path.parents[1].name)
    return (path / FOLDER).is_dir() or (path / STATE).is_file()


def load_initial(run_dir: Path) -> dict[str, Tensor] | None:
    """What `save_initial` kept; None if the run started from files alone."""
    path = run_dir / FOLDER / INITIAL
    return read_tensors(path) if path.is_file() else None


def newest_checkpoint(run_dir: Path, stage: str | None = None) -> Path | None:
    """Newest whole checkpoint of a run, or of one of its stages; None if there is none.

    Damaged ones are named in a warning and the one before is taken.
    """
    for folder in _candidates(run_dir / FOLDER, stage):
        problem = damage(folder)
        if problem is None:
            return folder
        LOG.warning("damaged checkpoint %s (%s): taking the one before", folder, problem)
    return None


def latest_checkpoint(run_dir: str | Path) -> Path:
    """Folder of the newest whole checkpoint; UserError if there is none.

    Given is a run's folder, its `checkpoints/latest`, a stage's `best`, or a checkpoint's own folder.
    """
    path = Path(run_dir)
    if path.name == LATEST and path.parent.name == FOLDER:
        path = path.parents[1]
    if path.name == BEST and path.is_file():
        try:
            path = path.parent / str(read_json(path)["checkpoint"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            steps = f"{path.parent}/step_*"
            raise UserError(f"{path} names no checkpoint ({reason(error)}); give one of {steps}") from error
    if (path / STATE).is_file():
        problem = damage(path)
        if problem is not None:
            raise UserError(f"damaged checkpoint {path}: {problem}; give another one, or the run's folder")
        return path
    found = newest_checkpoint(path)
    if found is None:
        raise UserError(f"no checkpoint in {path}; give a run's folder (with {FOLDER}/ in it)")
    return found


def load_ema(path: str | Path) -> dict[str, Tensor]:
    """Averaged weights (float32, CPU) of what one stage trained: of a checkpoint, or a run's latest."""
    return read_tensors(latest_checkpoint(path) / "ema.safetensors")


def load_run_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights a run made, up to a checkpoint if one is given: the random start, then each stage's average in turn.

    They are by their name in the system; parts that came from weight files are not in it.
    """
    last = latest_checkpoint(path)
    run_dir = last.parents[2]
    weights = load_initial(run_dir) or {}
    index, _ = place_of(last)
    newest = (newest_checkpoint(run_dir, folder.name) for folder in _stage_folders(run_dir / FOLDER))
    earlier = [folder for folder in newest if folder is not None and place_of(folder)[0] < index]
    for folder in [*sorted(earlier, key=place_of), last]:
        weights.update(read_tensors(folder / "ema.safetensors"))
    return weights


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


def _stage_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.is_dir() and not path.name.startswith("."))


def place_of(path: Path) -> tuple[int, int]:
    """Place of a checkpoint in its run: stage, step; one whose state cannot be read comes last."""
    try:
        return int(read_json(path / STATE)["stage_index"]), step_of(path)
    except (OSError, ValueError, KeyError, TypeError):
        return -1, step_of(path)


def step_folders(stage_folder: Path) -> list[Path]:
    """The checkpoints of a stage, oldest first."""
    found = [path for path in stage_folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step_"))


@contextmanager
def sealed_folder(target: Path) -> Iterator[Path]:
    """As `atomic_folder`, over an older one; it gets checksums, and all is on the disk when the block ends."""
    with atomic_folder(target, overwrite=True, remedy=GO_ON) as temporary:
        yield temporary
        files = sorted(path for path in temporary.iterdir() if path.is_file())
        sums = {path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in files}
        write_json(temporary / CHECKSUMS, sums)
        for path in (*files, temporary / CHECKSUMS, temporary):
            sync(path)
    sync(target.parent)


def remove_leftovers(*folders: Path) -> None:
    """Remove what a process that was killed while writing left in these folders, half a file or checkpoint."""
    for folder in folders:
        for leftover in folder.glob(".*.tmp*"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors from any device to a safetensors file; tensors that share memory are written apart."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        apart[name] = plain.clone() if storage in seen else plain
        seen.add(storage)
    save_file(apart, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU; UserError if it cannot be read, or holds NaN or infinity."""
    try:
        with utf8_path(path) as plain:
            tensors = load_file(plain)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}; bring back a good copy of it") from error
    check_weights(tensors, str(path))
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words; None if it is whole."""
    try:
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in read_json(folder / CHECKSUMS).items()}
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS}: {reason(error)}"
    except (AttributeError, KeyError, TypeError):
        return f"{CHECKSUMS} does not list files"
    if STATE not in expected:
        return f"{CHECKSUMS} does not list {STATE}"
    for path, (size, sha256) in ((folder / name, entry) for name, entry in expected.items()):
        try:
            if path.stat().st_size != size:
                return f"{path.name} has {path.stat().st_size} bytes, should have {size}"
            if file_sha256(path) != sha256:
                return f"{path.name} does not match its checksum"
        except OSError as error:
            return f"{path.name} cannot be read: {error.strerror or reason(error)}"
        except UserError as error:
            return str(error)
    return None


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
