"""What is where in a folder of training or test pictures."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from varestorer.data.listing import indexed_images
from varestorer.utils.errors import UserError
from varestorer.utils.files import expand_user
from varestorer.utils.images import natural_key

HQ_NAMES = ("hr", "hq", "gt")
LQ_NAMES = ("lr", "lq")
HQ_HELP = "a folder of images, or one that holds them in hr, hq, gt, test_HR or NAME_train_HR"
PAIRS_HELP = "hr, hq, gt or test_HR with the good images beside lr, lq or test_LR with the bad ones"
IMAGES_HELP = f"a folder of images, or {PAIRS_HELP}"


Listed = tuple[str, Path, Path | None]
"""(name, bad image, good image if there is one)."""


@dataclass(frozen=True)
class Listing:
    """The images of a test set, matched by name but not opened.

    Attributes:
        low_folder: holds the bad images.
        high_folder: holds the good ones; None: there are none.
        images: in natural order of the names.
        lonely: images without a partner, likewise.
        doubles: (image, the one whose name it has too); such an image is left out.
    """

    low_folder: Path
    high_folder: Path | None
    images: list[Listed]
    lonely: list[Path]
    doubles: list[tuple[Path, Path]]


def hq_images(root: str | os.PathLike) -> list[Path]:
    """List the good images of a data set, however it is laid out.

    Args:
        root: a folder of images (subfolders included), or a folder that holds one of `hr`, `hq`, `gt`,
            `test_HR`, `DIV2K_train_HR` and the like, whose images alone are then taken.
    Raises:
        UserError: no such folder, or no image in it; says what belongs there.
    """
    images = indexed_images(hq_folder(root))
    if not images:
        raise UserError(f"data.root={expand_user(root)} holds no image; put there {HQ_HELP}")
    return images


def hq_folder(root: str | os.PathLike) -> Path:
    """The folder whose images `hq_images` lists; UserError if `root` is none."""
    folder = existing_folder(root, HQ_HELP)
    return _named_subfolder(folder, HQ_NAMES) or folder


def find_pairs(root: str | os.PathLike) -> list[tuple[str, Path, Path]]:
    """Match the bad and good images of a paired data set by name, without opening them.

    A pair has the same path inside its folder, extension aside. Sets that write the side into the name
    (`a_LR4.png`, `a_HR.png`, `ax4.png`) are matched without those endings when no plain name matches.

    Args:
        root: folder with `hr`, `hq`, `gt` or `test_HR` beside `lr`, `lq` or `test_LR`.
    Returns:
        (name, bad image, good image), in natural order of the names.
    Raises:
        UserError: folders missing, or images without a partner; lists them.
    """
    images = _without_fault(list_test_set(root, need_pairs=True))
    return [(name, low, high) for name, low, high in images if high]


def find_images_or_pairs(root: str | os.PathLike) -> list[Listed]:
    """List a data set that may do without good images, without opening any.

    Args:
        root: as for `find_pairs`; or a folder of images alone (subfolders included), which may hold them in
            `lr`, `lq` or `test_LR`.
    Returns:
        (name, bad image, good image or None for all), in natural order of the names.
    Raises:
        UserError: no image, images without a partner, two of the same name, or good images alone.
    """
    return _without_fault(list_test_set(root, need_pairs=False))


def list_test_set(root: str | os.PathLike, need_pairs: bool) -> Listing:
    """List a test set as `find_pairs` or `find_images_or_pairs` do, with all that is wrong with its names.

    Args:
        root: as for these two.
        need_pairs: whether bad images alone will not do.
    Raises:
        UserError: a side is missing.
    """
    wanted = PAIRS_HELP if need_pairs else IMAGES_HELP
    folder = existing_folder(root, wanted)
    low, high = _named_subfolder(folder, LQ_NAMES), _named_subfolder(folder, HQ_NAMES)
    if low and high:
        return _match(low, high)
    if need_pairs or high:
        there = ", ".join(sorted(child.name for child in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"{folder} holds no {'pairs' if need_pairs else 'bad images'}: wanted {wanted}, found {there}")
    by_name, doubles = _by_name(low or folder, keep_endings=True)
    return Listing(low or folder, None, [(name, path, None) for name, path in by_name.items()], [], doubles)


def existing_folder(root: str | os.PathLike | None, wanted: str) -> Path:
    """`root` as a path; UserError naming `data.root` and what is wanted there if it is no readable folder."""
    folder = expand_user(root or "")
    if not root or not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"data.root={str(root or '')!r} is no folder that can be read; give {wanted}")
    return folder


def _match(low_folder: Path, high_folder: Path) -> Listing:
    sides = [_by_name(side, keep_endings=True) for side in (low_folder, high_folder)]
    if not sides[0][0].keys() & sides[1][0].keys():
        sides = [_by_name(side, keep_endings=False) for side in (low_folder, high_folder)]
    (low, low_doubles), (high, high_doubles) = sides
    names = sorted(low.keys() | high.keys(), key=natural_key)
    pairs: list[Listed] = [(name, low[name], high[name]) for name in names if name in low and name in high]
    lonely = [low.get(name) or high[name] for name in names if (name in low) != (name in high)]
    return Listing(low_folder, high_folder, pairs, lonely, low_doubles + high_doubles)


def _without_fault(listing: Listing) -> list[Listed]:
    """The images; UserError if names do not match or there are none."""
    if listing.doubles:
        path, earlier = listing.doubles[0]
        raise UserError(f"two images of the same name: {earlier} and {path}; rename or remove one")
    where = str(listing.low_folder)
    if listing.high_folder:
        where = f"{listing.low_folder.parent} ({listing.low_folder.name} beside {listing.high_folder.name})"
    if listing.lonely:
        files = ", ".join(map(str, listing.lonely[:5]))
        raise UserError(f"{where}: {len(listing.lonely)} images have no partner of the same name: {files}")
    if not listing.images:
        raise UserError(f"{where} holds no image; put there {PAIRS_HELP if listing.high_folder else IMAGES_HELP}")
    return listing.images


def _named_subfolder(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The subfolder called one of `names`, or ending in `_NAME`; training sides come first."""
    # names before kinds: a folder can hold 85,000 files
    named = [folder / name for name in os.listdir(folder) if name.lower().rpartition("_")[2] in names]
    found = [child for child in named if child.is_dir()]
    is_plain = {child: child.name.lower() in names for child in found}
    found.sort(key=lambda child: (not is_plain[child], "train" not in child.name.lower(), child.name))
    return found[0] if found else None


def _by_name(folder: Path, keep_endings: bool) -> tuple[dict[str, Path], list[tuple[Path, Path]]]:
    """Name the images of a folder by their path inside it, without extension.

    Args:
        folder: searched with its subfolders.
        keep_endings: whether `_LR4`, `x4` and the like stay in the name.
    Returns:
        images by name; (image, earlier image of the same name) of those left out.
    """
    found: dict[str, Path] = {}
    doubles: list[tuple[Path, Path]] = []
    for path in indexed_images(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        name = name if keep_endings else re.sub(r"(?i)([_-]?x\d|[_-](lr|lq|hr|hq|gt)\d?)$", "", name)
        if found.setdefault(name, path) is not path:
            doubles.append((path, found[name]))
    return found, doubles
