"""What is where in a folder of training or test pictures, and which bad one belongs to which good one.

Public sets write side and scale into the names: `0801x4` and `0801`, `Canon_001_LR4` and `Canon_001_HR`,
`baby_LRBI_x4` and `baby_HR_x4`. An ending is cut only where the rest is the name of just one partner, so that `box1`
stays `box1`; where two images could be meant, neither is taken.
"""

import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from varestorer.utils.errors import UserError
from varestorer.utils.files import expand_user
from varestorer.utils.images import IMAGE_EXTENSIONS
from varestorer.utils.scanning import list_images, natural_key

log = logging.getLogger(__name__)

HQ_HELP = "a folder of images, or one that holds them in hr, hq, gt, test_HR or NAME_train_HR"
PAIRS_HELP = "hr, hq, gt or test_HR with the good images beside lr, lq or test_LR with the bad ones"
IMAGES_HELP = f"a folder of images, or {PAIRS_HELP}"

_HIGH, _LOW = "hr|hq|gt|targets?|ground_?truth", "lr|lq|inputs?"
_KIND = "bicubic|bic|bi|bd|dn|unknown|mild|wild|difficult|mod[0-9]+|x[0-9]+|train|valid|val|test"
_SIDE = re.compile(rf"(?i)(?:.*[ ._-])?(?:(?P<high>{_HIGH})|(?P<low>{_LOW}))(?:[ ._-]?(?:{_KIND}))*")
_SCALE_FOLDER = re.compile(r"(?i)x[0-9]+")
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "valid"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# endings of names: DIV2K calls its mild, wild and difficult ones 0801x4m, 0801x4w1, 0801x4d
_SCALE = r"x(?:[2-9]|1[0-6])(?:[mwdb]\d?)?"
_LOW_ENDINGS = (
    rf"(?:[ _-]|(?<=\d)){_SCALE}",
    r"[ _-](?:bic(?:ubic)?[ _-]?)?(?:lr|lq)(?:bi|bd|dn)?(?:[ _-]?x?\d{1,2})?",
    r"[ _-]bic(?:ubic)?(?:[ _-]?x?\d{1,2})?",
)
_HIGH_ENDINGS = (r"[ _-](?:hr|hq|gt)(?:mod\d{1,2})?(?:[ _-]?x?\d{1,2})?", r"[ _-]x\d{1,2}")

Split = Literal["train", "test"]
Listed = tuple[str, Path, Path | None]
"""(name, bad image, good image if there is one)."""
Images = Mapping[str, Path]
"""Images of a side by name: path inside its folder, without extension."""
Forms = Callable[[str], set[str]]


