"""Good and bad pictures to learn both qualities from (VARSR, section 3.4, image-based guidance)."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from varestorer.data.datasets import PhotoCrops
from varestorer.data.degradation import Degrade
from varestorer.data.mixture import Mixture
from varestorer.utils.errors import UserError
from varestorer.utils.scanning import first_names, list_images

GOOD, BAD = 0, 1


# the released script takes FLIVE's patches by one column and their threshold from another; here both are the last
SCORE_SETS: dict[str, tuple[float, int | None]] = {
    "spaq": (0.4, 1),
    "koniq": (0.6, -1),
    "livec": (0.6, None),
    "kadid": (0.6, 2),
    "flive": (0.6, None),
    "flive_patch": (0.5, -1),
    "ava": (0.32, 1),
}
"""How VARSR reads the scores of a data set of image quality.

Pictures are bad whose score is below the least score plus a share of the largest. Then the column of the scores, from
0, or negative from the last; None: they come in a file of another kind, or under a name that has to be given.
"""


@dataclass(frozen=True)
class Split:
    """Pictures of a folder by their scores; those below the threshold are bad.

    `missing` are names in the scores that the folder has not, `unscored` those whose score is no number.
    """

    threshold: float
    good: list[Path]
    bad: list[Path]
    missing: list[str]
    unscored: list[str]


def split_by_scores(images: Path, scores: Path, column: int | str, share: float) -> Split:
    """Tell good pictures from bad ones by a table of scores (as VARSR chooses its negative samples).

    The table is a CSV with a header; its first column names the pictures, with or without folder and ending. The column
    of the scores is given by its name or number; for the share see `SCORE_SETS`. Subfolders of the images are looked
    through. UserError: no such column, or no score of any picture.
    """
    with scores.open(newline="", encoding="utf-8-sig") as file:
        header, *rows = [row for row in csv.reader(file) if row] or [[]]
    if isinstance(column, str) and column not in header:
        raise UserError(f"{scores} has no column {column!r}; it has {', '.join(header)}")
    number = header.index(column) if isinstance(column, str) else column
    if not -len(header) <= number < len(header):
        raise UserError(f"{scores} has {len(header)} columns, not a column {number + 1}; name the one with the scores")
    found: dict[str, float] = {}
    unscored = []
    for row in rows:
        try:
            found[row[0]] = float(row[number])
        except (ValueError, IndexError):
            unscored.append(row[0])
    found = {name: score for name, score in found.items() if math.isfinite(score)}
    if not found:
        raise UserError(f"{scores} holds no number in the column of scores; name another one with column=")
    by_name: dict[str, Path] = {}
    for path in list_images(images):
        inside = path.relative_to(images)
        for name in (path.stem, path.name, inside.with_suffix("").as_posix(), inside.as_posix()):
            by_name[name] = path
    threshold = min(found.values()) + share * max(found.values())
    known = {name: by_name[name] for name in found if name in by_name}
    return Split(
        threshold,
        sorted({path for name, path in known.items() if found[name] >= threshold}),
        sorted({path for name, path in known.items() if found[name] < threshold}),
        [name for name in found if name not in by_name],
        unscored,
    )


def link_split(split: Split, images: Path, root: Path) -> None:
    """Make `root/good` and `root/bad` of links to the pictures, subfolders kept; UserError if other files are there."""
    for name, paths in (("good", split.good), ("bad", split.bad)):
        for path in paths:
            link = root / name / path.relative_to(images)
            link.parent.mkdir(parents=True, exist_ok=True)
            target = os.path.abspath(path)
            if not link.is_symlink():
                link.symlink_to(target)
            elif os.readlink(link) != target:
                raise UserError(f"{link} leads elsewhere; give split= another folder, or remove this one")
        others = {p.relative_to(root / name) for p in (root / name).rglob("*") if not p.is_dir()}
        if others := others - {path.relative_to(images) for path in paths}:
            raise UserError(
                f"{root / name} holds {first_names(map(str, sorted(others)))} of an earlier split; give another folder"
            )


def quality_crops(
    root: str | None,
    bad: str | None,
    crop: int,
    degradation: Degrade | None,
    seed: int,
    share: float = 0.25,
    downscale: Sequence[float] | None = None,
    use_flip: bool = True,
) -> Mixture:
    """Pairs of good pictures (label 0), and of bad ones that are restored to themselves (label 1).

    Args:
        root: folder of good pictures; None: the embedded photographs.
        bad: folder of bad pictures, such as those with low scores of a quality data set; None: good ones, degraded.
        crop: side of the squares, pixels.
        degradation: makes the degraded pictures of both.
        seed: of everything that is drawn.
        share: of the bad ones.
        downscale: of the good ones, see `PhotoCrops`, as `use_flip`.
    """
    options = {"crop": crop, "degradation": degradation, "seed": seed, "use_flip": use_flip}
    good = PhotoCrops(root, downscale=downscale, label=GOOD, **options)  # type: ignore[arg-type]
    spoil = degradation if bad is None else None
    others = PhotoCrops(bad or root, label=BAD, spoil=spoil, **options)  # type: ignore[arg-type]
    return Mixture({"good": good, "bad": others}, {"good": 1 - share, "bad": share}, crop, seed)
