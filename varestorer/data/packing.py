"""Packing a folder of photographs into webdataset shards.

The same photographs give the same bytes: members in natural order of the names, no times and no owners. Photographs
are kept as the files they are.
"""

import io
import logging
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count
from pathlib import Path, PurePosixPath

import torch
from safetensors.torch import save
from tqdm.auto import tqdm

from varestorer.data.folders import hq_images
from varestorer.data.shards import CAPTION, FEATURES, INDEX, Member, scan, tar_files, write_index
from varestorer.data.text import CAPTIONS, PhotoTexts, open_texts, photograph_names, read_captions
from varestorer.utils.errors import UserError
from varestorer.utils.files import atomic_write, expand_user
from varestorer.utils.image_files import open_image

log = logging.getLogger(__name__)

Content = tuple[str, Callable[[], bytes]]


@dataclass
class Packing:
    """What was made: what is in each tar file, what is wrong with each photograph left out, and how many are packed."""

    shards: dict[str, list[Member]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    num_photographs: int = 0


@dataclass(frozen=True)
class _Sample:
    """A photograph and what goes with it: extension and content of each member."""

    key: str
    size: int
    contents: list[Content]


def pack(out: Path, source: Path, shard_bytes: int, text: str | None = None) -> Packing:
    """Write `shard-000000.tar`, `shard-000001.tar`, ... and their index into a folder, made if it is not there.

    A shard that is there already, from an interrupted run, is kept if it holds these very bytes.

    Args:
        source: photographs, as `hq_images` finds them; those that cannot be opened are left out and named.
        shard_bytes: a shard is closed before it would get larger than this.
        text: folder of `precompute_text`: captions and features go into the shards too.
    Raises:
        UserError: nothing to pack, the folder holds other tar files, or it cannot be written.
    """
    packing = Packing()
    samples = _samples(source, text, packing)
    if not samples:
        raise UserError(f"none of the images of source={source} can be opened: {packing.skipped[0]}")
    plan = {f"shard-{number:06}.tar": group for number, group in enumerate(_groups(samples, shard_bytes))}
    others = [path.name for path in (tar_files(out) if out.is_dir() else []) if path.name not in plan]
    if others:
        raise UserError(f"shard={out} holds other tar files ({others[0]}, ...); give a folder of its own")
    (out / INDEX).unlink(missing_ok=True)
    for name, group in tqdm(plan.items(), desc="shards", unit="shard", disable=None):
        packing.shards[name] = _kept(out / name, group) or _write(out / name, group)
    packing.num_photographs = len(samples)
    write_index(out, packing.shards)
    return packing


def _samples(source: Path, text: str | None, packing: Packing) -> list[_Sample]:
    """What to pack, in order; notes what has to be left out."""
    paths = hq_images(source)
    names = photograph_names(source, paths)
    texts = open_texts(text, source, paths)
    file = None if text is None else expand_user(text) / CAPTIONS
    captions = read_captions(file) if file is not None and file.is_file() else {}
    keys: set[str] = set()
    samples = []
    for number, (name, path) in enumerate(zip(names, paths, strict=True)):
        try:
            with open_image(path):
                pass
        except UserError as error:
            packing.skipped.append(str(error))
            continue
        # the last part of a key has no dot, where webdataset would end it
        stem = (PurePosixPath(name).parent / PurePosixPath(name).stem.replace(".", "_")).as_posix()
        key = next(key for key in chain([stem], (f"{stem}_{n}" for n in count(2))) if key not in keys)
        keys.add(key)
        contents: list[Content] = [(path.suffix[1:].lower(), path.read_bytes)]
        if name in captions:
            contents.append((CAPTION, captions[name].encode))
        if texts is not None and texts.shards[number] is not None:
            contents.append((FEATURES, partial(_packed, texts, number)))
        samples.append(_Sample(key, path.stat().st_size, contents))
    return samples


def _packed(texts: PhotoTexts, number: int) -> bytes:
    """Safetensors bytes of a photograph's features, in the shortest type that holds the values exactly."""
    features_TE = texts[number]
    assert features_TE is not None
    half = (features_TE.to(dtype) for dtype in (torch.float16, torch.bfloat16))
    return save({"features": next((x for x in half if torch.equal(x.float(), features_TE)), features_TE)})


def _groups(samples: list[_Sample], shard_bytes: int) -> Iterator[list[_Sample]]:
    """Samples in a row whose photographs stay within `shard_bytes`, at least one each."""
    group: list[_Sample] = []
    total = 0
    for sample in samples:
        if group and total + sample.size > shard_bytes:
            yield group
            group, total = [], 0
        group.append(sample)
        total += sample.size
    yield group


def _kept(path: Path, group: list[_Sample]) -> list[Member] | None:
    """The members of a shard that is there and holds these photographs and texts, byte by byte; None otherwise."""
    if not path.is_file():
        return None
    try:
        members = scan(path)
    except UserError as error:
        log.warning("making it again: %s", error)
        return None
    wanted = [(sample.key, extension) for sample in group for extension, _ in sample.contents]
    if wanted != [(member.key, member.extension) for member in members]:
        return None
    contents = (read for sample in group for _, read in sample.contents)
    with path.open("rb") as file:
        for member, read in zip(members, contents, strict=True):
            file.seek(member.offset)
            if file.read(member.size) != read():
                return None
    return members


def _write(path: Path, group: list[_Sample]) -> list[Member]:
    with atomic_write(path) as temporary:
        with tarfile.open(temporary, "w:", format=tarfile.PAX_FORMAT) as file:
            for sample in group:
                for extension, read in sample.contents:
                    content = read()
                    info = tarfile.TarInfo(f"{sample.key}.{extension}")
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))
    return scan(path)