@dataclass(frozen=True)
class Listing:
    """The images of a test set, matched by name but not opened.

    Attributes:
        low_folder: holds the bad images.
        high_folder: holds the good ones; None: there are none.
        images: in natural order of the names.
        unpaired: images without a partner, likewise.
        duplicates: (image, the one whose name it has too); such an image is left out.
        ambiguous: images that could belong together in several ways; they are left out.
    """

    low_folder: Path
    high_folder: Path | None
    images: list[Listed]
    unpaired: list[Path]
    duplicates: list[tuple[Path, Path]]
    ambiguous: list[tuple[Path, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class _Side:
    """A folder that its name calls the good or the bad side, and of what: `train`, `valid`, `test` or None."""

    folder: Path
    split: str | None


def hq_images(root: str | os.PathLike, split: Split = "train") -> list[Path]:
    """List the good images of a data set, however it is laid out; of several sides those of `split`.

    `root` is a folder of images (subfolders included), or holds one of `hr`, `hq`, `gt`, `test_HR`, `DIV2K_train_HR`
    and the like, whose images alone are then taken. A folder called `hr` alone, without bad images beside it but with
    others, is one of them: it may as well hold Croatia. UserError: no such folder, or no image in it; says what belongs
    there.
    """
    images = [path for side in hq_folders(root, split) for path in list_images(side)]
    if not images:
        raise UserError(f"data.root={expand_user(root)} holds no image; put there {HQ_HELP}")
    return images


def hq_folders(root: str | os.PathLike, split: Split = "train") -> list[Path]:
    """The folders whose images `hq_images` lists; logs what is taken and what is not. UserError if `root` is none."""
    folder = existing_folder(root, HQ_HELP)
    sides = _good_folders(folder, split)
    if sides != [folder]:
        _log_taken(folder, sides)
    elif named := _sides(folder)[1]:
        _log_all_taken(folder, named)
    return sides


def hq_folder(root: str | os.PathLike, split: Split = "train") -> Path:
    """The folder that holds all images of `hq_images`; UserError if `root` is none."""
    folder = existing_folder(root, HQ_HELP)
    sides = _good_folders(folder, split)
    return sides[0] if len(sides) == 1 else folder


def find_pairs(root: str | os.PathLike, split: Split = "test") -> list[tuple[str, Path, Path]]:
    """Match the bad and good images of a paired data set by name, without opening them: (name, bad image, good image).

    They are in natural order of the names. A pair has the same path inside its folder, extension aside, or one that is
    the same without the endings that tell the side (`a_LR4.png`, `a_HR.png`, `ax4.png`), see `match_names`. `root` has
    `hr`, `hq`, `gt` or `test_HR` beside `lr`, `lq` or `test_LR`; of several sides those of `split` are taken. Folders
    missing or in doubt, or images without a partner or with several, are a UserError that lists them.
    """
    images = _without_fault(list_test_set(root, need_pairs=True, split=split))
    return [(name, low, high) for name, low, high in images if high]


def find_images_or_pairs(root: str | os.PathLike) -> list[Listed]:
    """List a data set that may do without good images, without opening any, as `find_pairs` does.

    `root` may be a folder of images alone (subfolders included), which may hold them in `lr`, `lq` or `test_LR`; good
    images are None then. UserError: no image, images without a partner, two of the same name, or good images alone.
    """
    return _without_fault(list_test_set(root, need_pairs=False))


def list_test_set(root: str | os.PathLike, need_pairs: bool, split: Split = "test") -> Listing:
    """List a test set as `find_pairs` or `find_images_or_pairs` do, with all that is wrong with its names.

    UserError: a side is missing, or which folder is one is in doubt.
    """
    wanted = PAIRS_HELP if need_pairs else IMAGES_HELP
    folder = existing_folder(root, wanted)
    lows, highs = _sides(folder)
    if lows and highs:
        low, high = (_inside(folder, side) for side in _matching_sides(folder, lows, highs, split))
        _log_taken(folder, [low, high])
        (lower, low_twice), (higher, high_twice) = _by_name(low), _by_name(high)
        matching = match_names(lower, higher)
        images: list[Listed] = list(matching.pairs)
        return Listing(low, high, images, matching.unpaired, low_twice + high_twice, matching.ambiguous)
    if not need_pairs and (lows or highs) and not _are_certain(folder, lows or highs):
        _log_all_taken(folder, lows or highs)
        lows, highs = [], []
    if need_pairs or highs:
        there = ", ".join(sorted(child.name for child in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"{folder} holds no {'pairs' if need_pairs else 'bad images'}: wanted {wanted}, found {there}")
    low = folder
    if lows:
        low = _inside(folder, _only(folder, _of_split(lows, lows, split), lows))
        _log_taken(folder, [low])
    by_name, duplicates = _by_name(low)
    return Listing(low, None, [(name, path, None) for name, path in by_name.items()], [], duplicates)


def existing_folder(root: str | os.PathLike | None, wanted: str) -> Path:
    """`root` as a path; UserError naming `data.root` and what is wanted there if it is no readable folder."""
    folder = expand_user(root or "")
    if not root or not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"data.root={str(root or '')!r} is no folder that can be read; give {wanted}")
    return folder


def _sides(root: Path) -> tuple[list[_Side], list[_Side]]:
    """The bad and the good sides in a folder, or in its `train`, `test` and the like; or these inside the sides."""
    lows: list[_Side] = []
    highs: list[_Side] = []
    seen: set[str] = set()  # a link called gt beside the hr that it leads to is no other side
    for child in _subfolders(root):
        candidates = [child] if _SIDE.fullmatch(child.name) or not _split_of(child) else _subfolders(child)
        for candidate in candidates:
            found, real = _SIDE.fullmatch(candidate.name), os.path.realpath(candidate)
            if found and real not in seen:
                seen.add(real)
                split = _split_of(candidate) or (_split_of(child) if candidate is not child else None)
                parts = _subfolders(candidate)
                if not parts or any(part.name.lower() not in _SPLITS for part in parts) or _loose_images(candidate):
                    sides = [_Side(candidate, split)]
                else:
                    sides = [_Side(part, _split_of(part)) for part in parts]
                (highs if found["high"] else lows).extend(sides)
    return lows, highs


def _split_of(folder: Path) -> str | None:
    words = re.split(r"[ ._-]", folder.name.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)


def _are_certain(folder: Path, sides: Sequence[_Side]) -> bool:
    """Whether folders without partners are sides: one that is just called `hr` is not, if it is one of many."""
    named = {side.folder for side in sides}
    if any(_split_of(side) for side in named):
        return True
    return all(not named.isdisjoint(path.parents) for path in list_images(folder))


def _good_folders(folder: Path, split: Split) -> list[Path]:
    """What `hq_images` takes: sides, or all of the folder."""
    lows, highs = _sides(folder)
    if not highs or not (lows or _are_certain(folder, highs)):
        return [folder]
    order: tuple[tuple[str | None, ...], ...] = (("train", None), ("valid",), ("test",))
    if split == "test":
        order = (("test",), ("valid",), (None,), ("train",))
    groups = ([side.folder for side in highs if side.split in wanted] for wanted in order)
    return next(filter(None, groups))


def _matching_sides(folder: Path, lows: list[_Side], highs: list[_Side], split: Split) -> tuple[_Side, _Side]:
    """The one bad and the one good side that are meant; UserError, with the candidates, if that is not certain."""
    both = [*lows, *highs]
    if len(both) == 2 and None in (lows[0].split, highs[0].split):
        return lows[0], highs[0]
    low, high = (_only(folder, _of_split(sides, both, split), both) for sides in (lows, highs))
    return low, high


def _of_split(sides: list[_Side], all_sides: list[_Side], split: Split) -> list[_Side]:
    """Those of `sides` that are of the wanted split; all of them if it is not certain which that is."""
    splits = {side.split for side in all_sides}
    order = ("test", "valid") if split == "test" else ("train",)
    wanted = next(({name} for name in order if name in splits and None not in splits), splits)
    return [side for side in sides if side.split in wanted]


def _only(folder: Path, candidates: list[_Side], all_sides: list[_Side]) -> _Side:
    """The one candidate; UserError if there are several, or none among all."""
    if len(candidates) != 1:
        shown = _listed(side.folder.relative_to(folder) for side in candidates or all_sides)
        raise UserError(
            f"data.root={folder}: which of {shown} is meant is not certain; "
            "give a folder that holds one of them beside its partner, or move the others away"
        )
    return candidates[0]


def _inside(root: Path, side: _Side) -> Path:
    """The folder of a side's images: sets like DIV2K have one more, for the scale (`X4`)."""
    folders = _subfolders(side.folder)
    if not folders or not all(_SCALE_FOLDER.fullmatch(child.name) for child in folders) or _loose_images(side.folder):
        return side.folder
    scales = [_Side(child, side.split) for child in folders]
    return _only(root, scales, scales).folder


def _log_taken(root: Path, taken: Sequence[Path]) -> None:
    """Say which subfolders are taken, if others are not."""
    above = {parent for folder in taken for parent in folder.parents}
    places = [root, *(child for child in _subfolders(root) if child in above)]
    left = [child for place in places for child in _subfolders(place) if child not in above and child not in taken]
    rest = [child.relative_to(root).as_posix() for child in left]
    if loose := _loose_images(root):
        rest.append(f"{len(loose)} images beside them")
    if rest:
        shown = _listed(folder.relative_to(root) for folder in taken)
        log.info("data.root=%s: taken are the images in %s; not taken: %s", root, shown, ", ".join(rest))


def _log_all_taken(root: Path, named: Sequence[_Side]) -> None:
    """Say that folders called like a side are taken for ones like the others."""
    shown, first = _listed(side.folder.relative_to(root) for side in named), named[0].folder
    text = "data.root=%s: all of its images are taken, those in %s as well; give data.root=%s for that folder alone"
    log.warning(text, root, shown, first)


def _subfolders(folder: Path) -> list[Path]:
    """In order of their names, hidden ones not; a folder can hold 85,000 files, of which none is asked anything."""
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.name[0] != "." and entry.is_dir())
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}; make it readable or move it") from error


