"""Pictures: reading, writing, resizing, and the two ranges.

Outside networks a picture is RGB float32 (3, H, W) in [0, 1]; inside it is in [-1, 1]. Only `to_network` and
`from_network` convert between them.
"""

import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from math import inf
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageFile, ImageOps, PngImagePlugin, features
from torch import Tensor
from torch.nn.functional import interpolate, pad

from varestorer.utils.decoding import Decoded, decode, decode_visible
from varestorer.utils.errors import UserError
from varestorer.utils.files import atomic_write
from varestorer.utils.finite import check_finite, is_finite
from varestorer.utils.image_files import BROKEN_IMAGE_ERRORS, HEIC, READS_HEIC, open_image, write_16_bits
from varestorer.utils.watch import watch

ROWS_PIXELS = 2**17  # that are converted at once
ROUNDING = 1e-3  # what a picture may lie beyond [0, 1]
SOURCE = "Source-SHA256"
"""Text of a PNG that was made from another picture: the `file_sha256` of that one."""
_SOFTWARE = f"varestorer {SOURCE} {{}}"
_CAMERA_TAGS = {
    *(ExifTags.Base.Make, ExifTags.Base.Model, ExifTags.Base.DateTime),
    *(ExifTags.Base.Artist, ExifTags.Base.Copyright, ExifTags.Base.ImageDescription),
}
_PIXEL_TAGS = {
    *(ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight, ExifTags.Base.ColorSpace),
    *(ExifTags.Base.MakerNote, ExifTags.IFD.Interop),
}


_OPTIONAL = {"webp": ".webp", "avif": ".avif", "jpg_2000": ".jp2"}  # of what the installed Pillow reads
_KNOWN = _OPTIONAL.keys() & (features.modules.keys() | features.codecs.keys())
IMAGE_EXTENSIONS = frozenset(
    [
        *".png .apng .jpg .jpeg .jpe .jfif .bmp .gif .tif .tiff .ppm .pgm .pnm".split(),
        *(_OPTIONAL[name] for name in _KNOWN if features.check(name)),
        *(HEIC if READS_HEIC else ()),
    ]
)


@dataclass(frozen=True)
class Picture:
    """A picture as its file shows it, the right way up.

    Attributes:
        image: (3, H, W) RGB float32 in [0, 1].
        alpha: (1, H, W) float32 in [0, 1]; None for a file without transparency.
        icc_profile: an RGB profile that says what the colors mean; None: sRGB.
        note: what was left out or changed (other frames, a color profile); None if nothing was.
        is_gray: the file holds gray alone, so its three channels are equal.
        bits: of a sample in the file: 8, or 16 for more than 8.
        exif: when and by which camera it was taken, and where; without orientation, which is applied.
        dpi: pixels per inch, across and down.
    """

    image: Tensor
    alpha: Tensor | None
    icc_profile: bytes | None
    note: str | None
    is_gray: bool = False
    bits: int = 8
    exif: Image.Exif | None = None
    dpi: tuple[float, float] | None = None


def load_picture(path: str | os.PathLike, max_pixels: int | None = None) -> Picture:
    """Read a picture with its transparency and color profile.

    Any mode that Pillow reads is taken, and any depth whose white the file tells; EXIF orientation is applied; of
    several frames the first is read; gray and CMYK colors with a profile are converted to sRGB. What is wholly
    transparent has the colors around it, whatever the file holds there.

    Larger pictures than `max_pixels` are refused before they are decoded; None: Pillow's limit (about 179 million).
    UserError, naming the file and the remedy: missing, unreadable, truncated or too large.
    """
    with open_image(path, max_pixels) as file:
        decoded = decode(file)
        exif, dpi = exif_of(file), file.info.get("dpi")
    alpha = None if decoded.alpha_HW is None else torch.from_numpy(decoded.alpha_HW)[None]
    note = "; ".join(decoded.notes) or None
    image = torch.from_numpy(decoded.rgb_CHW)
    return Picture(image, alpha, decoded.icc_profile, note, decoded.is_gray, decoded.bits, exif, dpi)


