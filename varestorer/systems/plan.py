"""Which files are restored, and to where: names that never collide, inputs that are never overwritten."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.files import expand_user, file_sha256, fitting_name
from varestorer.utils.image_files import HEIC, HEIC_HINT
from varestorer.utils.images import IMAGE_EXTENSIONS, WRITTEN_EXTENSIONS, made_from
from varestorer.utils.scanning import REPORT_NAME, report_unused, scan_folder, split_images

__all__ = ["REPORT_NAME", "Job", "Plan", "plan_restoration"]
HEAT_MAP = "uncertainty"
# what cameras, telephones and editors put beside photographs
SIDE_FILES = frozenset(
    ".xmp .aae .thm .pp3 .dop .on1 .lrv .txt .json .ini .db .md .pdf .mp4 .mov .m4v .avi .3gp".split()
)


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
        return beside(os.path.splitext(self.target)[0] + ".png", HEAT_MAP)

    @property
    def targets(self) -> list[str]:
        """The result and what is written beside it in any case."""
        return [self.target, *(beside(self.target, label) for label in self.labels)]


@dataclass(frozen=True)
class Plan:
    """What will be restored.

    Attributes:
        output: folder of the results.
        has_report: whether they are recorded there; not where one file was asked for.
        jobs: the images, in natural order.
        rejected: name -> reason, for files of the input folder that are no images, and folders that cannot be read.
    """

    output: Path
    jobs: list[Job]
    rejected: dict[str, str] = field(default_factory=dict)
    has_report: bool = True

    def pending(self, overwrite: bool) -> list[Job]:
        """Jobs whose result is not there yet, or was made from another file; all of them with `overwrite`.

        A picture that does not say what it was made from may be anybody's, and is left alone.
        """

        def is_to_do(job: Job) -> bool:
            if overwrite or not all((self.output / target).exists() for target in job.targets):
                return True
            source = made_from(self.output / job.target)
            try:
                return source is not None and source != file_sha256(job.source)
            except UserError:
                return True  # reading it says what is wrong

        return [*filter(is_to_do, self.jobs)]


def plan_restoration(
    source: str | os.PathLike, output: str | os.PathLike, labels: tuple[str, ...] = (), ending: str | None = None
) -> Plan:
    """Decide which files are restored, and to where.

    Results are called after the stem of their input, in the same subfolders; of one image the result may be named
    itself. Inputs that differ in nothing but their extension keep it (`a.jpg` and `a.png` become `a.jpg.png` and
    `a.png.png`). The heat map of `a.png` is `a.uncertainty.png`, what else is asked for `a.<label>.png`, and no result
    gets such a name. What `scanning.is_skipped`, and results that lie inside the input folder, are no inputs; other
    files that are no images are rejected, and so are folders that cannot be read.

    Args:
        source: an image or a folder; `~` is the user's.
        output: a folder, which need not exist, or a file with the ending of a format that is written; likewise.
        labels: of what is written beside each result.
        ending: of the results, such as ".jpg"; None for the output's, and ".png" in a folder.
    Raises:
        UsageError: no such input, an empty one, a file as output of a folder, an output that would overwrite an input.
    """
    source, output = expand_user(source), expand_user(output)
    if not source.exists():
        raise UsageError(f"input={source} does not exist; give an image or a folder of images")
    is_file = _is_file(source, output, ending)
    files, rejected = _files_of(source, output) if source.is_dir() else ({source.name: source}, {})
    if not files and not rejected:
        raise UsageError(f"input={source} has no images ({' '.join(sorted(IMAGE_EXTENSIONS))})")
    if is_file:
        targets, output = {source.name: output.name}, output.parent
    else:
        targets = target_names(files, labels, ending or ".png")
    jobs = [Job(path, name, targets[name], labels) for name, path in files.items()]
    inputs = {path.resolve() for path in files.values()}
    for job in jobs:
        for target in (*job.targets, job.heat_map):
            if (output / target).resolve() in inputs:
                raise UsageError(f"results would overwrite the input {output / target}; give another output folder")
    return Plan(output, jobs, rejected, not is_file)


def _is_file(source: Path, output: Path, ending: str | None) -> bool:
    """Whether the output names the one result itself; UsageError for an output that cannot be."""
    names_file = output.suffix.lower() in WRITTEN_EXTENSIONS and not output.is_dir()
    if output.exists() and not output.is_dir() and not names_file:
        raise UsageError(f"output={output} is a file; give a folder for the results")
    if names_file and source.is_dir():
        raise UsageError(f"output={output} is a file, and input={source} a folder; give a folder for the results")
    if names_file and ending not in (None, output.suffix.lower().replace("jpeg", "jpg").replace("tiff", "tif")):
        raise UsageError(f"output={output} and format={ending[1:]} contradict each other; leave format out")
    if source.is_dir() and source.resolve() == output.resolve():
        raise UsageError(f"output={output} is the input folder itself; give another folder for the results")
    return names_file


def _files_of(folder: Path, output: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Images of a folder by name, and why the other files of it are none."""
    results = output.resolve()
    # an output folder around the input folder holds results beside it, not in it
    is_inside = folder.resolve() in results.parents
    scan = scan_folder(folder)
    names = {path: path.relative_to(folder).as_posix() for path in [*scan.files, *scan.unused, *scan.unreadable]}
    found, others = (
        [path for path in paths if not (is_inside and results in path.resolve().parents)]
        for paths in split_images(scan)
    )
    others = [path for path in others if path not in scan.unused]
    is_side = {path: path.suffix.lower() in SIDE_FILES for path in others}
    report_unused(folder, "side files are left alone", [names[path] for path in others if is_side[path]])
    why = "not an image (its extension is none that is read); convert it to PNG or remove it"
    rejected = {names[path]: HEIC_HINT if path.suffix.lower() in HEIC else why for path in others if not is_side[path]}
    for path, problem in scan.unreadable.items():
        rejected[names[path]] = f"this folder cannot be read ({problem}); make it readable"
    unused = [names[path] for path in scan.unused]
    report_unused(folder, "entries are not used, as no files or as folders with another name", unused)
    return {names[path]: path for path in found}, rejected


def target_names(names: Iterable[str], labels: Iterable[str] = (), ending: str = ".png") -> dict[str, str]:
    """Name of each result: `<stem>.png`, or `<name>.png` wherever two files would get the same name.

    Files are the results, their heat maps, and those of `labels` beside them. Names that differ in case only count as
    the same: many file systems cannot hold both.
    """
    names, labels = list(names), (HEAT_MAP, *labels)
    keeping: set[str] = set()
    while True:
        targets = {name: fitting_name(name if name in keeping else os.path.splitext(name)[0], ending) for name in names}
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
    """`a.<label>.png` of the result `a.png`; likewise with another ending."""
    stem, ending = os.path.splitext(target)
    return fitting_name(stem, f".{label}{ending}")
