"""Checking a test set, file by file, before its figures are believed; fingerprints of sets.

Hashes are SHA-256 of pixels, not of files: the same picture compressed by another version of zlib is another file. So
two copies can be compared without moving them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor
from tqdm.auto import tqdm

from varestorer.data.folders import Listing, list_test_set
from varestorer.data.testsets.known import BENCHMARKS, Benchmark
from varestorer.utils.errors import UserError, reason
from varestorer.utils.files import name_bytes, read_text, write_json
from varestorer.utils.image_files import open_image
from varestorer.utils.images import load_image, to_uint8
from varestorer.utils.scanning import natural_key

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ReadImage:
    """An image that could be decoded.

    Attributes:
        format: of the file, e.g. PNG.
        mode: as stored, e.g. `8-bit RGB`.
        size: height, width, pixels.
        hash: `pixel_hash` of its pixels.
    """

    format: str
    mode: str
    size: tuple[int, int]
    hash: str

    def __str__(self) -> str:
        return f"{self.format}, {self.mode}, {show(self.size)}"


@dataclass
class Check:
    """What a check found.

    Attributes:
        problems: of the set as a whole.
        offenders: file, as path inside the folder -> what is wrong with it.
        folders: the sides, `lr` and maybe `hr`.
        images: of each side, the images that could be decoded, by name.
    """

    problems: list[str] = field(default_factory=list)
    offenders: dict[str, list[str]] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    images: dict[str, dict[str, ReadImage]] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        """Nothing was found wrong."""
        return not self.problems and not self.offenders

    def kinds(self, side: str) -> Counter[str]:
        """How many images of a side there are of each format, mode and size."""
        return Counter(map(str, self.images[side].values()))

    def digests(self) -> dict[str, str]:
        """One hash for all pictures of each side; compare them between machines, or with `Manifest.digests`."""
        return {
            side: joint_hash({name: image.hash for name, image in images.items()})
            for side, images in self.images.items()
        }


def known_set(lr: Mapping[str, Path]) -> Benchmark | None:
    """The test set whose released pixels these are (name -> low-quality file, of all pairs); None where none has them.

    Pixels are read only if there are as many files as a known set has.
    """
    candidates = [known for known in BENCHMARKS.values() if known.pixels and known.pairs == len(lr)]
    if not candidates:
        return None
    try:
        digest = joint_hash({name: pixel_hash(to_uint8(load_image(path))) for name, path in lr.items()})
    except UserError:  # no released set holds a broken file
        return None
    return next((known for known in candidates if known.pixels and known.pixels["lr"] == digest), None)


def check_test_set(root: Path, benchmark: Benchmark, scale: int = 4, manifest: Manifest | None = None) -> Check:
    """Decode every image of a test set and compare it with what the set, `benchmark`, should be.

    Images of sets with references have to be 8-bit RGB; elsewhere other images are converted when they are read, which
    no reference contradicts. Good images are `scale` times as large. The pixels have to be those of the manifest, of
    the machine that made the set, if there is one.
    """
    try:
        listing = list_test_set(root, need_pairs=benchmark.reference)
    except UserError as error:
        return Check(problems=[str(error)])
    check = _Checker(root, benchmark, scale, listing)
    check.check_names()
    for name, low, high in tqdm(listing.images, desc="reading", unit=" images", leave=False):
        check.check_images(name, low, high if benchmark.reference else None)
    if manifest is not None:
        check.compare(manifest)
    check.offenders = dict(sorted(check.offenders.items(), key=lambda item: natural_key(item[0])))
    return check


def show(size: tuple[int, int]) -> str:
    """Width x height, as people write it."""
    return f"{size[1]}x{size[0]}"


class _Checker(Check):
    """Fills itself."""

    def __init__(self, root: Path, benchmark: Benchmark, scale: int, listing: Listing) -> None:
        self.root, self.benchmark, self.scale, self.listing = root, benchmark, scale, listing
        sides = {"lr": listing.low_folder, "hr": listing.high_folder if benchmark.reference else None}
        folders = {side: folder for side, folder in sides.items() if folder}
        super().__init__(folders=folders, images={side: {} for side in folders})

    def check_names(self) -> None:
        """Count, and name the files that do not pair."""
        for path in self.listing.unpaired:
            self._blame(path, "has no partner of the same name")
        for path, earlier in self.listing.duplicates:
            self._blame(path, f"has the same name as {self._show(earlier)}")
        for images in self.listing.ambiguous:
            for path in images:
                others = ", ".join(self._show(other) for other in images if other != path)
                self._blame(path, f"may belong to any of {others}")
        count, wanted = len(self.listing.images), self.benchmark.pairs
        what = "pairs" if self.benchmark.reference else "images"
        if wanted is not None and count != wanted:
            self.problems.append(f"wanted {wanted} {what}, found {count}")
        elif not count:
            self.problems.append(f"holds no {what}")

    def check_images(self, name: str, low: Path, high: Path | None) -> None:
        """Read an image or a pair, and check formats and sizes."""
        side = self.benchmark.lq_side
        small = self._read("lr", name, low)
        large = None if high is None else self._read("hr", name, high)
        if side is not None:
            for path, image, wanted in ((low, small, side), (high, large, side * self.scale)):
                if path and image and image.size != (wanted, wanted):
                    self._blame(path, f"is {show(image.size)}, wanted {wanted}x{wanted}")
        elif high and small and large:
            wanted_size = (self.scale * small.size[0], self.scale * small.size[1])
            if large.size != wanted_size:
                partner = f"{self.scale} times {self._show(low)} ({show(small.size)})"
                self._blame(high, f"is {show(large.size)}, wanted {show(wanted_size)}: {partner}")

    def compare(self, manifest: Manifest) -> None:
        """Compare the pixels with those of the machine that made the set."""
        places = {name: {"lr": low, "hr": high} for name, low, high in self.listing.images}
        gone = sorted(manifest.pairs.keys() - places.keys())
        self.problems += [f"{name} is in the manifest but not in the folder" for name in gone]
        for name, sides in places.items():
            made = manifest.pairs.get(name)
            for side, images in self.images.items():
                path, image = sides[side], images.get(name)
                if path and made is None:
                    self._blame(path, "is not in the manifest")
                elif path and image and image.hash != getattr(made, side):
                    self._blame(path, "has other pixels than the manifest says")

    def _read(self, side: str, name: str, path: Path) -> ReadImage | None:
        """Decode an image; blame it if that fails, or for what it is."""
        try:
            image = read_image(path)
        except UserError as error:
            self._blame(path, str(error))
            return None
        formats = self.benchmark.formats
        if formats and image.format not in formats:
            self._blame(path, f"is {image.format}, wanted {' or '.join(formats)}: not the released file")
        if self.benchmark.reference and image.mode != "8-bit RGB":
            self._blame(path, f"is {image.mode}, wanted 8-bit RGB")
        self.images[side][name] = image
        return image

    def _blame(self, path: Path, reason: str) -> None:
        self.offenders.setdefault(self._show(path), []).append(reason)

    def _show(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def read_image(path: Path) -> ReadImage:
    """Decode an image wholly; UserError, which names it, if it cannot be read."""
    with open_image(path) as file:
        # Pillow calls 16-bit color RGB too and drops half of it when decoding
        stored = str(file.tile[0][3]) if file.tile else ""
        depth = "16-bit" if "16" in stored or "16" in file.mode else "8-bit"
        kind, mode = file.format or "unknown", f"{depth} {file.mode.partition(';')[0]}"
    pixels_3HW = to_uint8(load_image(path))
    return ReadImage(kind, mode, (pixels_3HW.shape[-2], pixels_3HW.shape[-1]), pixel_hash(pixels_3HW))


@dataclass(frozen=True)
class MadePair:
    """One pair of a made set.

    Of its photograph (a path inside its folder) the place of the crop is told, pixels; of both images the hash of the
    pixels.
    """

    source: str
    top: int
    left: int
    lr: str
    hr: str


@dataclass
class Manifest:
    """What a made set is and how it was made; `manifest.json` in its folder.

    What was asked for, versions of what computed it, photographs left out with the reason, and the pairs by name.
    """

    options: dict[str, Any]
    versions: dict[str, str]
    skipped: dict[str, str] = field(default_factory=dict)
    pairs: dict[str, MadePair] = field(default_factory=dict)

    def digests(self) -> dict[str, str]:
        """One hash for all pictures of each side, `lr` and `hr`."""
        sides = ("lr", "hr")
        return {side: joint_hash({name: getattr(pair, side) for name, pair in self.pairs.items()}) for side in sides}

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        content = {"digests": self.digests(), **asdict(self)}
        content["pairs"] = dict(sorted(content["pairs"].items()))
        write_json(path, content, indent=1)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Manifest:
        """Read a file that `save` wrote; UserError if it cannot be read, or is something else."""
        try:
            content = json.loads(read_text(path))
            pairs = {name: MadePair(**pair) for name, pair in content["pairs"].items()}
            return cls(content["options"], content["versions"], content["skipped"], pairs)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is no manifest of a made set ({reason(error)}); copy it again from where the set was made"
            ) from error


def pixel_hash(img_3HW: Tensor) -> str:
    """Hash a uint8 picture: its height, width and pixels, row by row, RGB."""
    height, width = img_3HW.shape[-2:]
    digest = hashlib.sha256(f"{height} {width} ".encode())
    digest.update(rearrange(img_3HW, "c h w -> h w c").numpy().tobytes())
    return digest.hexdigest()


def joint_hash(hashes: Mapping[str, str]) -> str:
    """Hash the hashes of many pictures with their names, in any order."""
    lines = "".join(f"{name} {value}\n" for name, value in sorted(hashes.items()))
    return hashlib.sha256(name_bytes(lines)).hexdigest()