@watch("read picture")
def load_image(path: str | os.PathLike) -> Tensor:
    """(3, H, W) float32 in [0, 1]: the colors of `load_picture`; also refuses what is wholly transparent."""
    with open_image(path) as file:
        return torch.from_numpy(decode_visible(file))


def exif_of(file: Image.Image) -> Image.Exif | None:
    """Date, camera and place of a decoded file: nothing that tells of its pixels, as sizes, thumbnails, maker notes."""
    try:
        given = file.getexif()
        kept = Image.Exif()
        for tag in _CAMERA_TAGS & given.keys():
            kept[tag] = given[tag]
        for place in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            entries = {tag: value for tag, value in given.get_ifd(place).items() if tag not in _PIXEL_TAGS}
            if entries:
                kept[place] = entries
        kept.tobytes()
    except BROKEN_IMAGE_ERRORS:
        return None
    return kept if len(kept) else None


@dataclass(frozen=True)
class Writing:
    """What else a written picture is to be, or says.

    Attributes:
        quality: 1 to 100 of a format that loses; None: 95 of JPEG, 90 of AVIF, and WebP without loss.
        bits: 16 where the format can, which are PNG and TIFF; others have 8.
        exif, dpi: see `Picture`.
        gps: whether the place of the EXIF is written too.
    """

    quality: int | None = None
    bits: int = 8
    exif: Image.Exif | None = None
    dpi: tuple[float, float] | None = None
    gps: bool = False


@dataclass(frozen=True)
class _Format:
    """How pictures are written in a format: Pillow's name of it, options of Pillow's writer, and what it can hold."""

    name: str
    options: dict[str, Any]
    holds_alpha: bool = True
    holds_profile: bool = True
    holds_16_bits: bool = False


# of photographs run lengths leave as little as zlib's search for repeats does, in a quarter of the time
_PNG = _Format("PNG", {"compress_type": zlib.Z_RLE}, holds_16_bits=True)
_JPEG = _Format("JPEG", {"quality": 95, "subsampling": 0}, holds_alpha=False)
_TIFF = _Format("TIFF", {"compression": "tiff_adobe_deflate"}, holds_16_bits=True)
_WRITTEN: dict[str, _Format] = {
    ".png": _PNG,
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".webp": _Format("WEBP", {"lossless": True, "exact": True}),
    ".avif": _Format("AVIF", {"quality": 90}),
    ".bmp": _Format("BMP", {}, holds_alpha=False, holds_profile=False),
}

WRITTEN_EXTENSIONS = frozenset(_WRITTEN)


def made_from(path: str | os.PathLike) -> str | None:
    """The `source` that `save_image` wrote into a picture; None: it does not say, or cannot be read.

    It is inside the file (a text of a PNG, the EXIF's software of others), so that it is there as soon as the picture
    is, and goes where the picture goes.
    """
    try:
        with open_image(path) as file:
            software = re.fullmatch(_SOFTWARE.format("(.*)"), str(file.getexif().get(ExifTags.Base.Software)))
            return file.info.get(SOURCE) or (software[1] if software else None)
    except UserError:
        return None


