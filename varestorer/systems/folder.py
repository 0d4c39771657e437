"""Restoring many files: what goes where, one file after the other, and a record of what became of each.

Knows nothing of networks: a function restores one image. A file that fails is named and the rest goes on.
"""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.files import atomic_write
from varestorer.utils.images import (
    IMAGE_EXTENSIONS,
    Picture,
    heat_map,
    list_images,
    load_picture,
    natural_key,
    resize,
    save_image,
)
from varestorer.utils.seeds import derive_seed

logger = logging.getLogger(__name__)

REPORT_NAME = "restore.json"

Entry = dict[str, Any]
"""What `restore.json` says of one input: output, seconds, seed, settings, notes; or the error."""

_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
_SYSTEM_FILES = {"thumbs.db", "desktop.ini", REPORT_NAME}


@dataclass(frozen=True)
class Job:
    """One file to restore.

    Attributes:
        source: the file.
        name: its path inside the input folder, with forward slashes; keys its noise and its entry.
        target: where the result goes, inside the output folder, with forward slashes.
    """

    source: Path
    name: str
    target: str

    @property
    def heat_map(self) -> str:
        """Where its uncertainty goes, if it has any."""
        return heat_map_name(self.target)


@dataclass(frozen=True)
class Restored:
    """What became of one image.

    Attributes:
        image: (3, H, W) in [0, 1].
        uncertainty: (H, W) in [0, 1], saved as a heat map.
        details: what else its entry says.
    """

    image: Tensor
    uncertainty: Tensor | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.uncertainty is not None and self.uncertainty.shape != self.image.shape[1:]:
            wanted, got = tuple(self.image.shape[1:]), tuple(self.uncertainty.shape)
            raise ValueError(f"wanted uncertainty of the image's size {wanted}, got {got}")


RestoreImage = Callable[[Tensor, Job, int], Restored]
"""(image_3HW in [0, 1], its job, seed of this image) -> the restored image."""


@dataclass(frozen=True)
class Plan:
    """What will be restored.

    Attributes:
        output: folder of the results.
        jobs: the images, in natural order.
        rejected: name -> reason, for files of the input folder that are no images.
    """

    output: Path
    jobs: list[Job]
    rejected: dict[str, str] = field(default_factory=dict)

    def pending(self, overwrite: bool) -> list[Job]:
        """Jobs whose result is not there yet; all of them if results are to be overwritten."""
        return [job for job in self.jobs if overwrite or not (self.output / job.target).exists()]


@dataclass(frozen=True)
class FolderReport:
    """What became of the files of a plan.

    Attributes:
        path: the report, `restore.json`.
        num_restored: images restored now.
        num_skipped: images left alone because their result was there.
        failed: name -> reason.
        num_differing: skipped images whose result was made with other settings.
    """

    path: Path
    num_restored: int
    num_skipped: int
    failed: dict[str, str]
    num_differing: int = 0


def plan_restoration(source: str | os.PathLike, output: str | os.PathLike) -> Plan:
    """Decide which files are restored, and to where.

    Results are PNG files called after the stem of their input, in the same subfolders; inputs that differ in
    nothing but their extension keep it (`a.jpg` and `a.png` become `a.jpg.png` and `a.png.png`). The heat map of
    `a.png` is `a.uncertainty.png`, and no result gets that name. Hidden files, an earlier report and results that
    lie inside the input folder are no inputs; other files that are no images are rejected.

    Args:
        source: an image or a folder; `~` is the user's.
        output: a folder, which need not exist; likewise.
    Raises:
        UsageError: no such input, an empty one, an output that is a file or that would overwrite an input.
    """
    source, output = Path(source).expanduser(), Path(output).expanduser()
    if not source.exists():
        raise UsageError(f"input={source} does not exist; give an image or a folder of images")
    if output.exists() and not output.is_dir():
        raise UsageError(f"output={output} is a file; give a folder for the results")
    if source.is_dir() and source.resolve() == output.resolve():
        raise UsageError(f"output={output} is the input folder itself; give another folder for the results")
    files, rejected = _files_of(source, output) if source.is_dir() else ({source.name: source}, {})
    if not files and not rejected:
        raise UsageError(f"input={source} has no images ({' '.join(sorted(IMAGE_EXTENSIONS))})")
    targets = target_names(files)
    jobs = [Job(path, name, targets[name]) for name, path in files.items()]
    inputs = {path.resolve() for path in files.values()}
    for job in jobs:
        for target in (job.target, job.heat_map):
            if (output / target).resolve() in inputs:
                raise UsageError(f"results would overwrite the input {output / target}; give another output folder")
    return Plan(output, jobs, rejected)


