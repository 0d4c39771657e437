"""Pictures: listing, reading, writing, resizing, and the two ranges.

Outside networks a picture is RGB float32 (3, H, W) in [0, 1]; inside it is in [-1, 1]. Only `to_network` and
`from_network` convert between them.
"""

import os
import re
import struct
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from varestorer.utils.errors import UserError
from varestorer.utils.files import atomic_write

IMAGE_EXTENSIONS = frozenset(".png .jpg .jpeg .jpe .jfif .bmp .webp .tif .tiff .ppm .pgm .pnm .avif".split())

# what Pillow raises for files that are not, or not wholly, pictures
BROKEN_IMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    IndexError,
    EOFError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def natural_key(text: str) -> list[tuple[int, int | str]]:
    """Sort key that puts `2.png` before `10.png`."""
    parts = re.split(r"(\d+)", text.lower())
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part]


def list_images(folder: str | os.PathLike) -> list[Path]:
    """Find pictures in a folder and its subfolders, linked ones included, hidden ones not.

    Returns:
        Paths with an extension in `IMAGE_EXTENSIONS`, in natural order of their path inside the folder.
    Raises:
        UserError: the folder does not exist.
    """
    root = Path(folder)
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        raise UserError(f"wanted a folder of images, but {root} {problem}")
    found: list[Path] = []
    visited: set[str] = set()
    for parent, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(parent)
        # a link that leads back up would otherwise be followed for ever
        subfolders[:] = [] if real in visited else [n for n in subfolders if n[0] != "." and n != "__MACOSX"]
        if real not in visited:
            visible = [name for name in names if name[0] != "."]
            found += [Path(parent, n) for n in visible if Path(n).suffix.lower() in IMAGE_EXTENSIONS]
        visited.add(real)
    return sorted(found, key=lambda path: (natural_key(path.relative_to(root).as_posix()), path))


def load_image(path: str | os.PathLike) -> Tensor:
    """Read a picture as RGB, turned the way its EXIF orientation says.

    Grey, palette, 16-bit, CMYK and float pictures are converted; alpha is ignored (the colours below it are
    kept); of several frames the first is read.

    Returns:
        (3, H, W) float32 in [0, 1].
    Raises:
        UserError: missing, unreadable or truncated file; names it.
    """
    try:
        with Image.open(path) as file:
            array = _rgb_array(ImageOps.exif_transpose(file))
    except BROKEN_IMAGE_ERRORS as error:
        raise broken_image(path, error) from error
    return rearrange(torch.from_numpy(array), "h w c -> c h w").contiguous()


def broken_image(path: str | os.PathLike, error: Exception) -> UserError:
    """One line about a picture that Pillow could not read, naming the file once."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"no such image: {path}")
    if isinstance(error, UnidentifiedImageError):
        return UserError(f"cannot read the image {path}: the file holds no picture in a known format")
    return UserError(f"cannot read the image {path}: {str(error) or type(error).__name__}")


def _rgb_array(image: Image.Image) -> np.ndarray:
    """(H, W, 3) float32 in [0, 1] of any Pillow mode."""
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion to RGB clips these to 255
        peak = 1.0 if image.mode == "F" else 65535.0
        grey = np.asarray(image).astype(np.float32) / peak
        if not np.isfinite(grey).all() or grey.min() < 0 or grey.max() > 1:
            raise ValueError(f"values of a {image.mode!r} picture must be in [0, {peak:g}]")
        return np.repeat(grey[..., None], 3, axis=2)
    return np.asarray(image.convert("RGB")).astype(np.float32) / 255.0


def save_image(path: str | os.PathLike, img_3HW: Tensor) -> None:
    """Write a picture in [0, 1] as an 8-bit RGB PNG (rounded, not truncated), whole or not at all.

    Raises:
        UserError: the file cannot be written; names it.
    """
    if img_3HW.ndim != 3 or img_3HW.shape[0] != 3:
        raise ValueError(f"wanted one RGB picture (3, H, W), got shape {tuple(img_3HW.shape)}")
    array = rearrange(to_uint8(img_3HW.detach()).cpu(), "c h w -> h w c").numpy()
    with atomic_write(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG")


def to_uint8(img: Tensor) -> Tensor:
    """[0, 1] to uint8, clamped and rounded to the nearest level (half to even); any shape."""
    return (img.float().clamp(0, 1) * 255).round().to(torch.uint8)


def to_network(img: Tensor) -> Tensor:
    """[0, 1] to the networks' [-1, 1]; any shape."""
    return img * 2 - 1


def from_network(x: Tensor) -> Tensor:
    """The networks' [-1, 1] to float32 [0, 1], clamped; any shape."""
    return ((x.float() + 1) / 2).clamp(0, 1)


def resize(img: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Resize with antialiasing, clamped to [0, 1] (bicubic and Lanczos overshoot).

    Args:
        img: (B, 3, H, W) or (3, H, W) in [0, 1].
        size: new (height, width), pixels.
        mode: `bicubic`, `bilinear`, `area` (pixel mixing) or `lanczos` (through Pillow, on the CPU).
    Returns:
        Same rank, dtype and device as `img`.
    """
    if mode not in ("bicubic", "bilinear", "area", "lanczos"):
        raise ValueError(f"mode must be bicubic, bilinear, area or lanczos, got {mode!r}")
    if tuple(img.shape[-2:]) == tuple(size):
        return img
    x_BCHW = img if img.ndim == 4 else img[None]
    if mode == "lanczos":
        out = _resize_lanczos(x_BCHW, size)
    elif mode == "area":
        out = interpolate(x_BCHW, size, mode="area")
    else:
        out = interpolate(x_BCHW, size, mode=mode, align_corners=False, antialias=True)
    out = out.clamp(0, 1)
    return out if img.ndim == 4 else out[0]


def _resize_lanczos(x_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Lanczos-3 in float, one channel at a time (Pillow has no float RGB mode)."""
    planes = rearrange(x_BCHW.detach().float().cpu(), "b c h w -> (b c) h w").numpy()
    small = [Image.fromarray(p).resize(size[::-1], Image.Resampling.LANCZOS) for p in planes]
    out = torch.from_numpy(np.stack([np.asarray(image) for image in small]))
    return rearrange(out, "(b c) h w -> b c h w", b=x_BCHW.shape[0]).to(x_BCHW)


def pad_reflect(img: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    """Pad the last two dimensions by reflection; unlike torch's, the pad may exceed the picture.

    The picture goes on as its mirror image, again and again, without repeating the edge pixel.
    """
    height, width = img.shape[-2:]
    if top or bottom:
        img = img.index_select(-2, _mirror_index(height, top, bottom, img.device))
    if left or right:
        img = img.index_select(-1, _mirror_index(width, left, right, img.device))
    return img


@lru_cache(maxsize=256)
def _mirror_index(length: int, before: int, after: int, device: torch.device) -> Tensor:
    """Source index of each padded position: a triangle wave of period 2 (length - 1)."""
    position = torch.arange(-before, length + after, device=device)
    if length == 1:
        return torch.zeros_like(position)
    folded = position.remainder(2 * (length - 1))
    return torch.minimum(folded, 2 * (length - 1) - folded)
