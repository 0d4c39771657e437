"""Writing colors of 16 bits, which Pillow cannot."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

ROWS = 64  # that are packed at once


def write_16_bits(path: Path, array_HWC: np.ndarray, options: dict[str, Any]) -> None:
    """Write uint16 gray with alpha, RGB or RGBA as PNG or TIFF, as the path's suffix says; OSError if it cannot be.

    Options are those of Pillow's writers; of EXIF a TIFF gets what it has tags of its own for.
    """
    if path.suffix.lower() == ".png":
        with path.open("wb") as file:
            file.writelines(_png(array_HWC, options))
        return
    import tifffile

    exif = Image.Exif()
    exif.load(options.get("exif", b""))
    own = (ExifTags.Base.Make, ExifTags.Base.Model, ExifTags.Base.Artist, ExifTags.Base.Copyright)
    tifffile.imwrite(
        path,
        array_HWC,
        photometric="rgb" if array_HWC.shape[2] >= 3 else "minisblack",
        extrasamples=["unassalpha"] if array_HWC.shape[2] in (2, 4) else None,
        planarconfig="contig",
        compression="zlib",
        iccprofile=options.get("icc_profile"),
        software=exif.get(ExifTags.Base.Software, False),
        datetime=exif.get(ExifTags.Base.DateTime),
        resolution=options.get("dpi"),
        resolutionunit="inch" if "dpi" in options else None,
        metadata=None,
        extratags=[(int(tag), "s", 0, str(exif[tag]), True) for tag in own if tag in exif],
    )


def _png(array_HWC: np.ndarray, options: dict[str, Any]) -> Iterator[bytes]:
    """The file, part by part, so that it is never held whole."""
    height, width, channels = array_HWC.shape
    color = {2: 4, 3: 2, 4: 6}[channels]
    yield b"\x89PNG\r\n\x1a\n"
    yield _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0))
    if "icc_profile" in options:
        yield _chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(options["icc_profile"]))
    if "dpi" in options:
        yield _chunk(b"pHYs", struct.pack(">IIB", *(round(value / 0.0254) for value in options["dpi"]), 1))
    if "exif" in options:
        yield _chunk(b"eXIf", options["exif"].removeprefix(b"Exif\0\0"))
    for kind, data, *_ in options["pnginfo"].chunks if "pnginfo" in options else []:
        yield _chunk(kind, data)
    packer, above = zlib.compressobj(), np.zeros((1, 2 * width * channels), np.uint8)
    for first in range(0, height, ROWS):
        rows = np.ascontiguousarray(array_HWC[first : first + ROWS], dtype=">u2").view(np.uint8).reshape(-1, above.size)
        filtered = np.full((len(rows), above.size + 1), 2, dtype=np.uint8)  # 2: each byte less the one above
        filtered[:, 1:] = rows - np.concatenate([above, rows[:-1]])
        yield _chunk(b"IDAT", packer.compress(filtered.tobytes()))
        above = rows[-1:]
    yield _chunk(b"IDAT", packer.flush())
    yield _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
