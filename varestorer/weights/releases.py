"""Published files by name: what is known of them (`weights.lock`), and fetching them into the hub's cache."""

from __future__ import annotations

import logging
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from varestorer.utils.errors import UserError
from varestorer.utils.files import check_room, file_sha256, in_bytes
from varestorer.utils.hub import CACHE_OPTIONS, asking_hub

LOG = logging.getLogger(__name__)
LOCK = Path(__file__).with_name("weights.lock")
HUB = "hub"
"""`hub/NAME` is a published file, wherever a file of weights is asked for (and so `weights_dir=hub` in training)."""


@dataclass(frozen=True)
class PublishedFile:
    """A file, or a whole repository, that somebody published.

    `hub` is its repository, `path` its place there, empty for all of it; the license is as far as it was read; the
    SHA-256 and the size (bytes) are there where they are known.
    """

    name: str
    hub: str
    what: str
    license: str
    path: str = ""
    sha256: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class Release:
    """Files that make a whole: the repository that is asked for, the paper's system, the files, the network's first.

    `needs` is what else it wants at times.
    """

    name: str
    system: str
    files: tuple[str, ...]
    needs: str = ""


@cache
def lock() -> dict[str, Any]:
    """The content of `weights.lock`."""
    return tomllib.loads(LOCK.read_text(encoding="utf-8"))


def published_files() -> dict[str, PublishedFile]:
    """All known files by their names."""
    return {name: PublishedFile(name, **({"path": name} | entry)) for name, entry in lock()["file"].items()}


def releases() -> dict[str, Release]:
    """All known releases by their names on the hub."""
    entries = lock()["release"].items()
    return {name: Release(name, **(entry | {"files": tuple(entry["files"])})) for name, entry in entries}


def cached(file: PublishedFile, options: Mapping[str, Any] | None = None, revision: str | None = None) -> Path | None:
    """Where a file (of a repository its `config.json`) is in the hub's cache; None if it is not. Nobody is asked.

    Of the hub's options `cache_dir` counts.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = (options or {}).get("cache_dir")
    found = try_to_load_from_cache(file.hub, file.path or "config.json", cache_dir=folder, revision=revision)
    return Path(found) if isinstance(found, str) else None


def fetch(names: Sequence[str], options: Mapping[str, Any] | None = None, revision: str | None = None) -> list[Path]:
    """Published files from the hub's cache; those that are not there are fetched, their sizes said first, and checked.

    Options are huggingface_hub's `cache_dir`, `token`, `local_files_only` and `force_download`; the revision is that of
    the first file's repository, others are taken as they are now. UserError: an unknown name, a hub that does not give
    one, no room for it, or a file that came damaged.
    """
    options, known = options or {}, published_files()
    if unknown := [name for name in names if name not in known or not known[name].path]:
        there = ", ".join(name for name, file in known.items() if file.path)
        raise UserError(f"{unknown[0]} is no published file that is known here; there are {there}")
    files = [known[name] for name in names]
    revisions = {file.name: revision if file.hub == files[0].hub else None for file in files}
    paths = {file.name: cached(file, options, revisions[file.name]) for file in files}
    missing = [file for file in files if paths[file.name] is None or options.get("force_download")]
    if missing:
        _say_sizes(missing, options, revisions)
    paths |= {file.name: _download(file, options, revisions[file.name]) for file in missing}
    return [path for path in paths.values() if path is not None]


def _say_sizes(files: Sequence[PublishedFile], options: Mapping[str, Any], revisions: Mapping[str, str | None]) -> None:
    """Say what will be fetched; UserError if the hub does not have it, or the disk no room for it."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import LocalEntryNotFoundError

    sizes = {}
    for file in files:
        with asking_hub(f"{file.path} of {file.hub}"):
            if options.get("local_files_only") or constants.HF_HUB_OFFLINE:
                raise LocalEntryNotFoundError(file.name)
            url = hf_hub_url(file.hub, file.path, revision=revisions[file.name])
            sizes[file.name] = get_hf_file_metadata(url, token=options.get("token")).size or file.size or 0
    shown = ", ".join(
        f"{file.name} {in_bytes(sizes[file.name])} ({file.hub}; license: {file.license})" for file in files
    )
    LOG.info("fetching %s: %s", in_bytes(sum(sizes.values())), shown)
    check_room(Path(options.get("cache_dir") or constants.HF_HUB_CACHE), sum(sizes.values()))


def _download(file: PublishedFile, options: Mapping[str, Any], revision: str | None) -> Path:
    """One file into the cache; a transfer that breaks off is taken up where it was.

    UserError: it does not come, or came damaged (and is removed again).
    """
    from huggingface_hub import hf_hub_download

    wanted = {key: options[key] for key in (*CACHE_OPTIONS, "force_download") if key in options}
    with asking_hub(f"{file.path} of {file.hub}"):
        path = Path(hf_hub_download(file.hub, file.path, revision=revision, **wanted))
    blob, digest = path.resolve(), file_sha256(path)
    # the hub names a large file by its SHA-256, and the cache keeps it under that name
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and blob.name != digest:
        blob.unlink()
        path.unlink(missing_ok=True)
        raise UserError(f"{file.name} of {file.hub} came damaged (SHA-256 {digest[:8]}, not {blob.name[:8]}) and was "
                        "removed; start the command again")  # fmt: skip
    if file.sha256 not in (None, digest):
        LOG.warning("%s of %s is another file than the one known here (SHA-256 %s)", file.name, file.hub, digest[:8])
    return path


def of_metric(entry: str) -> tuple[str, str | None, str]:
    """Where a file of `utils.iqa_weights.WEIGHT_FILES` is from, its SHA-256 or a beginning of it, its license."""
    table: dict[str, dict[str, Any]] = lock()["metrics"]
    known = table[max((start for start in table if entry.startswith(start)), key=len)]
    name = entry.rpartition("/")[2]
    if entry.startswith("hf:"):
        return f"hub {entry.removeprefix('hf:')}", None, known["license"]
    begins = re.search(r"-([0-9a-f]{8})\.\w+$", name)
    digest = known.get("sha256", {}).get(name) or (begins[1] if begins else None)
    address = f"hub {known['hub']}" if "hub" in known else known["address"].format(sha256=digest) + name
    return address, digest, known["license"]
