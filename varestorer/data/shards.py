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
import posixpath
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
from varestorer.utils.decoding import decode_visible
from varestorer.utils.errors import UserError, reason
from varestorer.utils.files import read_text, write_json
from varestorer.utils.image_files import BROKEN_IMAGE_ERRORS
from varestorer.utils.images import IMAGE_EXTENSIONS
from varestorer.utils.scanning import (
    cache_path,
    first_names,
    is_skipped,
    natural_key,
    read_cache,
    report_unused,
    scan_folder,
    stamp,
    write_cache,
)

INDEX = "index.json"
FORMAT = "varestorer shards 1"
SHARDS_HELP = "a folder of webdataset shards (.tar), such as scripts/prepare_data.py shard=FOLDER makes"
CAPTION, FEATURES = "txt", "text.safetensors"
WHY_UNUSED = "a key ends at the first dot, and has one image: rename them, or pack their folder with shard=FOLDER"


class Member(NamedTuple):
    """A file inside a tar file: its name is `<key>.<extension>`, its bytes are `size` from `offset` on."""

    key: str
    extension: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        """As in the tar file."""
        return f"{self.key}.{self.extension}" if self.extension else self.key


@dataclass(frozen=True, slots=True)
class Packed:
    """A sample of a shard, which is a tar file: its photograph, and what is beside it, if anything."""

    shard: Path
    image: Member
    caption: Member | None = None
    features: Member | None = None

    @property
    def name(self) -> str:
        """Of the photograph, as in the folder it came from."""
        return self.image.name

    @property
    def stem(self) -> str:
        """Last part of the key."""
        return PurePosixPath(self.image.key).name

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"

    def read(self, member: Member) -> bytes:
        """The bytes of one of its members; UserError if the tar file cannot be read, or ends too early."""
        try:
            with self.shard.open("rb") as file:
                file.seek(member.offset)
                content = file.read(member.size)
        except OSError as error:
            raise UserError(f"cannot read the shard {self.shard}: {error.strerror or reason(error)}") from error
        if len(content) < member.size:
            raise UserError(f"the shard {self.shard} ends inside {member.name}; copy it again")
        return content

    def load(self) -> Tensor:
        """The photograph, (3, H, W) float32 in [0, 1]; UserError, with shard and member, if it cannot be decoded."""
        with self._opened() as file:
            return torch.from_numpy(decode_visible(file))

    def num_pixels(self) -> int:
        """Width times height, from the header; UserError as for `load`."""
        with self._opened() as file:
            return file.width * file.height

    def load_features(self) -> Tensor | None:
        """Features of its prompt, (T, E) float32; None for the null text. UserError if they are damaged."""
        if self.features is None:
            return None
        try:
            return load(self.read(self.features))["features"].float()
        except (SafetensorError, KeyError) as error:
            raise UserError(
                f"{self.shard}: the text features of {self.image.key} are damaged ({reason(error)})"
            ) from error

    @contextmanager
    def _opened(self) -> Iterator[ImageFile.ImageFile]:
        """The image without its pixels; what Pillow raises inside the block names shard and member too."""
        content = io.BytesIO(self.read(self.image))
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(content) as file:
                yield file
        except BROKEN_IMAGE_ERRORS as error:
            raise UserError(
                f"cannot read the image {self}: {reason(error)}; make the shard again without it"
            ) from error


