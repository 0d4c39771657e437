"""Which files are restored, and to where: names that never collide, inputs that are never overwritten."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from varestorer.utils.errors import UsageError
from varestorer.utils.images import IMAGE_EXTENSIONS, list_images

REPORT_NAME = "restore.json"
HEAT_MAP = "uncertainty"
_SYSTEM_FILES = {"thumbs.db", "desktop.ini", REPORT_NAME}


@dataclass(frozen=True)
class Job:
    """One file to restore.

    Attributes:
        source: the file.
        name: its path inside the input folder, with forward slashes; keys its noise and its entry.
        target: where the result goes, inside the output folder, with forward slashes.
        labels: of what is written beside it in any case, such as "x1" for a smaller size.
    """

    source: Path
    name: str
    target: str
    labels: tuple[str, ...] = ()

    @property
    def heat_map(self) -> str:
        """Where its uncertainty goes, if it has any."""
        return beside(self.target, HEAT_MAP)

    @property
    def targets(self) -> list[str]:
        """The result and what is written beside it in any case."""
        return [self.target, *(beside(self.target, label) for label in self.labels)]


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
        return [job for job in self.jobs if overwrite or not all((self.output / t).exists() for t in job.targets)]


def plan_restoration(source: str | os.PathLike, output: str | os.PathLike, labels: tuple[str, ...] = ()) -> Plan:
    """Decide which files are restored, and to where.

    Results are PNG files called after the stem of their input, in the same subfolders; inputs that differ in
    nothing but their extension keep it (`a.jpg` and `a.png` become `a.jpg.png` and `a.png.png`). The heat map of
    `a.png` is `a.uncertainty.png`, what else is asked for `a.<label>.png`, and no result gets such a name.
    Hidden files, an earlier report and results that lie inside the input folder are no inputs; other files that are no
    images are rejected.

    Args:
        source: an image or a folder; `~` is the user's.
        output: a folder, which need not exist; likewise.
        labels: of what is written beside each result.
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
    targets = target_names(files, labels)
    jobs = [Job(path, name, targets[name], labels) for name, path in files.items()]
    inputs = {path.resolve() for path in files.values()}
    for job in jobs:
        for target in (*job.targets, job.heat_map):
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


def target_names(names: Iterable[str], labels: Iterable[str] = ()) -> dict[str, str]:
    """Name of each result: `<stem>.png`, or `<name>.png` wherever two files would get the same name.

    Files are the results, their heat maps, and those of `labels` beside them.

    Names that differ in case only count as the same: many file systems cannot hold both.
    """
    names, labels = list(names), (HEAT_MAP, *labels)
    keeping: set[str] = set()
    while True:
        targets = {name: f"{name if name in keeping else os.path.splitext(name)[0]}.png" for name in names}
        files = {
            name: {file.casefold() for file in (target, *(beside(target, label) for label in labels))}
            for name, target in targets.items()
        }
        counts = Counter(file for pair in files.values() for file in pair)
        # a kept extension may meet another stem (a.jpg.png), so look again until nothing new collides
        clashing = {name for name, pair in files.items() if any(counts[file] > 1 for file in pair)} - keeping
        if not clashing:
            return targets
        keeping |= clashing


def beside(target: str, label: str) -> str:
    """`a.<label>.png` of the result `a.png`."""
    return f"{target.removesuffix('.png')}.{label}.png"