@watch("write picture")
def save_image(
    path: str | os.PathLike,
    img_CHW: Tensor,
    alpha_1HW: Tensor | None = None,
    icc_profile: bytes | None = None,
    source: str | None = None,
    writing: Writing | None = None,
) -> None:
    """Write a picture in [0, 1] with 8 bits, or 16 (rounded, not truncated), whole or not at all.

    Args:
        path: its extension says the format: PNG, TIFF, WebP, AVIF, BMP or JPEG.
        img_CHW: RGB, or one channel of gray; as `as_picture` takes it.
        alpha_1HW: transparency of the same size.
        icc_profile: what the colors mean; None: sRGB.
        source: `file_sha256` of what it was made from, for `made_from`.
        writing: what else.
    Raises:
        ValueError: no picture in [0, 1], another extension, or what its format cannot hold; nothing is written.
        UserError: values that are not finite, or the file cannot be written; names it.
    """
    format_ = _WRITTEN.get(Path(path).suffix.lower())
    if format_ is None:
        raise ValueError(f"cannot write {path}: wanted a name ending in {', '.join(_WRITTEN)}")
    if not isinstance(img_CHW, Tensor) or img_CHW.ndim != 3 or img_CHW.shape[0] not in (1, 3):
        got = f"shape {tuple(img_CHW.shape)}" if isinstance(img_CHW, Tensor) else type(img_CHW).__name__
        raise ValueError(f"wanted a tensor, one RGB picture (3, H, W) or a gray one (1, H, W), got {got}")
    if alpha_1HW is not None and alpha_1HW.shape != (1, *img_CHW.shape[1:]):
        raise ValueError(f"wanted alpha (1, H, W) of {tuple(img_CHW.shape[1:])}, got shape {tuple(alpha_1HW.shape)}")
    if alpha_1HW is not None and not format_.holds_alpha or icc_profile is not None and not format_.holds_profile:
        what = "color profile" if format_.holds_alpha or alpha_1HW is None else "transparency"
        raise ValueError(f"cannot write {path}: {format_.name} holds no {what}; give a name ending in .png")
    parts = [part.detach() for part in (img_CHW, alpha_1HW) if part is not None]
    for part in parts:
        check_finite(part, f"the picture for {path}")
        _check_values(part, f"cannot write {path}: wanted floats in [0, 1]")
    writing = writing or Writing()
    options = _options(format_, writing, source) | ({"icc_profile": icc_profile} if icc_profile else {})
    is_deep = format_.holds_16_bits and writing.bits == 16
    array = to_levels(parts, 16 if is_deep else 8)
    with atomic_write(path) as temporary:
        if array.shape[2] == 1:
            Image.fromarray(array[..., 0]).save(temporary, format=format_.name, **options)
        elif is_deep:
            write_16_bits(temporary, array, options)
        else:
            Image.fromarray(array).save(temporary, format=format_.name, **options)


def _options(format_: _Format, writing: Writing, source: str | None) -> dict[str, Any]:
    """Arguments of Pillow's writer, but for the profile."""
    options = dict(format_.options)
    if writing.quality is not None and format_.name in ("JPEG", "WEBP", "AVIF"):
        options |= {"quality": writing.quality} | ({"lossless": False} if format_.name == "WEBP" else {})
    exif = Image.Exif()
    for tag, value in (writing.exif or {}).items():
        if tag != ExifTags.IFD.GPSInfo or writing.gps:
            exif[tag] = value
    if source is not None and format_ is _PNG:
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text(SOURCE, source)
    elif source is not None:
        exif[ExifTags.Base.Software] = _SOFTWARE.format(source)
    if len(exif):
        options["exif"] = exif.tobytes()
        if format_ is _TIFF and ExifTags.IFD.Exif in exif:
            options.pop("compression")  # libtiff writes no nested tables, Pillow's own writer does, but compresses not
    if writing.dpi is not None and all(0 < value < inf for value in writing.dpi):
        options["dpi"] = writing.dpi
    return options


def as_picture(image: Any) -> Tensor:
    """What a caller gives as a picture as float32 on its device, or a word on what it is instead.

    It is (3, H, W) RGB in [0, 1], of any floating type. Values are never guessed to be of a range; 0.001 beyond it is
    taken for rounding. ValueError: no such tensor; says what was wanted, what came and how to convert it.
    """
    wanted = "wanted one RGB picture: a torch tensor (3, H, W), float, in [0, 1]; got"
    if not isinstance(image, Tensor):
        hint = "use load_image for a file, torch.from_numpy(x).permute(2, 0, 1) / 255 for 8-bit (H, W, 3)"
        raise ValueError(f"{wanted} {type(image).__module__}.{type(image).__qualname__}: {hint}")
    if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"{wanted} the shape {tuple(image.shape)}: {_shape_hint(image)}")
    _check_values(image, wanted.removesuffix("; got"))
    return image.float().clamp(0, 1)


