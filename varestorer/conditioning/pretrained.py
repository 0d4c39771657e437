"""Loading transformers models from a folder or the hub, with errors a newcomer can act on."""

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from varestorer.utils.device import free_memory
from varestorer.utils.errors import UserError, reason
from varestorer.utils.hub import asking_hub, fetch_folder, is_hub_name, split_revision

Loaded = TypeVar("Loaded")

_SMALL_FILES = (".json", ".model", ".txt")
_WEIGHTS = (".safetensors", ".bin")
_MIB = 2**20


class Pretrained:
    """A network of transformers, with what prepares its input, that is loaded when it is first needed.

    Args:
        path: folder as transformers saves it, or a name on the hub.
        device: where it runs.
    """

    default: ClassVar[str]
    key: ClassVar[str]

    def __init__(self, path: str, device: torch.device | str) -> None:
        self.path = str(path)
        self.device = torch.device(device)
        self._loaded: tuple[Any, Any] | None = None

    def _open(self, path: str) -> tuple[Any, Any]:
        """What prepares the input, and the network, from a folder."""
        raise NotImplementedError

    @cached_property
    def _folder(self) -> Path:
        # of a name on the hub transformers would ask file by file, and retry each for half a minute without network
        return local_folder(self.path, self.default, self.key)

    def release(self) -> None:
        """Give the memory back; the network is loaded again when it is needed."""
        self._loaded = None
        free_memory(self.device)

    def _load(self) -> tuple[Any, Any]:
        """Both parts, loaded once; UserError where there is nothing that can be loaded."""
        if self._loaded is None:
            first, network = load_pretrained(self._open, str(self._folder), self.default, self.key)
            self._loaded = first, network.eval().requires_grad_(False).to(self.device)
        return self._loaded


def load_pretrained(load: Callable[[str], Loaded], path: str, default: str, key: str) -> Loaded:
    """Call `load(path)` and turn what transformers raises into one line.

    Args:
        load: loads from a folder or a hub name, e.g. `T5EncoderModel.from_pretrained`.
        path: the folder or hub name.
        default: hub name of what is expected there, for the message.
        key: configuration key that holds `path`, for the message.
    Raises:
        UserError: nothing there, or nothing that can be loaded.
    """
    _check_place(path, default, key)
    try:
        return load(path)
    except (OSError, ValueError, KeyError) as error:
        why = reason(error)
        raise UserError(f"{key}={path} cannot be loaded as {default} ({why}); {_remedy(default, key)}") from error


def local_folder(path: str, default: str, key: str) -> Path:
    """The folder itself, or the local copy of a model on the hub, downloaded if it is not there yet.

    Arguments are those of `load_pretrained`. UserError: no such folder, or the hub cannot give it.
    """
    if Path(path).is_dir():
        return Path(path)
    _check_place(path, default, key)
    name, revision = split_revision(path)
    with asking_hub(f"{key}={path}", remedy=_remedy(default, key)):
        # the hub keeps the same weights for several frameworks: take one copy of them
        folder = fetch_folder(name, [f"*{end}" for end in (*_SMALL_FILES, _WEIGHTS[0])], revision=revision)
        if any(folder.glob(f"*{_WEIGHTS[0]}")):
            return folder
        return fetch_folder(name, [f"*{end}" for end in (*_SMALL_FILES, *_WEIGHTS)], revision=revision)


def _check_place(path: str, default: str, key: str) -> None:
    if not Path(path).is_dir() and not is_hub_name(path):
        raise UserError(f"{key} must be a folder or a hub name, but {path} does not exist; {_remedy(default, key)}")


def _remedy(default: str, key: str) -> str:
    return f"download {default} (varestorer models get {default}), or set {key} to its folder"


def fingerprint(folder: Path) -> str:
    """Hash of a model's folder that is another one when its weights, its tokenizer or its config are others.

    Config and tokenizer are hashed whole. Of a file of weights count its size and its first, middle and last
    MiB: reading all 11 GB of flan-t5-xl takes longer than restoring an image, and training or rounding a
    network changes numbers everywhere, so three places tell as much. A file that was damaged elsewhere is not
    noticed.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in (*_SMALL_FILES, *_WEIGHTS) or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{len(path.name)}:{path.name}:{size};".encode())
        with path.open("rb") as file:
            if path.suffix in _SMALL_FILES or size <= 3 * _MIB:
                digest.update(file.read())
                continue
            for start in (0, (size - _MIB) // 2, size - _MIB):
                file.seek(start)
                digest.update(file.read(_MIB))
    return digest.hexdigest()
