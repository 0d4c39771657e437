"""Making a test set like DIV2K-Val out of good photographs: crops, and second-order degradations of them.

What a pair shows depends on the seed, the name of its photograph and how many crops of that photograph came
before: not on other files, on the number of pairs, on workers, or on where an interrupted run stopped.

- Crops are placed by a hash, so they are the same everywhere. A PNG gives the same pixels everywhere, a JPEG
  where the decoder is the same.
- Degradations draw from NumPy's generators and compress with torchvision's JPEG library: the same with the same
  versions, which the manifest names. They are given float64 pictures, so that the last bits in which processors
  and numbers of threads differ are far below the 8 bits that are kept.
- The bytes of a PNG file depend on the version of zlib. Its pixels do not, and they are what is hashed.

Crops are uniformly random, as in the original: one that shows only sky is part of such a set.
"""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from varestorer import __version__
from varestorer.data.datasets import cut
from varestorer.data.degradation import Degradation
from varestorer.data.folders import HQ_HELP, hq_folder, hq_folders
from varestorer.data.testsets.checking import MANIFEST, MadePair, Manifest, pixel_hash
from varestorer.data.workers import deaths_explained, in_turn
from varestorer.utils.errors import UserError
from varestorer.utils.images import load_image, save_image, to_uint8
from varestorer.utils.locks import LOCK
from varestorer.utils.scanning import list_images
from varestorer.utils.seeds import derive_seed, numpy_generator

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pillow")
SAVE_EVERY = 32  # chunks between two states of the manifest
WORKERS_KEY = "workers"
CHUNK = 16  # pairs of one photograph that are made in a row


@dataclass(frozen=True)
class Recipe:
    """How pairs are made.

    `crop` is the side of the good images, pixels, a multiple of the degradation's scale; the seed is of crops and
    degradations.
    """

    crop: int
    seed: int
    degradation: Degradation

    def __post_init__(self) -> None:
        scale = self.degradation.scale
        if self.crop < scale or self.crop % scale:
            raise UserError(f"crop must be a positive multiple of scale {scale}, got {self.crop}")

    def cut(self, photo_3HW: Tensor, cut_out: "CutOut") -> Tensor:
        """The square that is taken of a photograph, uint8."""
        return to_uint8(cut(photo_3HW, (cut_out.top, cut_out.left, self.crop, self.crop)))

    def make(self, photo_3HW: Tensor, cut_out: "CutOut") -> tuple[Tensor, Tensor]:
        """Make a pair of what `cut_out` takes of a photograph, float32 in [0, 1].

        Returns the bad image (3, crop / scale, crop / scale) and the good one (3, crop, crop), 8-bit levels in [0, 1].
        """
        scale = self.degradation.scale
        hq_3HW = self.cut(photo_3HW, cut_out).double() / 255
        # enlarged by `area`, a whole number of times, every pixel of the small picture is repeated
        degrade = replace(self.degradation, enlarge_modes=("area",))
        rng = numpy_generator(self.seed, "degradation", cut_out.source, cut_out.turn)
        return degrade(hq_3HW, rng)[:, ::scale, ::scale], hq_3HW


@dataclass(frozen=True)
class CutOut:
    """A square of a photograph (a path inside its folder), at a place in pixels; the name is of the pair.

    `turn` is how many earlier pairs show the same photograph.
    """

    name: str
    source: str
    turn: int
    top: int
    left: int


def make_test_set(
    root: Path, source: Path, recipe: Recipe, options: Mapping[str, Any], count: int, num_workers: int = 0
) -> Manifest:
    """Make pairs in `root`: `hr` and `lr` with PNG files, and `manifest.json`.

    An interrupted run goes on where it stopped. Pairs that are there are read and kept if their pixels are those noted
    down, and those of their photograph. The number of pairs may be raised later: the first ones stay.

    Args:
        root: new folder, or one that an earlier run with the same options made.
        source: good photographs, as `hq_images` finds them (of several sides the test side). Unreadable ones and
            those smaller than a crop are left out and noted.
        options: what to note of how; an earlier run's have to be equal.
        count: number of pairs; every photograph gives equally many, up to one.
        num_workers: processes that make pairs; 0: this one does. The pairs are the same for any number.
    Raises:
        UserError: `root` holds something else or was begun with other options, versions or photographs; no
            photograph can be used; or a file cannot be written.
    """
    if count < 1:
        raise UserError(f"count must be at least 1 pair, got {count}")
    manifest = _begin(root, options)
    folder = hq_folder(source, split="test")
    sides = hq_folders(source, split="test")
    paths = {_key(path, folder): path for side in sides for path in list_images(side)}
    cut_outs, manifest.skipped = plan_cut_outs(paths, recipe, count)
    if not cut_outs:
        reasons = "; ".join(list(manifest.skipped.values())[:5]) or f"give {HQ_HELP}"
        raise UserError(f"source={source}: none of {len(paths)} photographs can be used: {reasons}")
    _check_plan(root, manifest, cut_outs)
    maker = _PairMaker(root, recipe, paths, cut_outs, manifest.pairs)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # without workers this process makes them; pictures are too small for more
    with deaths_explained(WORKERS_KEY), tqdm(total=len(cut_outs), desc="making", unit=" pairs") as bar:
        try:
            for number, made in enumerate(in_turn(maker, num_workers, WORKERS_KEY), start=1):
                if isinstance(made, UserError):
                    raise made
                manifest.pairs |= made
                bar.update(len(made))
                if number % SAVE_EVERY == 0:
                    manifest.save(root / MANIFEST)
        finally:
            torch.set_num_threads(num_threads)
            manifest.save(root / MANIFEST)
    return manifest


