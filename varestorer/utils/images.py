"""Pictures: listing, reading, writing, resizing, and the two ranges.

Outside networks a picture is RGB float32 (3, H, W) in [0, 1]; inside it is in [-1, 1]. Only `to_network` and
`from_network` convert between them.
"""

import os
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, PngImagePlugin, features
from torch import Tensor
from torch.nn.functional import interpolate, pad

from varestorer.utils.decoding import decode
from varestorer.utils.errors import UserError
from varestorer.utils.files import atomic_write
from varestorer.utils.image_files import open_image


def _readable_extensions() -> frozenset[str]:
    """Extensions of the formats that the installed Pillow reads."""
    optional = {"webp": ".webp", "avif": ".avif", "jpg_2000": ".jp2"}
    known = features.modules.keys() | features.codecs.keys()
    found = [extension for name, extension in optional.items() if name in known and features.check(name)]
    return frozenset([*".png .apng .jpg .jpeg .jpe .jfif .bmp .gif .tif .tiff .ppm .pgm .pnm".split(), *found])


IMAGE_EXTENSIONS = _readable_extensions()

SOURCE = "Source-SHA256"
"""Text of a PNG that was made from another picture: the `file_sha256` of that one."""


@dataclass(frozen=True)
class Picture:
    """A picture as its file shows it, the right way up.

    Attributes:
        image: (3, H, W) RGB float32 in [0, 1].
        alpha: (1, H, W) float32 in [0, 1]; None for a file without transparency.
        icc_profile: an RGB profile that says what the colours mean; None: sRGB.
        note: what was left out or changed (other frames, a colour profile); None if nothing was.
    """

    image: Tensor
    alpha: Tensor | None
    icc_profile: bytes | None
    note: str | None


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


def load_picture(path: str | os.PathLike, max_pixels: int | None = None) -> Picture:
    """Read a picture with its transparency and colour profile.

    Any mode and depth that Pillow reads is taken; EXIF orientation is applied; of several frames the first is
    read; grey and CMYK colours with a profile are converted to sRGB.

    Args:
        path: the file.
        max_pixels: larger pictures are refused before they are decoded; None: Pillow's limit (about 179 million).
    Raises:
        UserError: missing, unreadable, truncated or too large; names the file and the remedy.
    """
    with open_image(path, max_pixels) as file:
        decoded = decode(file)
    alpha = None if decoded.alpha_HW is None else torch.from_numpy(decoded.alpha_HW)[None]
    return Picture(torch.from_numpy(decoded.rgb_CHW), alpha, decoded.icc_profile, "; ".join(decoded.notes) or None)


def load_image(path: str | os.PathLike) -> Tensor:
    """(3, H, W) float32 in [0, 1]: the colours of `load_picture`."""
    return load_picture(path).image


def made_from(path: str | os.PathLike) -> str | None:
    """The `source` that `save_image` wrote into a picture.

    It is inside the file, so that it is there as soon as the picture is, and goes where the picture goes.

    Returns:
        None: the picture does not say, or cannot be read.
    """
    try:
        with open_image(path) as file:
            return file.info.get(SOURCE)
    except UserError:
        return None


def save_image(
    path: str | os.PathLike,
    img_3HW: Tensor,
    alpha_1HW: Tensor | None = None,
    icc_profile: bytes | None = None,
    source: str | None = None,
) -> None:
    """Write a picture in [0, 1] as an 8-bit RGB or RGBA PNG (rounded, not truncated), whole or not at all.

    Args:
        path: the file.
        img_3HW: colours.
        alpha_1HW: transparency of the same size.
        icc_profile: what the colours mean; None: sRGB.
        source: `file_sha256` of what it was made from, for `made_from`.
    Raises:
        UserError: the file cannot be written; names it.
    """
    if img_3HW.ndim != 3 or img_3HW.shape[0] != 3:
        raise ValueError(f"wanted one RGB picture (3, H, W), got shape {tuple(img_3HW.shape)}")
    if alpha_1HW is not None and alpha_1HW.shape != (1, *img_3HW.shape[1:]):
        raise ValueError(f"wanted alpha (1, H, W) of {tuple(img_3HW.shape[1:])}, got shape {tuple(alpha_1HW.shape)}")
    bands = [to_uint8(band.detach()).cpu() for band in (img_3HW, alpha_1HW) if band is not None]
    array = rearrange(torch.cat(bands), "c h w -> h w c").numpy()
    about = PngImagePlugin.PngInfo()
    if source is not None:
        about.add_text(SOURCE, source)
    with atomic_write(path) as temporary:
        # of photographs run lengths leave as little as zlib's search for repeats does, in a quarter of the time
        options = {"icc_profile": icc_profile, "pnginfo": about, "compress_type": zlib.Z_RLE}
        Image.fromarray(array).save(temporary, format="PNG", **options)


def heat_map(values_HW: Tensor) -> Tensor:
    """Colours of values in [0, 1]: 0 is black, 1 pale yellow, the same in every picture.

    Returns:
        (3, H, W) float32 in [0, 1].
    """
    from matplotlib import colormaps

    colours = torch.from_numpy(colormaps["inferno"](np.arange(256))[:, :3]).float()
    return rearrange(colours[to_uint8(values_HW.detach()).cpu().int()], "h w c -> c h w")


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
    if max(top, bottom) < height and max(left, right) < width and img.ndim in (3, 4):
        return pad(img, (left, right, top, bottom), mode="reflect")  # twenty times as fast
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
