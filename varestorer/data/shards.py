"""Photographs in webdataset shards: tar files whose members `<key>.<extension>` follow one another, sample by sample.

They are read by place, not as a stream: an index says where each member begins, so that sample n of a run is the same
for any number of workers and processes, and a resume begins at any n. (The webdataset library shuffles a stream in a
buffer; where it stood cannot be restored exactly.) The files stay what that library reads.

A sample is one image file, as it was; beside it may be `<key>.txt`, its caption, and `<key>.text.safetensors`, the
features of its prompt. `write_shards` leaves an index in the folder; other people's tar files are scanned at first
use, and what was found is remembered in `cache_folder()/shards` until a file changes.
"""

import io
import json
import tarfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from PIL import Image, ImageFile
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from varestorer.data.folders import existing_folder
from varestorer.data.listing import cache_path, read_cache, stamp, write_cache
from varestorer.utils.decoding import decode
from varestorer.utils.errors import UserError
from varestorer.utils.files import read_text, write_json
from varestorer.utils.image_files import BROKEN_IMAGE_ERRORS
from varestorer.utils.images import IMAGE_EXTENSIONS, natural_key

INDEX = "index.json"
FORMAT = "varestorer shards 1"
SHARDS_HELP = "a folder of webdataset shards (.tar), such as scripts/prepare_data.py shard=FOLDER makes"
CAPTION, FEATURES = "txt", "text.safetensors"


class Member(NamedTuple):
    """A file inside a tar file: its name is `<key>.<extension>`, its bytes are `size` from `offset` on."""

    key: str
    extension: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Packed:
    """A sample of a shard.

    Attributes:
        shard: the tar file.
        image: its photograph.
        caption, features: what is beside it, if anything.
    """

    shard: Path
    image: Member
    caption: Member | None = None
    features: Member | None = None

    @property
    def name(self) -> str:
        """Of the photograph, as in the folder it came from."""
        return f"{self.image.key}.{self.image.extension}"

    @property
    def stem(self) -> str:
        """Last part of the key."""
        return PurePosixPath(self.image.key).name

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"

    def read(self, member: Member) -> bytes:
        """The bytes of one of its members.

        Raises:
            UserError: the tar file cannot be read, or ends too early.
        """
        try:
            with self.shard.open("rb") as file:
                file.seek(member.offset)
                content = file.read(member.size)
        except OSError as error:
            raise UserError(f"cannot read the shard {self.shard}: {error.strerror or error}") from error
        if len(content) < member.size:
            raise UserError(f"the shard {self.shard} ends inside {member.key}.{member.extension}; copy it again")
        return content

    def load(self) -> Tensor:
        """The photograph, (3, H, W) float32 in [0, 1].

        Raises:
            UserError: it cannot be decoded; names shard and member.
        """
        with self._opened() as file:
            return torch.from_numpy(decode(file).rgb_CHW)

    def num_pixels(self) -> int:
        """Width times height, from the header; UserError as for `load`."""
        with self._opened() as file:
            return file.width * file.height

    def load_features(self) -> Tensor | None:
        """Features of its prompt, (T, E) float32; None for the null text.

        Raises:
            UserError: they are damaged.
        """
        if self.features is None:
            return None
        try:
            return load(self.read(self.features))["features"].float()
        except (SafetensorError, KeyError) as error:
            raise UserError(f"{self.shard}: the text features of {self.image.key} are damaged ({error})") from error

    @contextmanager
    def _opened(self) -> Iterator[ImageFile.ImageFile]:
        """The image without its pixels; what Pillow raises inside the block names shard and member too."""
        content = io.BytesIO(self.read(self.image))
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(content) as file:
                yield file
        except BROKEN_IMAGE_ERRORS as error:
            detail = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"cannot read the image {self}: {detail}; make the shard again without it") from error