def plan_cut_outs(paths: Mapping[str, Path], recipe: Recipe, count: int) -> tuple[list[CutOut], dict[str, str]]:
    """Decide what every pair shows; opens no more photographs than it needs.

    Pairs go round the usable photographs in an order that the seed gives. Gives `count` squares, none if no photograph
    can be used, and the photographs left out, with the reason.
    """
    sizes: dict[str, tuple[int, int]] = {}
    skipped: dict[str, str] = {}
    for name in sorted(paths, key=lambda name: derive_seed(recipe.seed, "order", name)):
        try:
            height, width = load_image(paths[name]).shape[-2:]
        except UserError as error:
            skipped[name] = str(error)
            continue
        if min(height, width) < recipe.crop:
            skipped[name] = f"{paths[name]} is {width}x{height}, smaller than a crop of {recipe.crop}x{recipe.crop}"
        else:
            sizes[name] = height, width
        if len(sizes) == count:
            break
    order = list(sizes)
    cut_outs = []
    for number in range(count if order else 0):
        turn, place = divmod(number, len(order))
        name = order[place]
        top, left = (
            derive_seed(recipe.seed, axis, name, turn) % (side - recipe.crop + 1)
            for axis, side in zip(("top", "left"), sizes[name], strict=True)
        )
        cut_outs.append(CutOut(f"{number:05d}", name, turn, top, left))
    return cut_outs, skipped


def versions() -> dict[str, str]:
    """Versions of what computes the pixels."""
    return {"varestorer": __version__, **{name: metadata.version(name) for name in PACKAGES}}


def _key(path: Path, folder: Path) -> str:
    """Name of a photograph, the same on every machine: macOS writes accents as letters of their own."""
    return unicodedata.normalize("NFC", path.relative_to(folder).as_posix())


def _begin(root: Path, options: Mapping[str, Any]) -> Manifest:
    """The manifest of an earlier run with the same options and versions, or a new one in a new folder."""
    new = Manifest(dict(options), versions())
    if not (root / MANIFEST).exists():
        if root.exists() and (not root.is_dir() or any(path.name != LOCK for path in root.iterdir())):
            raise UserError(f"make={root} is no new folder, nor one that this command made; give another")
        new.save(root / MANIFEST)
        return new
    old = Manifest.load(root / MANIFEST)
    for what, then, now in (("options", old.options, new.options), ("versions", old.versions, new.versions)):
        changed = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        if changed:
            was = ", ".join(f"{key}={then.get(key)} (now {now.get(key)})" for key in changed)
            raise UserError(f"make={root} was begun with other {what}: {was}; go on with those, or give a new folder")
    return old


def _check_plan(root: Path, manifest: Manifest, cut_outs: list[CutOut]) -> None:
    """Pairs that are there have to be the ones that would be made."""
    plan = {cut_out.name: cut_out for cut_out in cut_outs}
    for name, pair in manifest.pairs.items():
        planned = plan.get(name)
        if planned is None:
            raise UserError(f"make={root} has {len(manifest.pairs)} pairs already; give at least as many with count=")
        if (planned.source, planned.top, planned.left) != (pair.source, pair.top, pair.left):
            raise UserError(
                f"the photographs changed since make={root} was begun: pair {name} was of {pair.source} and would "
                f"now be of {planned.source}; bring them back, or give a new folder"
            )


class _PairMaker(Dataset[Any]):
    """Chunks of pairs, each of one photograph; getting one makes its files."""

    def __init__(
        self,
        root: Path,
        recipe: Recipe,
        paths: Mapping[str, Path],
        cut_outs: list[CutOut],
        known: Mapping[str, MadePair],
    ) -> None:
        self.root, self.recipe, self.paths, self.known = root, recipe, paths, dict(known)
        by_source: dict[str, list[CutOut]] = {}
        for cut_out in cut_outs:
            by_source.setdefault(cut_out.source, []).append(cut_out)
        self.chunks = [part[i : i + CHUNK] for part in by_source.values() for i in range(0, len(part), CHUNK)]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> dict[str, MadePair]:
        chunk = self.chunks[number]
        photo_3HW = load_image(self.paths[chunk[0].source])
        for cut_out in chunk:
            self._check_photograph(photo_3HW, cut_out)
        made = {cut_out.name: self.known[cut_out.name] for cut_out in chunk if self._is_there(cut_out.name)}
        return made | {cut_out.name: self._make(photo_3HW, cut_out) for cut_out in chunk if cut_out.name not in made}

    def _place(self, side: str, name: str) -> Path:
        return self.root / side / f"{name}.png"

    def _check_photograph(self, photo_3HW: Tensor, cut_out: CutOut) -> None:
        """Refuse a photograph that does not show what the pair that was made of it does."""
        known = self.known.get(cut_out.name)
        if known is not None and pixel_hash(self.recipe.cut(photo_3HW, cut_out)) != known.hr:
            raise UserError(
                f"the photographs changed since make={self.root} was begun: {self.paths[cut_out.source]} does not show "
                f"what pair {cut_out.name} was made of; bring it back, or give a new folder"
            )

    def _is_there(self, name: str) -> bool:
        """Whether both files hold the pixels that were noted down."""
        try:
            hashes = {side: pixel_hash(to_uint8(load_image(self._place(side, name)))) for side in ("lr", "hr")}
        except UserError:  # one is missing or broken
            return False
        return name in self.known and all(hashes[side] == getattr(self.known[name], side) for side in hashes)

    def _make(self, photo_3HW: Tensor, cut_out: CutOut) -> MadePair:
        hashes = {}
        for side, image in zip(("lr", "hr"), self.recipe.make(photo_3HW, cut_out), strict=True):
            save_image(self._place(side, cut_out.name), image)
            hashes[side] = pixel_hash(to_uint8(image))
        return MadePair(cut_out.source, cut_out.top, cut_out.left, **hashes)
