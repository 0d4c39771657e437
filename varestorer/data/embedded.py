"""The photographs inside the wheels of scikit-image and scikit-learn: real pictures without a download.

Seven natural color scenes, looked at one by one (their other pictures are drawings, textures, microscopy,
gray or of the sky). The split is fixed; both views of the motorcycle are on the training side.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from torch import Tensor

from varestorer.utils.errors import UserError
from varestorer.utils.images import load_image

Split = Literal["train", "heldout"]

# (package, its pip name, file inside the package)
_SKIMAGE, _SKLEARN = ("skimage", "scikit-image", "data"), ("sklearn", "scikit-learn", "datasets/images")
_PHOTOGRAPHS = {
    "train": (
        (_SKIMAGE, "astronaut.png"),
        (_SKIMAGE, "chelsea.png"),
        (_SKIMAGE, "motorcycle_left.png"),
        (_SKIMAGE, "motorcycle_right.png"),
        (_SKIMAGE, "rocket.jpg"),
        (_SKLEARN, "flower.jpg"),
    ),
    "heldout": ((_SKLEARN, "china.jpg"), (_SKIMAGE, "coffee.png")),
}


def embedded_paths(split: Split) -> list[Path]:
    """Files of the embedded photographs, in a fixed order.

    Args:
        split: `train` (six pictures of five scenes) or `heldout` (china, coffee).
    Raises:
        UserError: a package is not installed or does not carry its photographs.
    """
    if split not in _PHOTOGRAPHS:
        raise ValueError(f"split must be train or heldout, got {split!r}")
    return [_locate(*package, name) for package, name in _PHOTOGRAPHS[split]]


def embedded_photographs(split: Split) -> list[tuple[str, Tensor]]:
    """(name, (3, H, W) float32 in [0, 1]) of each embedded photograph of a split (see `embedded_paths`)."""
    return [(path.stem, load_image(path)) for path in embedded_paths(split)]


def _locate(module: str, package: str, folder: str, name: str) -> Path:
    """Find a file of an installed package without importing the package (which takes a second)."""
    spec = find_spec(module)
    roots = list(spec.submodule_search_locations or []) if spec else []
    for root in roots:
        path = Path(root, folder, name)
        if path.is_file():
            return path
    problem = "does not carry it here" if roots else "is not installed"
    raise UserError(
        f"the embedded photograph {name} comes with {package}, which {problem}: "
        f"pip install --force-reinstall {package}, or train on a folder: data=folder data.root=..."
    )
