"""Restoring many files: one after the other, and a record of what became of each.

Knows nothing of networks: a function restores one image. While it does, the next file is read and the one before is
written in other threads. A file that fails is named and the rest goes on.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from varestorer.systems.plan import REPORT_NAME, Job, Plan, beside
from varestorer.utils.device import is_out_of_memory, usable_cores
from varestorer.utils.errors import UserError, reason
from varestorer.utils.files import file_sha256, read_text, write_json
from varestorer.utils.image_files import open_image
from varestorer.utils.images import (
    Picture,
    Writing,
    heat_map,
    holds_alpha,
    is_gray,
    load_picture,
    made_from,
    resize,
    save_image,
)
from varestorer.utils.locks import locked
from varestorer.utils.prefetch import prefetch
from varestorer.utils.scanning import natural_key
from varestorer.utils.seeds import derive_seed

logger = logging.getLogger(__name__)

Entry = dict[str, Any]
"""What `restore.json` says of one input: output, seconds, seed, settings, notes; or the error."""

LOCK_SECONDS = 60.0  # that another run may take to write the report

WRITERS = max(1, min(3, usable_cores() // 4))  # each holds one result that is not written yet

_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"


@dataclass(frozen=True)
class Restored:
    """What became of one image: (3, H, W) in [0, 1], and what else its entry says.

    The uncertainty, (H, W) in [0, 1], is saved as a heat map; `smaller` are other sizes by the label of their file.
    """

    image: Tensor
    uncertainty: Tensor | None = None
    details: dict[str, Any] = field(default_factory=dict)
    smaller: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.uncertainty is not None and self.uncertainty.shape != self.image.shape[1:]:
            wanted, got = tuple(self.image.shape[1:]), tuple(self.uncertainty.shape)
            raise ValueError(f"wanted uncertainty of the image's size {wanted}, got {got}")


RestoreImage = Callable[[Tensor, Job, int], Restored]
"""(image_3HW in [0, 1], its job, seed of this image) -> the restored image."""


@dataclass(frozen=True)
class FolderReport:
    """What became of the files of a plan.

    Attributes:
        path: the report, `restore.json`; the result itself where one file was asked for.
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


def restore_files(
    plan: Plan,
    restore: RestoreImage,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    max_pixels: int | None = None,
    writing: Writing | None = None,
    check: Callable[[int, int], object] | None = None,
) -> FolderReport:
    """Restore the files of a plan and write `restore.json` beside the results.

    Each image's seed is derived from `seed` and its name, so its result depends neither on the other files nor on their
    order. Transparency is resized and kept where the format holds it, and so are a color profile, EXIF and resolution;
    gray is written as one channel, more than 8 bits as 16. Results appear whole or not at all. If the run is
    interrupted, what was restored by then is written, and so is the report; it keeps earlier entries whose results are
    still there, and those of runs that write to the same folder at the same time. A result that was made from another
    file than the one that is there now is made again. One that is left in place, but was made with another seed or
    other settings or does not say from what, is named.

    Args:
        settings: what else the entries say of how images were restored, e.g. the scale.
        overwrite: restore again what has a result.
        max_pixels: larger inputs are refused; None: above Pillow's limit (about 179 million pixels).
        check: raises a UserError for a picture (height, width) that memory is too little for; it is asked before a
            file is decoded, and one file is then read, restored and written before the next is begun.
        writing: how results are written; their EXIF, resolution and bits are those of their inputs.
    Raises:
        UserError: the output folder or the report cannot be written.
    """
    path = plan.output / (REPORT_NAME if plan.has_report else plan.jobs[0].target)
    before = _read_report(path) if plan.has_report else {}
    earlier = _of_results(path, before)
    entries: dict[str, Entry] = {name: {"error": why} for name, why in plan.rejected.items()}
    pending = plan.pending(overwrite)
    to_do = {job.name for job in pending}
    for job in plan.jobs:
        if job.name not in to_do:
            entries[job.name] = earlier.get(job.name, {}) | {"output": job.target, "skipped": True}
            if made_from(plan.output / job.target) is None:
                logger.warning("%s does not say what it was made from; overwrite=true makes it again", job.target)
        elif not overwrite and (plan.output / job.target).exists():
            logger.info("%s was made from another file than %s, and is made again", job.target, job.source)
    others = _other_settings(entries, {"seed": seed, **(settings or {})})
    runner = _Runner(plan.output, restore, seed, settings or {}, max_pixels, entries, writing or Writing(), check)
    try:
        with logging_redirect_tqdm():
            for name, why in plan.rejected.items():
                logger.warning("%s: %s", name, why)
            for target, difference in others.items():
                logger.warning("%s was made with %s; overwrite=true makes it again", target, difference)
            done = runner.run(pending)
            for _ in tqdm(done, total=len(pending), unit=" images", bar_format=_BAR, disable=len(pending) < 2):
                continue
    finally:
        if plan.has_report:
            _add_to_report(path, before, entries)
    names = [*plan.rejected, *(job.name for job in plan.jobs)]  # threads may end in another order
    failed = {name: entries[name]["error"] for name in names if "error" in entries[name]}
    num_skipped = sum("skipped" in entry for entry in entries.values())
    return FolderReport(path, len(entries) - len(failed) - num_skipped, num_skipped, failed, len(others))