def _loose_images(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name[0] != "." and Path(name).suffix.lower() in IMAGE_EXTENSIONS]


def _listed(paths: Iterable[Path]) -> str:
    return ", ".join(path.as_posix() for path in paths)


def _without_fault(listing: Listing) -> list[Listed]:
    """The images; UserError if names do not match or there are none."""
    if listing.duplicates:
        path, earlier = listing.duplicates[0]
        raise UserError(f"two images of the same name: {earlier} and {path}; rename or remove one")
    where = str(listing.low_folder)
    if listing.high_folder:
        where = f"{listing.low_folder.parent} ({listing.low_folder.name} beside {listing.high_folder.name})"
    if listing.ambiguous:
        files = ", ".join(map(str, listing.ambiguous[0][:5]))
        raise UserError(f"{where}: it is not certain which of these belong together: {files}; rename or remove some")
    if listing.unpaired:
        files = ", ".join(map(str, listing.unpaired[:5]))
        raise UserError(f"{where}: {len(listing.unpaired)} images have no partner of the same name: {files}")
    if not listing.images:
        raise UserError(f"{where} holds no image; put there {PAIRS_HELP if listing.high_folder else IMAGES_HELP}")
    return listing.images


def _by_name(folder: Path) -> tuple[dict[str, Path], list[tuple[Path, Path]]]:
    """Name the images of a folder by their path inside it, without extension; accents as one letter (NFC).

    Returns:
        images by name; (image, earlier image of the same name) of those left out.
    """
    found: dict[str, Path] = {}
    duplicates: list[tuple[Path, Path]] = []
    for path in list_images(folder):
        name = unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix())
        if found.setdefault(name, path) is not path:
            duplicates.append((path, found[name]))
    return found, duplicates


