"""Fingerprints of test sets: SHA-256 of the pixels, so that two copies can be compared without moving them.

Hashes are of pixels, not of files: the same picture compressed by another version of zlib is another file.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor

from varestorer.utils.errors import UserError, reason
from varestorer.utils.files import name_bytes, read_text, write_json

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class MadePair:
    """One pair of a made set.

    Attributes:
        source: the photograph, by its path inside its folder.
        top, left: where the crop lies in it, pixels.
        lr, hr: hashes of the pixels.
    """

    source: str
    top: int
    left: int
    lr: str
    hr: str


@dataclass
class Manifest:
    """What a made set is and how it was made; `manifest.json` in its folder.

    Attributes:
        options: what was asked for.
        versions: of what computed it.
        skipped: photographs left out, with the reason.
        pairs: by name.
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
    def load(cls, path: str | os.PathLike) -> "Manifest":
        """Read a file that `save` wrote.

        Raises:
            UserError: it cannot be read, or is something else.
        """
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