def _other_settings(entries: Mapping[str, Entry], settings: Mapping[str, Any]) -> dict[str, str]:
    """Results (output -> "scale=4, not scale=2") of skipped entries that say of other settings than these.

    What an entry does not say is not compared.
    """
    others = {}
    for entry in (entry for entry in entries.values() if "skipped" in entry):
        keys = [key for key in settings if key in entry and entry[key] != settings[key]]
        if keys:
            made, now = (
                " ".join(f"{key}={'null' if values[key] is None else values[key]}" for key in keys)
                for values in (entry, settings)
            )
            others[entry["output"]] = f"{made}, not {now}"
    return others


@dataclass
class _Work:
    """A file on its way through the stages, and why it fell out of it."""

    job: Job
    source: str = ""
    picture: Picture | None = None
    restored: Restored | None = None
    seconds: float = 0.0
    failure: str | None = None

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Note what is wrong with the file, or too big about it; other errors go on."""
        try:
            yield
        except UserError as error:
            self.failure = str(error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.failure = f"not enough memory for {self.job.source}; lower batch, scale or the size of the image"


@dataclass(frozen=True)
class _Runner:
    """The stages of a file (read, restored, written) in a run; `entries` are of the files that went through."""

    output: Path
    restore: RestoreImage
    seed: int
    settings: Mapping[str, Any]
    max_pixels: int | None
    entries: dict[str, Entry]
    writing: Writing
    check: Callable[[int, int], object] | None = None

    def run(self, jobs: Iterable[Job]) -> Iterator[None]:
        """Yield as files are done. Restoring is this thread's; reading is one file ahead, writing some behind."""
        if self.check is not None:
            return map(self._write, map(self._restore, map(self._read, jobs)))
        read = prefetch(self._read, jobs)
        return prefetch(self._write, map(self._restore, read), depth=WRITERS, threads=WRITERS, finish=True)

    def _read(self, job: Job) -> _Work:
        work = _Work(job)
        with work.failing():
            if self.check is not None:
                with open_image(job.source, self.max_pixels) as file:
                    self.check(file.height, file.width)
            work.source = file_sha256(job.source)  # before it is read: if it changes now, its result is made again
            work.picture = load_picture(job.source, self.max_pixels)
        return work

    def _restore(self, work: _Work) -> _Work:
        if work.picture is not None:
            start = time.perf_counter()
            with work.failing():
                work.restored = self.restore(work.picture.image, work.job, derive_seed(self.seed, work.job.name))
            work.seconds = time.perf_counter() - start
        return work

    def _write(self, work: _Work) -> None:
        if work.picture is not None and work.restored is not None:
            with work.failing():
                self._save(work.job, work.source, work.picture, work.restored)
                entry = {"output": work.job.target, "seconds": round(work.seconds, 4), "seed": self.seed}
                entry |= {**self.settings, **work.restored.details}
                if work.restored.uncertainty is not None:
                    entry["uncertainty"] = work.job.heat_map
                if work.restored.smaller:
                    entry["smaller"] = {label: beside(work.job.target, label) for label in work.restored.smaller}
                if work.picture.note:
                    logger.info("%s: %s", work.job.name, work.picture.note)
                    entry["note"] = work.picture.note
                self.entries[work.job.name] = entry
        if work.failure is not None:
            logger.warning("%s: %s", work.job.name, work.failure)
            self.entries[work.job.name] = {"error": work.failure}

    def _save(self, job: Job, source: str, picture: Picture, restored: Restored) -> None:
        """Write the heat map, the smaller sizes and the image, which comes last; none if one cannot be written."""
        written: list[Path] = []
        try:
            if restored.uncertainty is not None:
                written.append(self.output / job.heat_map)
                save_image(written[-1], heat_map(restored.uncertainty))
            writing = replace(self.writing, bits=picture.bits, exif=picture.exif, dpi=picture.dpi)
            images = [(beside(job.target, label), image) for label, image in restored.smaller.items()]
            for target, image in [*images, (job.target, restored.image)]:
                alpha = picture.alpha if holds_alpha(target) else None
                alpha = None if alpha is None else resize(alpha, (image.shape[1], image.shape[2]))
                kept = image[:1] if picture.is_gray and is_gray(image) else image
                written.append(self.output / target)
                save_image(written[-1], kept, alpha, picture.icc_profile, source, writing)
        except BaseException:
            for path in written[:-1]:
                path.unlink(missing_ok=True)
            raise


def _read_report(path: Path) -> dict[str, Entry]:
    """The entries of a report; none if there is none, or nothing of use."""
    try:
        entries = json.loads(read_text(path))
        ours = {name: entry for name, entry in entries.items() if "error" in entry or Path(entry["output"])}
        return {name: {key: entry[key] for key in entry if key != "skipped"} for name, entry in ours.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is no report of ours and is replaced (%s)", path, reason(error))
        return {}


def _of_results(path: Path, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries whose results exist."""
    results = {name: path.parent / entry["output"] for name, entry in entries.items() if "error" not in entry}
    return {name: entries[name] for name, result in results.items() if result.is_file()}


def _add_to_report(path: Path, before: Mapping[str, Entry], entries: Mapping[str, Entry]) -> None:
    """Write the entries of this run among those that are there now: another run may have added some since.

    Errors in `before`, what the report said when this run began, are gone.
    """
    with locked(path.parent, wait=LOCK_SECONDS):
        now = _read_report(path)
        new_errors = {name: entry for name, entry in now.items() if "error" in entry and entry != before.get(name)}
        kept = _of_results(path, now)
        # what is skipped here another run may have made meanwhile, and its entry says more
        ours = {name: (kept.get(name, {}) if "skipped" in entry else {}) | entry for name, entry in entries.items()}
        ordered = sorted((new_errors | kept | ours).items(), key=lambda item: natural_key(item[0]))
        write_json(path, dict(ordered), indent=2)
