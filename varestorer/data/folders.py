"""What is where in a folder of training or test pictures."""

import os
import re
from pathlib import Path

from varestorer.utils.errors import UserError
from varestorer.utils.images import list_images, natural_key

HQ_NAMES = ("hr", "hq", "gt")
LQ_NAMES = ("lr", "lq")
HQ_HELP = "a folder of images, or one that holds them in hr, hq, gt, test_HR or NAME_train_HR"
PAIRS_HELP = "hr, hq, gt or test_HR with the good images beside lr, lq or test_LR with the bad ones"


def hq_images(root: str | os.PathLike) -> list[Path]:
    """List the good images of a data set, however it is laid out.

    Args:
        root: a folder of images (subfolders included), or a folder that holds one of `hr`, `hq`, `gt`,
            `test_HR`, `DIV2K_train_HR` and the like, whose images alone are then taken.
    Raises:
        UserError: no such folder, or no image in it; says what belongs there.
    """
    folder = existing_folder(root, HQ_HELP)
    inner = _named_subfolder(folder, HQ_NAMES)
    images = list_images(inner or folder)
    if not images:
        raise UserError(f"data.root={folder} holds no image; put there {HQ_HELP}")
    return images


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
    folder = existing_folder(root, PAIRS_HELP)
    sides = [_named_subfolder(folder, names) for names in (LQ_NAMES, HQ_NAMES)]
    if sides[0] is None or sides[1] is None:
        there = ", ".join(sorted(child.name for child in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"{folder} holds no pairs: wanted {PAIRS_HELP}, found {there}")
    low, high = (_by_name(side, keep_endings=True) for side in sides if side)
    if not low.keys() & high.keys():
        low, high = (_by_name(side, keep_endings=False) for side in sides if side)
    lonely = sorted(low.keys() ^ high.keys(), key=natural_key)
    if lonely or not low:
        files = ", ".join(str(low.get(name) or high.get(name)) for name in lonely[:5])
        problem = f"{len(lonely)} images have no partner of the same name: {files}" if lonely else "no image"
        raise UserError(f"{folder} ({sides[0].name} beside {sides[1].name}): {problem}")
    return [(name, low[name], high[name]) for name in sorted(low, key=natural_key)]


def existing_folder(root: str | os.PathLike | None, wanted: str) -> Path:
    """`root` as a path; UserError naming `data.root` and what is wanted there if it is no readable folder."""
    folder = Path(root or "").expanduser()
    if not root or not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"data.root={str(root or '')!r} is no folder that can be read; give {wanted}")
    return folder


def _named_subfolder(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The subfolder called one of `names`, or ending in `_NAME`; training sides come first."""
    found = [child for child in folder.iterdir() if child.is_dir() and child.name.lower().endswith(names)]
    found = [child for child in found if child.name.lower().rpartition("_")[2] in names]
    is_plain = {child: child.name.lower() in names for child in found}
    found.sort(key=lambda child: (not is_plain[child], "train" not in child.name.lower(), child.name))
    return found[0] if found else None


def _by_name(folder: Path, keep_endings: bool) -> dict[str, Path]:
    """Images of a folder by their path inside it, without extension and maybe without `_LR4` and the like."""
    found: dict[str, Path] = {}
    for path in list_images(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        name = name if keep_endings else re.sub(r"(?i)([_-]?x\d|[_-](lr|lq|hr|hq|gt)\d?)$", "", name)
        if name in found:
            raise UserError(f"two images of the same name: {found[name]} and {path}; rename or remove one")
        found[name] = path
    return found