@dataclass
class Matching:
    """What belongs together, (name, bad image, good image), in natural order of the names, and what has no partner.

    Images that could belong together in several ways are ambiguous, and in no pair.
    """

    pairs: list[tuple[str, Path, Path]] = field(default_factory=list)
    unpaired: list[Path] = field(default_factory=list)
    ambiguous: list[tuple[Path, ...]] = field(default_factory=list)


def match_names(low: Images, high: Images) -> Matching:
    """Pair the images of two sides: equal names first, then those that are equal without their endings."""
    lows, highs = set(low), set(high)
    # after a letter a scale is an ending (`babyx4`) only where all names have it: `matrix2` is a name
    scales = {match[0].lower() if (match := re.search(rf"(?i){_SCALE}$", name)) else "" for name in low}
    shared_scale = (re.escape(scales.pop()),) if len(scales) == 1 and "" not in scales else ()
    whole = partial(_forms, endings=())
    low_forms = partial(_forms, endings=_LOW_ENDINGS + shared_scale)
    high_forms = partial(_forms, endings=_HIGH_ENDINGS)
    found: dict[str, list[tuple[str, str]]] = {}
    ambiguous: dict[tuple[Path, ...], None] = {}
    for forms in ((whole, whole), (low_forms, whole), (whole, high_forms), (low_forms, high_forms)):
        partners, rivals = _partners(lows, highs, *forms), _partners(highs, lows, *reversed(forms))
        for name, others in partners.items():
            contending = sorted({rival for other in others for rival in rivals[other]}, key=natural_key)
            if len(others) == 1 and contending == [name]:
                shared = max(low_forms(name) & high_forms(others[0]), key=len)
                found.setdefault(shared, []).append((name, others[0]))
            elif others:
                ambiguous[*(low[rival] for rival in contending), *(high[other] for other in others)] = None
        lows -= {name for name, others in partners.items() if others}
        highs -= {other for other, names in rivals.items() if names}
    pairs = [(name, low[one], high[other]) for name, [(one, other), *more] in found.items() if not more]
    twice = [same for same in found.values() if len(same) > 1]  # two pairs would get one name
    unpaired = [(name, low[name]) for name in lows] + [(name, high[name]) for name in highs]
    return Matching(
        sorted(pairs, key=lambda pair: natural_key(pair[0])),
        [path for _, path in sorted(unpaired, key=lambda item: natural_key(item[0]))],
        [*ambiguous, *(tuple(path for one, other in same for path in (low[one], high[other])) for same in twice)],
    )


def _forms(name: str, endings: Iterable[str]) -> set[str]:
    folder, slash, stem = name.rpartition("/")
    cut = (re.fullmatch(rf"(?is)(.+?){ending}", stem) for ending in endings)
    return {name, *(folder + slash + match[1] for match in cut if match)}


def _partners(names: set[str], others: set[str], forms: Forms, other_forms: Forms) -> dict[str, list[str]]:
    """For each name the others that share a form with it."""
    by_form: dict[str, list[str]] = {}
    for other in sorted(others):
        for form in other_forms(other):
            by_form.setdefault(form, []).append(other)
    return {name: sorted({other for form in forms(name) for other in by_form.get(form, [])}) for name in names}
