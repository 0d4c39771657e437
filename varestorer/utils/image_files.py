"""Opening picture files: what is no picture, damaged or too large is named in one line before it is decoded.

And writing colors of 16 bits, which Pillow cannot.
"""

import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from varestorer.utils.errors import UserError, reason

# what Pillow raises for files that are not, or not wholly, pictures
BROKEN_IMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    RuntimeError,
    EOFError,
    TypeError,
    AttributeError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

_ONE_AT_A_TIME = RLock()
ROWS = 64  # of 16-bit colors, that are packed at once

HEIC = (".heic", ".heif")
HEIC_HINT = "HEIC is read through pillow-heif: pip install pillow-heif (the extra [heic]), or convert it to JPEG"


try:
    import pillow_heif

    pillow_heif.register_heif_opener()
    READS_HEIC = True
except ImportError:
    READS_HEIC = False


class RefusedImageError(ValueError):
    """A file that is no use, though Pillow might not mind; the message says why and what to do."""


@contextmanager
def open_image(path: str | os.PathLike, max_pixels: int | None = None) -> Iterator[ImageFile.ImageFile]:
    """Open a picture file without decoding it; what Pillow raises inside the block names the file too.

    Pillow's warnings (of sizes, of damaged metadata) are not shown: the result or the error says it. Threads wait for
    each other: warnings and Pillow's limit of pixels are global. Pictures larger than `max_pixels` are refused; None:
    where Pillow itself raises (about 179 million pixels). UserError: missing, unreadable, empty, truncated, no picture,
    or too large; one line with a remedy.
    """
    path = Path(path)
    try:
        _check_file(path)
        if path.suffix.lower() in HEIC and not READS_HEIC:
            raise RefusedImageError(HEIC_HINT)
        with _ONE_AT_A_TIME, warnings.catch_warnings(action="ignore"), _open(path, max_pixels) as file:
            yield file
    except FileNotFoundError as error:
        link = f" (a link to {path.readlink()}, which is not there)" if path.is_symlink() else ""
        raise UserError(f"no such image: {path}{link}") from error
    except BROKEN_IMAGE_ERRORS as error:
        raise UserError(f"cannot read the image {path}: {_reason(error)}") from error


def _check_file(path: Path) -> None:
    """Refuse what must not even be opened: reading from a pipe, for one, would wait for ever."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise RefusedImageError("it is a folder; give a file")
    if not stat.S_ISREG(status.st_mode):
        raise RefusedImageError("it is a pipe, a socket or a device; give a regular file")
    if status.st_size == 0:
        raise RefusedImageError("the file is empty; copy it again or remove it")


def _open(path: Path, max_pixels: int | None) -> ImageFile.ImageFile:
    """Open a file and compare its number of pixels with the limit."""
    pillows = Image.MAX_IMAGE_PIXELS
    # Pillow compares with this global, so nothing else can allow more; it raises at twice its value
    Image.MAX_IMAGE_PIXELS = None
    try:
        file = Image.open(path)
    finally:
        Image.MAX_IMAGE_PIXELS = pillows
    limit = max_pixels if max_pixels is not None or pillows is None else 2 * pillows
    pixels = file.width * file.height
    if limit is None or pixels <= limit:
        return file
    file.close()
    raise RefusedImageError(
        f"it has {file.width} x {file.height} = {pixels} pixels, more than the limit of {limit}; "
        f"if you trust the file, allow it with max_pixels={pixels}"
    )


def _reason(error: Exception) -> str:
    """What is wrong with a file, and what to do about it, in one line."""
    if isinstance(error, RefusedImageError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return (
            "it holds no picture in a known format, or a damaged one, or one of zero pixels; "
            "copy it again, convert it to PNG or remove it"
        )
    if isinstance(error, PermissionError):
        return "no permission to read it; change that (chmod +r) or remove it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"it is truncated or damaged ({reason(error)}); copy it again or remove it"


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