def _files_of(folder: Path, output: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Images of a folder by name, and why the other files of it are none."""
    results = output.resolve()
    # an output folder around the input folder holds results beside it, not in it
    is_inside = folder.resolve() in results.parents

    def name_of(path: Path) -> str | None:
        is_result = is_inside and results in path.resolve().parents
        return None if is_result else path.relative_to(folder).as_posix()

    images = {name: path for path in list_images(folder) if (name := name_of(path))}
    others = (path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_ignored(path, folder))
    reason = "not an image (its extension is none that is read); convert it to PNG or remove it"
    rejected = {name: reason for path in others if (name := name_of(path)) and name not in images}
    return images, rejected


def _is_ignored(path: Path, folder: Path) -> bool:
    """Hidden, a file of the operating system, or a report of ours."""
    parts = path.relative_to(folder).parts
    return path.name.lower() in _SYSTEM_FILES or any(part[0] == "." or part == "__MACOSX" for part in parts)


def target_names(names: Iterable[str]) -> dict[str, str]:
    """Name of each result: `<stem>.png`, or `<name>.png` wherever two results or heat maps would get the same name.

    Names that differ in case only count as the same: many file systems cannot hold both.
    """
    names = list(names)
    keeping: set[str] = set()
    while True:
        targets = {name: f"{name if name in keeping else os.path.splitext(name)[0]}.png" for name in names}
        files = {name: {target.casefold(), heat_map_name(target).casefold()} for name, target in targets.items()}
        counts = Counter(file for pair in files.values() for file in pair)
        # a kept extension may meet another stem (a.jpg.png), so look again until nothing new collides
        clashing = {name for name, pair in files.items() if any(counts[file] > 1 for file in pair)} - keeping
        if not clashing:
            return targets
        keeping |= clashing


def heat_map_name(target: str) -> str:
    """`a.uncertainty.png` of the result `a.png`."""
    return f"{target.removesuffix('.png')}.uncertainty.png"


def restore_files(
    plan: Plan,
    restore: RestoreImage,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    max_pixels: int | None = None,
) -> FolderReport:
    """Restore the files of a plan and write `restore.json` beside the results.

    Each image's seed is derived from `seed` and its name, so its result depends neither on the other files
    nor on their order. Transparency is resized and kept, and so is a colour profile. Results appear whole or not
    at all. The report is written even if the run is interrupted, and keeps earlier entries whose results are
    still there. A result that is left in place, but was made with another seed or other settings, is named.

    Args:
        plan: from `plan_restoration`.
        restore: restores one image with a seed.
        seed: of the whole run.
        settings: what else the entries say of how images were restored, e.g. the scale.
        overwrite: restore again what has a result.
        max_pixels: larger inputs are refused; None: above Pillow's limit (about 179 million pixels).
    Raises:
        UserError: the output folder or the report cannot be written.
    """
    path = plan.output / REPORT_NAME
    earlier = _earlier_entries(path)
    entries: dict[str, Entry] = {name: {"error": reason} for name, reason in plan.rejected.items()}
    pending = plan.pending(overwrite)
    to_do = {job.name for job in pending}
    for job in plan.jobs:
        if job.name not in to_do:
            entries[job.name] = earlier.get(job.name, {}) | {"output": job.target, "skipped": True}
    others = _other_settings(entries, {"seed": seed, **(settings or {})})
    restore_one = _Runner(plan.output, restore, seed, settings or {}, max_pixels)
    try:
        with logging_redirect_tqdm():
            for name, reason in plan.rejected.items():
                logger.warning("%s: %s", name, reason)
            for target, difference in others.items():
                logger.warning("%s was made with %s; overwrite=true makes it again", target, difference)
            for job in tqdm(pending, unit=" images", bar_format=_BAR):
                entries[job.name] = restore_one(job)
    finally:
        _write_report(path, earlier | entries)
    failed = {name: entry["error"] for name, entry in entries.items() if "error" in entry}
    num_skipped = sum("skipped" in entry for entry in entries.values())
    return FolderReport(path, len(entries) - len(failed) - num_skipped, num_skipped, failed, len(others))


def _other_settings(entries: Mapping[str, Entry], settings: Mapping[str, Any]) -> dict[str, str]:
    """Results of skipped entries that say of other settings than these; what an entry does not say is not compared.

    Returns:
        output -> "scale=4, not scale=2".
    """

    def words(values: Mapping[str, Any], keys: Iterable[str]) -> str:
        return " ".join(f"{key}={'null' if values[key] is None else values[key]}" for key in keys)

    others = {}
    for entry in entries.values():
        keys = [key for key in settings if "skipped" in entry and key in entry and entry[key] != settings[key]]
        if keys:
            others[entry["output"]] = f"{words(entry, keys)}, not {words(settings, keys)}"
    return others


@dataclass(frozen=True)
class _Runner:
    """Restores one file after the other with the settings of a run."""

    output: Path
    restore: RestoreImage
    seed: int
    settings: Mapping[str, Any]
    max_pixels: int | None

    def __call__(self, job: Job) -> Entry:
        """Restore one file; what is wrong with the file, or too big about it, becomes an entry."""
        try:
            return self._restore(job)
        except UserError as error:
            reason = str(error)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            reason = f"not enough memory for {job.source}; lower batch, scale or the size of the image"
        logger.warning("%s: %s", job.name, reason)
        return {"error": reason}

    def _restore(self, job: Job) -> Entry:
        picture = load_picture(job.source, self.max_pixels)
        start = time.perf_counter()
        restored = self.restore(picture.image, job, derive_seed(self.seed, job.name))
        seconds = time.perf_counter() - start
        self._save(job, picture, restored)
        entry = {"output": job.target, "seconds": round(seconds, 4), "seed": self.seed, **self.settings}
        entry |= restored.details
        if restored.uncertainty is not None:
            entry["uncertainty"] = job.heat_map
        if picture.note:
            logger.info("%s: %s", job.name, picture.note)
            entry["note"] = picture.note
        return entry

    def _save(self, job: Job, picture: Picture, restored: Restored) -> None:
        """Write the heat map and the image; neither if one of them cannot be written."""
        size = (restored.image.shape[1], restored.image.shape[2])
        alpha = None if picture.alpha is None else resize(picture.alpha, size)
        heat = self.output / job.heat_map
        if restored.uncertainty is not None:
            save_image(heat, heat_map(restored.uncertainty))
        try:
            save_image(self.output / job.target, restored.image, alpha, picture.icc_profile)
        except BaseException:
            if restored.uncertainty is not None:
                heat.unlink(missing_ok=True)
            raise


def _is_out_of_memory(error: Exception) -> bool:
    """On the CPU torch says so in a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "allocate memory" in str(error)


def _earlier_entries(path: Path) -> dict[str, Entry]:
    """Entries of an earlier report whose results still exist."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        entries = {name: _without_skip(entry) for name, entry in entries.items() if "error" not in entry}
        return {name: entry for name, entry in entries.items() if (path.parent / entry["output"]).is_file()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is no report of ours and is replaced (%s)", path, error)
        return {}


def _without_skip(entry: Entry) -> Entry:
    return {key: value for key, value in entry.items() if key != "skipped"}


def _write_report(path: Path, entries: dict[str, Entry]) -> None:
    ordered = dict(sorted(entries.items(), key=lambda item: natural_key(item[0])))
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(ordered, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
