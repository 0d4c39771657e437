"""Text features on the disk, so that a prompt is encoded once and the text encoder is not loaded for it again.

Letters: `T` tokens of the prompt, `E` width of the text encoder.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from varestorer.utils.errors import UserError
from varestorer.utils.files import atomic_write, utf8_path

logger = logging.getLogger(__name__)

CacheKey = Mapping[str, str | int | bool]
"""All that features depend on, by name."""

_NAME = "features"


class TextCache:
    """One safetensors file for each set of features, named by the hash of all that they depend on.

    Trouble with the disk is a warning and never an error: the features can be computed without it.

    Args:
        folder: of the files; made when it is first written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._is_writable = True

    def path(self, key: CacheKey) -> Path:
        """The file of a key, which need not exist."""
        return self.folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.safetensors"

    def read(self, key: CacheKey) -> Tensor | None:
        """Features (T, E) of a key; None if they are not there, or damaged."""
        path = self.path(key)
        try:
            with utf8_path(path) as plain, safe_open(plain, "pt") as file:
                features_TE = file.get_tensor(_NAME)
                checksum = (file.metadata() or {}).get("sha256")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            logger.warning("the cached text features %s cannot be read and are made again (%s)", path, error)
            return None
        if checksum != _checksum(features_TE):
            logger.warning("the cached text features %s are damaged and are made again", path)
            return None
        return features_TE

    def write(self, key: CacheKey, features_TE: Tensor) -> None:
        """Keep the features (T, E) of a key."""
        if not self._is_writable:
            return
        features_TE = features_TE.cpu().contiguous()
        about = {"key": json.dumps(key, sort_keys=True), "sha256": _checksum(features_TE)}
        try:
            with atomic_write(self.path(key)) as temporary:
                save_file({_NAME: features_TE}, temporary, metadata=about)
        except UserError as error:
            self._is_writable = False  # say it once
            logger.warning("text features are not cached: %s (VARESTORER_CACHE names another folder)", error)


def _checksum(features_TE: Tensor) -> str:
    return hashlib.sha256(features_TE.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