def from_anything(image: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """What people have pictures in, as (3, H, W) float32 in [0, 1], and how a result becomes what they gave.

    They have paths, PIL images (upright by their EXIF, transparency kept), uint8 NumPy (H, W, 3), or what `as_picture`
    takes. The result may be of any size; for a path it becomes a PIL image. ValueError: anything else. UserError: a
    file that cannot be read.
    """
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return from_levels(image), to_levels
    if isinstance(image, str | os.PathLike):
        with open_image(image) as file:
            decoded = decode(file)
    elif isinstance(image, Image.Image):
        decoded = decode(cast(ImageFile.ImageFile, ImageOps.exif_transpose(image)))  # a copy, of no format
    else:
        return as_picture(image), lambda picture: picture
    return torch.from_numpy(decoded.rgb_CHW), partial(_to_pillow, decoded)


def _to_pillow(decoded: Decoded, image_3HW: Tensor) -> Image.Image:
    """A result with the transparency and the profile of its input."""
    size = (image_3HW.shape[1], image_3HW.shape[2])
    bands = image_3HW[:1] if decoded.is_gray and is_gray(image_3HW) else image_3HW
    if decoded.alpha_HW is not None:
        bands = torch.cat([bands, resize(torch.from_numpy(decoded.alpha_HW)[None], size).to(bands)])
    levels = to_levels(bands)
    result = Image.fromarray(levels[..., 0] if len(bands) == 1 else levels)
    if decoded.icc_profile:
        result.info["icc_profile"] = decoded.icc_profile
    return result


def _shape_hint(image: Tensor) -> str:
    """How to make (3, H, W) of another shape."""
    hints = {
        "it has no pixels": image.numel() == 0,
        "give the pictures of a batch one by one": image.ndim == 4,
        "use x.expand(3, -1, -1) for gray": image.ndim == 2 or (image.ndim == 3 and image.shape[0] == 1),
        "take x[:3], and save the transparency x[3:] with the result": image.ndim == 3 and image.shape[0] == 4,
        "use x.permute(2, 0, 1), which gives (C, H, W)": image.ndim == 3 and image.shape[-1] in (1, 3, 4),
        "give its red, green and blue channel first": True,
    }
    return next(hint for hint, is_it in hints.items() if is_it)


def _check_values(image: Tensor, what: str) -> None:
    """Refuse whole numbers, and values beyond [0, 1] by more than rounding: a ValueError that says what came."""
    if not image.is_floating_point():
        hint = "use x.float() / 255" if image.dtype == torch.uint8 else "use floats in [0, 1]"
        raise ValueError(f"{what}; got {image.dtype}: {hint}")
    if not is_finite(image):
        raise ValueError(f"{what}; got NaN or infinite numbers: find where they come from")
    low, high = (float(value) for value in image.float().aminmax())
    if low < -ROUNDING or high > 1 + ROUNDING:
        hint = "x / 255" if high > 2 else "(x + 1) / 2" if low < -0.1 else "x.clamp(0, 1)"
        raise ValueError(f"{what}; got values from {low:.4g} to {high:.4g}: use {hint}")


def is_gray(image_3HW: Tensor) -> bool:
    """Whether the three channels are equal everywhere."""
    return torch.equal(image_3HW[0], image_3HW[1]) and torch.equal(image_3HW[1], image_3HW[2])


def heat_map(values_HW: Tensor) -> Tensor:
    """Colors (3, H, W) of values in [0, 1]: 0 is black, 1 pale yellow, the same in every picture.

    UserError: values that are not finite.
    """
    from matplotlib import colormaps

    check_finite(values_HW, "the uncertainty")
    colors = torch.from_numpy(colormaps["inferno"](np.arange(256))[:, :3]).float()
    return rearrange(colors[to_uint8(values_HW.detach()).cpu().int()], "h w c -> c h w")


def to_uint8(img: Tensor) -> Tensor:
    """[0, 1] to uint8, clamped and rounded to the nearest level (half to even); any shape."""
    return (img.float().clamp(0, 1) * 255).round().to(torch.uint8)


def to_levels(img_CHW: Tensor | list[Tensor], bits: int = 8) -> np.ndarray:
    """[0, 1] to what image libraries take: uint8, or uint16, (H, W, C), of all channels; by rows, to hold little."""
    parts = img_CHW if isinstance(img_CHW, list) else [img_CHW]
    height, width = parts[0].shape[1:]
    most, dtype = (255, torch.uint8) if bits == 8 else (65535, torch.int32)
    levels = np.empty((height, width, sum(map(len, parts))), np.uint8 if bits == 8 else np.uint16)
    rows = max(ROWS_PIXELS // max(width, 1), 1)
    for first in range(0, height, rows):
        whole = [(part[:, first : first + rows].float().clamp(0, 1) * most).round().to(dtype).cpu() for part in parts]
        levels[first : first + rows] = rearrange(torch.cat(whole), "c h w -> h w c").numpy()
    return levels


def from_levels(levels_HWC: np.ndarray) -> Tensor:
    """8-bit pixels (H, W, C) of image libraries as (C, H, W) float32 in [0, 1]."""
    return rearrange(torch.tensor(levels_HWC), "h w c -> c h w").contiguous().float() / 255


def holds_alpha(path: str | os.PathLike) -> bool:
    """Whether the format that a file name says holds transparency."""
    return _WRITTEN[Path(path).suffix.lower()].holds_alpha


def to_network(img: Tensor) -> Tensor:
    """[0, 1] to the networks' [-1, 1]; any shape."""
    return img * 2 - 1


def from_network(x: Tensor) -> Tensor:
    """The networks' [-1, 1] to float32 [0, 1], clamped, with NaN for what is not finite; any shape."""
    x = x.float()
    return ((x + 1) / 2).clamp(0, 1) + x * 0  # infinite numbers would become black or white


def resize(img: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Resize pictures (B, 3, H, W) or (3, H, W) with antialiasing, clamped to [0, 1] (bicubic and Lanczos overshoot).

    The size is (height, width); the mode `bicubic`, `bilinear`, `area` (pixel mixing) or `lanczos` (through Pillow, on
    the CPU). Rank, type and device stay.
    """
    if mode not in ("bicubic", "bilinear", "area", "lanczos"):
        raise ValueError(f"mode must be bicubic, bilinear, area or lanczos, got {mode!r}")
    if tuple(img.shape[-2:]) == tuple(size):
        return img
    x_BCHW = img if img.ndim == 4 else img[None]
    if mode == "lanczos":
        # one channel at a time, as Pillow has no float RGB mode
        planes = rearrange(x_BCHW.detach().float().cpu(), "b c h w -> (b c) h w").numpy()
        small = [Image.fromarray(p).resize(size[::-1], Image.Resampling.LANCZOS) for p in planes]
        out = torch.from_numpy(np.stack([np.asarray(image) for image in small]))
        out = rearrange(out, "(b c) h w -> b c h w", b=x_BCHW.shape[0]).to(x_BCHW)
    elif mode == "area":
        out = interpolate(x_BCHW, size, mode="area")
    else:
        out = interpolate(x_BCHW, size, mode=mode, align_corners=False, antialias=True)
    out = out.clamp(0, 1)
    return out if img.ndim == 4 else out[0]


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