def packed_photographs(root: str | Path) -> list[Packed]:
    """The samples of all shards of a folder, shards in natural order, samples as they lie.

    UserError: no folder, no tar file, one that is damaged or not what the index says, or no image.
    """
    folder = existing_folder(root, SHARDS_HELP)
    paths = tar_files(folder)
    if not paths:
        raise UserError(f"data.root={folder} holds no .tar file (compressed ones must be unpacked); give {SHARDS_HELP}")
    members = _own_index(folder, paths) or _cached_index(folder, paths)
    photographs: list[Packed] = []
    unused: list[str] = []
    for path in paths:
        samples, others = _samples(path, members[path.name])
        photographs += samples
        unused += (f"{path.name}:{member.name}" for member in others)
    images = [name for name in unused if PurePosixPath(name).suffix.lower() in IMAGE_EXTENSIONS]
    others_than_images = [name for name in unused if PurePosixPath(name).suffix.lower() not in IMAGE_EXTENSIONS]
    report_unused(folder, f"images of the shards are not used ({WHY_UNUSED})", images)
    report_unused(folder, "members of the shards are not used", others_than_images)
    if not photographs:
        problem = f" that is used: {first_names(images)} ({WHY_UNUSED})" if images else ""
        raise UserError(f"the shards of data.root={folder} hold no image{problem}; give {SHARDS_HELP}")
    return photographs


def tar_files(folder: Path) -> list[Path]:
    """The tar files that lie in a folder, in natural order; what else it holds is named in the log."""
    found = scan_folder(folder)
    found.check_readable()
    tars = [path for path in found.files if path.suffix.lower() == ".tar" and path.parent == folder]
    known = {*tars, folder / INDEX}
    others = [path.relative_to(folder).as_posix() for path in found.files + found.unused if path not in known]
    report_unused(folder, "files are not used, as no .tar or in a subfolder", others)
    return sorted(tars, key=lambda path: natural_key(path.name))


def scan(path: Path) -> list[Member]:
    """The files inside a tar file, as they lie; only headers are read. UserError: damaged, compressed or no tar file.

    A link has the place of the file that it leads to; one that leads to none in this tar file is empty.
    """
    try:
        with tarfile.open(path, "r:") as file:
            infos = [info for info in file if info.isreg() or info.islnk() or info.issym()]
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"cannot read the shard {path}: {reason(error)}; it must be a whole, uncompressed tar file"
        ) from error
    files = {posixpath.normpath(info.name): info for info in infos if info.isreg()}
    members = []
    for info in infos:
        folder = posixpath.dirname(info.name) if info.issym() else ""
        target = posixpath.join(folder, info.name if info.isreg() else info.linkname)
        # a key ends at the first dot of the last part of the name
        folder, slash, base = info.name.removeprefix("./").rpartition("/")
        stem, _, extension = base.partition(".")
        content = files.get(posixpath.normpath(target))
        place = (content.offset_data, content.size) if content else (0, 0)
        members.append(Member(folder + slash + stem, extension, *place))
    return members


def write_index(folder: Path, shards: dict[str, list[Member]]) -> None:
    """Leave beside the shards the list of what is where in them, the same bytes for the same shards."""
    content = {
        "format": FORMAT,
        "shards": {name: (folder / name).stat().st_size for name in shards},
        "columns": ["shard", "key", "extension", "offset", "size"],
        "members": [[name, *member] for name, members in shards.items() for member in members],
    }
    write_json(folder / INDEX, content)


def _own_index(folder: Path, paths: list[Path]) -> dict[str, list[Member]] | None:
    """The index that `write_index` left, None if there is none; UserError if it does not belong to these tar files."""
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


def _samples(shard: Path, members: list[Member]) -> tuple[list[Packed], list[Member]]:
    """Members in a row that have the same key, if an image is among them (the first one is taken).

    Returns:
        the samples, and the members that belong to none but for what `scanning.is_skipped`.
    """
    samples: list[Packed] = []
    unused: list[Member] = []
    visible = (member for member in members if not any(map(is_skipped, member.name.split("/"))))
    for _, group in groupby(visible, key=lambda member: member.key):
        alike = list(group)
        beside = {member.extension.lower(): member for member in reversed(alike)}
        images = [member for extension, member in beside.items() if f".{extension}" in IMAGE_EXTENSIONS]
        used: list[Member | None] = []
        if images:
            image = min(images, key=lambda member: member.offset)
            used = [image, beside.get(CAPTION), beside.get(FEATURES)]
            samples.append(Packed(shard, image, used[1], used[2]))
        unused += (member for member in alike if not any(member is one for one in used))
    return samples, unused
