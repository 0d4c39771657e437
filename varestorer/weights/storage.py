"""A checkpoint on the disk: written aside, synced, renamed; checked by size and SHA-256 when read.

Layout of a checkpoint folder: `*.safetensors` for tensors, `state.json` for everything else and
`checksums.json` with `{file: {"size", "sha256"}}` of the others.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from varestorer.utils.errors import UserError, reason
from varestorer.utils.files import file_sha256, sync, temporary_path, utf8_path
from varestorer.utils.finite import check_weights

CHECKSUMS = "checksums.json"
STATE = "state.json"


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside `target`; seal it with checksums and rename it when the block ends well.

    Raises:
        UserError: it cannot be written (disk full, no permission); names the folder. Older ones stay.
    """
    temporary = temporary_path(target)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _seal(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        sync(target.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors reports a full disk as an error of its own, with the system's words in it
        if isinstance(error, OSError) or "No space left on device" in str(error):
            raise UserError(
                f"cannot write {target}: {reason(error)}; older checkpoints are untouched: check the folder and its "
                "free space, then go on with resume=auto"
            ) from error
        raise


def remove_leftovers(*folders: Path) -> None:
    """Remove what a process that was killed while writing left in these folders, half a file or checkpoint."""
    for folder in folders:
        for leftover in folder.glob(".*.tmp*"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors from any device to a safetensors file; tensors that share memory are written apart."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        apart[name] = plain.clone() if storage in seen else plain
        seen.add(storage)
    save_file(apart, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU.

    Raises:
        UserError: the file cannot be read, is damaged, or holds numbers that are not finite.
    """
    try:
        with utf8_path(path) as plain:
            tensors = load_file(plain)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}; bring back a good copy of it") from error
    check_weights(tensors, str(path))
    return tensors


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a small JSON file."""
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words; None if it is whole."""
    try:
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in read_json(folder / CHECKSUMS).items()}
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS}: {reason(error)}"
    except (AttributeError, KeyError, TypeError):
        return f"{CHECKSUMS} does not list files"
    if STATE not in expected:
        return f"{CHECKSUMS} does not list {STATE}"
    return next(filter(None, (_file_damage(folder / name, *entry) for name, entry in expected.items())), None)


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _file_damage(path: Path, size: int, sha256: str) -> str | None:
    try:
        if path.stat().st_size != size:
            return f"{path.name} has {path.stat().st_size} bytes, should have {size}"
        return None if file_sha256(path) == sha256 else f"{path.name} does not match its checksum"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror or reason(error)}"
    except UserError as error:
        return str(error)


def _seal(folder: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    sums = {path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in files}
    write_json(folder / CHECKSUMS, sums)
    _sync_all([*files, folder / CHECKSUMS, folder])


def _sync_all(paths: Iterable[Path]) -> None:
    for path in paths:
        sync(path)
