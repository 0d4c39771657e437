"""Opening picture files: what is no picture, damaged or too large is named in one line before it is decoded."""

import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock

from PIL import Image, ImageFile, UnidentifiedImageError

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

HEIC = (".heic", ".heif")
HEIC_HINT = "HEIC is read through pillow-heif: pip install pillow-heif (the extra [heic]), or convert it to JPEG"


def _register_heif() -> bool:
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


READS_HEIC = _register_heif()


class RefusedImageError(ValueError):
    """A file that is no use, though Pillow might not mind; the message says why and what to do."""


@contextmanager
def open_image(path: str | os.PathLike, max_pixels: int | None = None) -> Iterator[ImageFile.ImageFile]:
    """Open a picture file without decoding it; what Pillow raises inside the block names the file too.

    Pillow's warnings (of sizes, of damaged metadata) are not shown: the result or the error says it. Threads wait
    for each other: warnings and Pillow's limit of pixels are global.

    Args:
        path: the file.
        max_pixels: larger pictures are refused; None: where Pillow itself raises (about 179 million pixels).
    Raises:
        UserError: missing, unreadable, empty, truncated, no picture, or too large; one line with a remedy.
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