def packed_photographs(root: str | Path) -> list[Packed]:
    """The samples of all shards of a folder, shards in natural order, samples as they lie.

    Args:
        root: holds the tar files.
    Raises:
        UserError: no folder, no tar file, one that is damaged or not what the index says, or no image.
    """
    folder = existing_folder(root, SHARDS_HELP)
    paths = sorted(folder.glob("*.tar"), key=lambda path: natural_key(path.name))
    if not paths:
        raise UserError(f"data.root={folder} holds no .tar file (compressed ones must be unpacked); give {SHARDS_HELP}")
    members = _own_index(folder, paths) or _cached_index(folder, paths)
    photographs = [sample for path in paths for sample in _samples(path, members[path.name])]
    if not photographs:
        raise UserError(f"the shards of data.root={folder} hold no image; give {SHARDS_HELP}")
    return photographs


def scan(path: Path) -> list[Member]:
    """The files inside a tar file, as they lie; only headers are read.

    Raises:
        UserError: it is damaged, compressed or no tar file.
    """
    try:
        with tarfile.open(path, "r:") as file:
            return [_member(info) for info in file if info.isreg()]
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"cannot read the shard {path}: {error}; it must be a whole, uncompressed tar file") from error


def write_index(folder: Path, shards: dict[str, list[Member]]) -> None:
    """Leave beside the shards the list of what is where in them, the same bytes for the same shards."""
    content = {
        "format": FORMAT,
        "shards": {name: (folder / name).stat().st_size for name in shards},
        "columns": ["shard", "key", "extension", "offset", "size"],
        "members": [[name, *member] for name, members in shards.items() for member in members],
    }
    write_json(folder / INDEX, content)


def _member(info: tarfile.TarInfo) -> Member:
    """The key of a member ends at the first dot of the last part of its name."""
    folder, slash, base = info.name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return Member(folder + slash + stem, extension, info.offset_data, info.size)


def _own_index(folder: Path, paths: list[Path]) -> dict[str, list[Member]] | None:
    """The index that `write_index` left; None if there is none.

    Raises:
        UserError: it does not belong to these tar files.
    """
    try:
        content = json.loads(read_text(folder / INDEX))
        if content["format"] != FORMAT:
            return None
        sizes = dict(content["shards"])
        members: dict[str, list[Member]] = {name: [] for name in sizes}
        for name, *member in content["members"]:
            members[name].append(Member(*member))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    there = {path.name: path.stat().st_size for path in paths}
    wrong = sorted(name for name in sizes.keys() | there.keys() if sizes.get(name) != there.get(name))
    if wrong:
        raise UserError(
            f"data.root={folder}: {INDEX} does not fit the tar files ({wrong[0]} is missing, new or of another size); "
            f"copy them again, or remove {INDEX} to use them as they are"
        )
    return members


def _cached_index(folder: Path, paths: list[Path]) -> dict[str, list[Member]]:
    """What is in tar files without an index, scanned again when they changed."""
    cached = cache_path("shards", folder)
    kept = (read_cache(cached) or {}).get("shards", {})
    stamps = {path.name: [path.stat().st_size, *stamp(path)] for path in paths}
    known = {name: kept[name]["members"] for name in stamps if kept.get(name, {}).get("stamp") == stamps[name]}
    found = {
        path.name: [Member(*member) for member in known[path.name]] if path.name in known else scan(path)
        for path in paths
    }
    if known.keys() != found.keys():
        shards = {name: {"stamp": stamps[name], "members": members} for name, members in found.items()}
        write_cache(cached, {"root": str(folder.absolute()), "shards": shards})
    return found


def _samples(shard: Path, members: list[Member]) -> Iterator[Packed]:
    """Members in a row that have the same key, if an image is among them (the first one is taken)."""
    for _, group in groupby(members, key=lambda member: member.key):
        beside = {member.extension.lower(): member for member in reversed(list(group))}
        images = [member for extension, member in beside.items() if f".{extension}" in IMAGE_EXTENSIONS]
        if images:
            image = min(images, key=lambda member: member.offset)
            yield Packed(shard, image, beside.get(CAPTION), beside.get(FEATURES))
