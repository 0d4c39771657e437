"""Text features of photographs on the disk, so that training needs neither captioner nor text encoder.

A folder of them holds `captions.json` (name -> text, to be read and corrected), `index.json` (the encoder; name ->
prompt and shard) and `shards/*.safetensors` (name -> features of a few hundred photographs). A name is a photograph's
path inside the folder of good images, with forward slashes and its extension.

Letters: `T` tokens of the prompt, `E` width of the text encoder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from varestorer.data.folders import hq_folder
from varestorer.utils.errors import UserError, reason
from varestorer.utils.files import atomic_write, expand_user, printable, read_text, sync, utf8_path, write_json
from varestorer.utils.scanning import first_names

log = logging.getLogger(__name__)

CAPTIONS = "captions.json"
INDEX = "index.json"
MADE_BY = ("fingerprint", "max_length", "dtype")


@dataclass(frozen=True)
class EncoderRecord:
    """What features depend on beside the prompt.

    The text encoder as it was asked for, and a fingerprint of its files; the longest prompt, in tokens; and in which of
    `fp16`, `bf16` or `fp32` the features are kept.
    """

    text_encoder: str
    fingerprint: str
    max_length: int
    dtype: str


class Entry(NamedTuple):
    """A photograph in the index: its prompt and the file of its features, None for the empty prompt."""

    prompt: str
    shard: str | None


class TextWriter:
    """Writes features shard by shard into a folder, made if it is not there; a writer that is opened again goes on.

    UserError: the folder holds features of another encoder or type, or its index is damaged.
    """

    def __init__(self, folder: Path, encoder: EncoderRecord) -> None:
        self.folder, self.encoder = folder, encoder
        self.images: dict[str, Entry] = {}
        if (folder / INDEX).exists():
            earlier, self.images = _read_index(folder)
            keys = [key for key in MADE_BY if earlier.get(key) != getattr(encoder, key)]
            if keys:
                shown = [key if key != "fingerprint" else "text_encoder" for key in keys]
                others = ", ".join(f"{key} ({earlier.get(key)})" for key in shown)
                raise UserError(
                    f"out={folder} holds features that were made with another {others}; give another out, "
                    f"or remove {INDEX} and shards there ({CAPTIONS} can stay)"
                )

    def pending(self, captions: Mapping[str, str]) -> list[str]:
        """Names whose features are not there, or are those of another prompt."""
        shards = {entry.shard for entry in self.images.values()}
        there = {shard for shard in shards if shard is None or (self.folder / shard).is_file()}
        held = {name: entry.prompt for name, entry in self.images.items() if entry.shard in there}
        return [name for name, prompt in captions.items() if held.get(name) != prompt]

    def add(self, prompts: Mapping[str, str], features: Mapping[str, Tensor]) -> None:
        """Write one more shard, then the index that names it; features (T, E) are of the prompts that are not empty.

        UserError: the disk is full, or the like.
        """
        shard = None
        if features:
            # the first number above all that the index names; a file of it is left over from an interruption
            used = [int(Path(entry.shard).stem) for entry in self.images.values() if entry.shard]
            shard = f"shards/{max(used, default=-1) + 1:05}.safetensors"
            with atomic_write(self.folder / shard) as temporary:
                save_file({printable(name): tensor.contiguous() for name, tensor in features.items()}, temporary)
                sync(temporary)  # the index must not outlive its shards when the power fails
        self.images |= {name: Entry(prompt, shard if name in features else None) for name, prompt in prompts.items()}
        content = {
            "encoder": asdict(self.encoder),
            "images": {name: entry._asdict() for name, entry in self.images.items()},
        }
        write_json(self.folder / INDEX, content)


class PhotoTexts:
    """Features of the photographs of a data set, in the order of their numbers, read from mapped shards at their turn.

    UserError: no such folder (as `TextWriter` leaves it), a shard is missing, or there is text for none of them.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, list(names)
        encoder, images = _read_index(folder)
        missing = [name for name in self.names if name not in images]
        shown = first_names(missing)
        if len(missing) == len(self.names):
            raise UserError(
                f"data.text={folder} holds text for none of the photographs ({shown}); was it made from data.root?"
            )
        if missing:
            text = "data.text=%s holds no text for %d of %d photographs (%s): they train on the null text"
            log.warning(text, folder, len(missing), len(self.names), shown)
        self.shards = [images[name].shard if name in images else None for name in self.names]
        for shard in sorted({shard for shard in self.shards if shard is not None}):
            if not (folder / shard).is_file():
                raise UserError(f"data.text={folder}: {shard} is missing; start precompute_text again, it makes it")
        made = {key: encoder.get(key) for key in MADE_BY}
        self._contents = {"text encoder": json.dumps(made)}
        for name in self.names:
            prompt = images[name].prompt if name in images else None
            self._contents[f"text of {name}"] = hashlib.sha256(json.dumps(prompt).encode()).hexdigest()
        self._open: dict[str, Any] = {}

    def contents(self) -> dict[str, str]:
        """What tells these texts from others."""
        return self._contents

    def __getitem__(self, index: int) -> Tensor | None:
        """Features (T, E) float32 of a photograph; None where the null text stands for it.

        UserError: the shard is damaged; names it.
        """
        shard, name = self.shards[index], self.names[index]
        if shard is None:
            return None
        path = self.folder / shard
        try:
            if shard not in self._open:
                with utf8_path(path) as plain:
                    self._open[shard] = safe_open(plain, "pt")
            # a copy: a worker that hands over a view would hand over the whole shard
            return self._open[shard].get_tensor(printable(name)).to(torch.float32, copy=True)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"data.text: cannot read the features of {name} in {path} ({reason(error)}); remove that file and "
                "start precompute_text again, it makes it"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files, for workers that are not forks."""
        return self.__dict__ | {"_open": {}}


def open_texts(folder: str | None, root: str | os.PathLike | None, paths: Sequence[Path]) -> PhotoTexts | None:
    """The texts of good images `paths` of the data set at `root`; None where none are asked for.

    UserError: see `PhotoTexts`; or text is asked for photographs without a folder.
    """
    if folder is None:
        return None
    if root is None:
        raise UserError(f"data.text={folder} needs data.root: the embedded photographs have no text")
    return PhotoTexts(expand_user(folder), photograph_names(root, paths))


def photograph_names(root: str | os.PathLike, paths: Sequence[Path]) -> list[str]:
    """Names of good images: their paths inside the folder that holds them, which may be `hr` and the like in `root`."""
    folder = hq_folder(root)
    return [path.relative_to(folder).as_posix() for path in paths]


def read_captions(path: Path) -> dict[str, str]:
    """Captions of a JSON file `{name: text}`, with single spaces between words.

    UserError: the file is missing, damaged, or of another form.
    """
    wanted = 'a JSON object {"name": "text"}'
    captions = _read_json(path, wanted)
    wrong = [name for name, text in captions.items() if not isinstance(text, str)]
    if wrong:
        raise UserError(f"{path}: wanted {wanted}, but the value of {wrong[0]!r} is no text")
    return {name: plain_text(text) for name, text in captions.items()}


def plain_text(text: str) -> str:
    """One line, single spaces between words."""
    return " ".join(text.split())


def write_captions(path: Path, captions: Mapping[str, str]) -> None:
    """Write captions, one a line."""
    write_json(path, captions, indent=1)


def _read_index(folder: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The encoder and the photographs of an index; UserError if it is missing, damaged, or something else."""
    path = folder / INDEX
    wanted = "the index of text features that scripts/precompute_text.py writes"
    content = _read_json(path, wanted)
    try:
        return dict(content["encoder"]), {name: Entry(**entry) for name, entry in content["images"].items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: wanted {wanted}, got something else; remove it") from error


def _read_json(path: Path, wanted: str) -> dict[str, Any]:
    """A JSON object; UserError that says what is `wanted` if it is none."""
    try:
        content = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; wanted {wanted}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({reason(error)}); wanted {wanted}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: wanted {wanted}, got a JSON {type(content).__name__}")
    return content
