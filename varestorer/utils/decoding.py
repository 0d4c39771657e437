"""From what Pillow decodes to float RGB and alpha: any mode, depth, orientation and color profile.

What the tags of a TIFF say about its numbers is heeded, and what Pillow would decode to others is refused. A share is a
sample over the largest that its bits can hold (of floating samples the sample itself). White need not be a share of 1:
cameras and scanners store 12 bits in 16.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps, ImagePalette
from torch import Tensor
from torch.nn.functional import interpolate, pad

from varestorer.utils.image_files import BROKEN_IMAGE_ERRORS, RefusedImageError

# what turns the transparent key of a PNG into a value of the mode that Pillow decodes its samples to
_KEY_SCALE = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}

_WEAKEST_JPEG = 50  # of Real-ESRGAN's degradation and ours no JPEG is below this, so restorers have seen none
_JPEG_TABLE = 3685  # sum of the luma table of quality 50 (the JPEG standard, annex K); libjpeg's qualities scale it

_SCALED_TO_16_BITS = ("PNG", "PPM", "JPEG2000")  # by the format itself, or by Pillow


@dataclass(frozen=True)
class Decoded:
    """Pixels of a file, the right way up.

    Attributes:
        rgb_CHW: (3, H, W) float32 in [0, 1], encoded as `icc_profile` says, else as sRGB.
        alpha_HW: float32 in [0, 1]; None for a file without transparency.
        icc_profile: an RGB profile that belongs to these colors.
        notes: what was left out or changed, for the user to know.
        is_gray: the file holds one channel of gray, or a palette of grays.
        bits: of a sample in the file: 8, or 16 for more than 8.
    """

    rgb_CHW: np.ndarray
    alpha_HW: np.ndarray | None
    icc_profile: bytes | None
    notes: list[str]
    is_gray: bool
    bits: int = 8


def decode(file: ImageFile.ImageFile) -> Decoded:
    """Decode the first frame of a file that `open_image` gave.

    Premultiplied colors are divided by their alpha. What is wholly transparent has no color that anybody chose to
    show: there the visible colors go on, see `_cover_hidden`.

    Raises:
        what Pillow raises for a damaged file (`open_image` turns it into one line).
    """
    notes = _notes(file)
    if file.format == "TIFF":
        check_tiff(file)
    _scale_key(file)
    is_stored_gray, bits = _is_stored_gray(file), _bits(file)
    file.load()
    orientation, turn_notes = _turn_upright(file)
    notes += turn_notes
    image = _simplify(file)
    bands = np.asarray(image)
    if bits == 16 and image.mode in ("RGB", "RGBA"):
        deep = _deep_colors(file, bands, orientation)
        notes += ["its colors are read with 8 of their 16 bits"] if deep is None else []
        bands = bands if deep is None else deep
    # Pillow itself converts LAB to sRGB
    profile = None if file.mode == "LAB" else file.info.get("icc_profile")
    alpha, key = None, file.info.get("transparency")
    if image.mode in ("LA", "RGBA"):
        alpha = _shares(bands[..., -1])
    elif _is_numeric(image.mode) and isinstance(key, int):  # the one transparent value of 16-bit gray
        alpha = (bands != key).astype(np.float32)
    rgb, kept_profile, profile_notes = _colors(file, image, bands, profile)
    is_palette_of_grays = file.mode in ("P", "PA") and bool((rgb == rgb[:1]).all())
    is_gray = kept_profile is None and (is_stored_gray or is_palette_of_grays)
    if _is_numeric(image.mode) and rgb.max() < 1 / 16:
        notes.append("very dark: if its samples use fewer bits than they have, its MaxSampleValue must say so")
    rgb = rgb if alpha is None else _cover_hidden(rgb, alpha)
    return Decoded(rgb, alpha, kept_profile, notes + profile_notes, is_gray, bits)


def decode_visible(file: ImageFile.ImageFile) -> np.ndarray:
    """RGB (3, H, W) as `decode` gives it, for those who have no use for transparency.

    RefusedImageError: nothing of the picture is visible.
    """
    decoded = decode(file)
    if decoded.alpha_HW is not None and not decoded.alpha_HW.any():
        raise RefusedImageError("it is wholly transparent; give it colors or remove it")
    return decoded.rgb_CHW


def _notes(file: ImageFile.ImageFile) -> list[str]:
    """Of several frames, and of a JPEG of lower quality than restoration networks are trained on."""
    notes = []
    if (frames := getattr(file, "n_frames", 1)) != 1:
        parts = {"TIFF": "pages", "MPO": "pictures"}.get(file.format or "")
        notes.append(f"first of {frames} {parts}" if parts else f"animated: first of {frames} frames")
    if table := (getattr(file, "quantization", None) or {}).get(0):
        percent = 100 * sum(table) / _JPEG_TABLE
        quality = (200 - percent) / 2 if percent <= 100 else 5000 / percent
        if quality < _WEAKEST_JPEG - 0.5:
            told = f"models learn from {_WEAKEST_JPEG} and more, its blocks may stay"
            notes.append(f"a JPEG of quality {quality:.0f} or so: {told}")
    return notes


def _scale_key(file: ImageFile.ImageFile) -> None:
    """Give the transparent key of a PNG the range of the decoded values; call before they are."""
    key = file.info.get("transparency")
    scale = _KEY_SCALE.get(str(file.tile[0][3])) if file.format == "PNG" and file.tile else None
    if key is not None and scale is not None:
        scaled = [int(value * scale) for value in (key if isinstance(key, tuple) else [key])]
        file.info["transparency"] = tuple(scaled) if isinstance(key, tuple) else scaled[0]


def _turn_upright(file: ImageFile.ImageFile) -> tuple[int, list[str]]:
    """Turn a decoded file, and tell how it lay (1 to 8), and notes."""
    try:
        orientation = file.getexif().get(ExifTags.Base.Orientation, 1)
        ImageOps.exif_transpose(file, in_place=True)
    except BROKEN_IMAGE_ERRORS:
        return 1, ["its EXIF data are damaged: taken as upright"]
    return orientation, []


def _deep_colors(file: ImageFile.ImageFile, bands_HWC: np.ndarray, orientation: int) -> np.ndarray | None:
    """Colors of 16 bits, of which Pillow keeps the upper 8, by OpenCV: uint16 (H, W, 3 or 4), RGB.

    A key has become alpha. The bands are what Pillow made of the decoded file, upright, the orientation is the file's.
    None where its upper bits are not Pillow's, who knows more kinds (multiplied by alpha, planes apart).
    """
    import cv2

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # it would tell of every unknown tag
    try:
        stored = cv2.imdecode(np.fromfile(file.filename, np.uint8), cv2.IMREAD_UNCHANGED)
    except (OSError, cv2.error):
        return None
    if stored is None or stored.dtype != np.uint16 or stored.ndim != 3:
        return None
    deep_HWC: np.ndarray = stored.view(np.uint16)[..., [2, 1, 0, 3][: stored.shape[2]]]
    down, across = (-1 if orientation in turns else 1 for turns in ((3, 4, 7, 8), (2, 3, 6, 7)))
    turned_HWC = (deep_HWC.swapaxes(0, 1) if orientation >= 5 else deep_HWC)[::down, ::across]
    for upright_HWC in (turned_HWC, deep_HWC):  # TIFFs are upright already
        if np.array_equal(upright_HWC[..., :3] >> 8, bands_HWC[..., :3]):
            return upright_HWC
    return None


def _simplify(image: Image.Image) -> Image.Image:
    """Convert to one of the modes L, LA, RGB, RGBA and CMYK; numbers (I, I;16 of any byte order, F) stay."""
    if _is_numeric(image.mode) or image.mode == "CMYK":
        return image
    gray = image.mode in ("1", "L", "LA", "La")
    mode = ("LA" if gray else "RGBA") if image.has_transparency_data else ("L" if gray else "RGB")
    return image.convert(mode)


def _is_numeric(mode: str) -> bool:
    return mode == "F" or mode.startswith("I")


def _shares(values: np.ndarray) -> np.ndarray:
    """Levels of 8 or 16 bits to contiguous float32 in [0, 1]."""
    return np.divide(values, np.float32(np.iinfo(values.dtype).max), dtype=np.float32, order="C")


def _is_stored_gray(file: ImageFile.ImageFile) -> bool:
    """Whether it holds one channel of gray; call before it is decoded. Pillow turns gray PNGs of 16 bits into RGBA."""
    is_wide = file.format == "PNG" and bool(file.tile) and str(file.tile[0][3]).startswith("LA")
    return is_wide or file.mode in ("1", "L", "LA", "La") or _is_numeric(file.mode)


def _bits(file: ImageFile.ImageFile) -> int:
    """8, or 16 where its samples have more; call before it is decoded, as Pillow keeps 8 of the 16 bits of colors."""
    if _is_numeric(file.mode):
        return 16
    is_deep = file.format in ("PNG", "TIFF") and bool(file.tile) and ";16" in str(file.tile[0][3])
    return 16 if is_deep else 8


def _cover_hidden(rgb_CHW: np.ndarray, alpha_HW: np.ndarray) -> np.ndarray:
    """Colors, where nothing is visible those around it, smoothly; black if nothing is visible anywhere.

    Whatever is stored there (often black) would else run into the edges when the picture is enlarged.
    """
    if alpha_HW.all():
        return rgb_CHW
    seen_1HW = torch.from_numpy(alpha_HW > 0)[None]
    return _covered(torch.from_numpy(rgb_CHW).where(seen_1HW, 0), seen_1HW).numpy()


def _covered(rgb_3HW: Tensor, seen_1HW: Tensor) -> Tensor:
    """Colors that are not seen, which must be 0, from a picture of half the size, and so on down."""
    height, width = rgb_3HW.shape[-2:]
    if seen_1HW.all() or max(height, width) == 1:
        return rgb_3HW
    both = pad(torch.cat([rgb_3HW, seen_1HW.float()]), (0, width % 2, 0, height % 2))
    sums_4hw = interpolate(both[None], scale_factor=0.5, mode="area")[0]
    seen_1hw = sums_4hw[3:] > 0
    half_3hw = _covered(torch.where(seen_1hw, sums_4hw[:3] / sums_4hw[3:].clamp(min=0.25), 0), seen_1hw)
    large_3HW = interpolate(half_3hw[None], scale_factor=2.0, mode="bilinear")[0, :, :height, :width]
    return torch.where(seen_1HW, rgb_3HW, large_3HW)


def _colors(
    file: ImageFile.ImageFile, image: Image.Image, bands: np.ndarray, profile: bytes | None
) -> tuple[np.ndarray, bytes | None, list[str]]:
    """(3, H, W) float32 in [0, 1], the profile that belongs to them, and notes.

    An RGB profile, of the file, is kept with its colors. Those of CMYK, and any of gray, are applied, which gives sRGB:
    what is written as gray cannot have an RGB profile. A profile that fits neither way is left out. The image is from
    `_simplify`, the bands are its values, (H, W) or (H, W, C); the file is asked for its tags.
    """
    mode, space = image.mode, _space_of(profile)
    if mode in ("RGB", "RGBA"):
        rgb, is_applied = _shares(rearrange(bands[..., :3], "h w c -> c h w")), False
        rgb = _of_white(file, rgb, bands.dtype == np.uint16) if file.mode == mode else rgb
    elif mode == "CMYK":
        _of_white(file, _shares(bands))
        converted = _to_srgb(image, profile if space == "CMYK" else None)
        levels = np.asarray(converted or image.convert("RGB"))
        rgb, is_applied = _shares(rearrange(levels, "h w c -> c h w")), converted is not None
    else:
        rgb, is_applied = _from_gray(_gray(file, mode, bands), profile if space in ("GRAY", "RGB") else None)
    if is_applied:
        return rgb, None, [f"colors converted from its {space} profile to sRGB"]
    if space == "RGB" and mode in ("RGB", "RGBA"):
        return rgb, profile, []
    return rgb, None, [f"its color profile ({space or 'damaged'}) does not fit and is left out"] if profile else []


def _from_gray(gray_HW: np.ndarray, profile: bytes | None) -> tuple[np.ndarray, bool]:
    """RGB (3, H, W), and whether the profile could be applied: to 256 levels, and between them linearly."""
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    converted = _to_srgb(ramp.convert("RGB") if _space_of(profile) == "RGB" else ramp, profile)
    if converted is not None:
        levels = np.asarray(converted)[0].mean(axis=1) / 255
        gray_HW = np.interp(gray_HW, np.linspace(0, 1, 256), levels).astype(np.float32)
    return np.repeat(gray_HW[None], 3, axis=0), converted is not None


def _gray(file: ImageFile.ImageFile, mode: str, bands: np.ndarray) -> np.ndarray:
    """(H, W) float32 in [0, 1] of a gray or numeric mode."""
    shares = _numbers(file, mode, bands) if _is_numeric(mode) else _shares(bands if mode == "L" else bands[..., 0])
    if file.format != "TIFF" or not is_negative(file):
        return _of_white(file, shares)
    if _is_numeric(mode):
        return 1 - _of_white(file, shares)
    # these Pillow turns round itself, as if white were the largest number
    stored = 1 - shares
    scaled = _of_white(file, stored)
    return shares if scaled is stored else 1 - scaled


def _numbers(file: ImageFile.ImageFile, mode: str, bands: np.ndarray) -> np.ndarray:
    """(H, W) float32 of a numeric mode, as shares of what its samples can hold."""
    if file.format == "TIFF":
        largest = largest_sample(file)
        bands = bands.view(np.uint32) if mode == "I" else bands
    elif file.format in _SCALED_TO_16_BITS:
        largest = 1.0 if mode == "F" else 65535.0
    else:
        raise RefusedImageError(f"its white is unknown ({file.format} of mode {mode}); convert it to PNG")
    shares = bands.astype(np.float32) / np.float32(largest)
    if not np.isfinite(shares).all() or shares.min() < 0:
        raise RefusedImageError(f"values of a {mode!r} picture must be in [0, {largest:g}]; scale them")
    return shares


def _of_white(file: ImageFile.ImageFile, shares: np.ndarray, is_deep: bool = False) -> np.ndarray:
    """Shares of what the samples of a TIFF can hold to shares of its white; other formats have no such difference."""
    white = white_share(file, shares) if file.format == "TIFF" else 1.0
    if shares.max() > white * (1 + 1e-6):
        most = white * largest_sample(file)
        raise RefusedImageError(f"values of a {file.mode!r} picture must be in [0, {most:g}]; scale them")
    if white == 1:
        return shares
    if file.mode == "CMYK" or (file.mode in ("RGB", "RGBA") and largest_sample(file) > 255 and not is_deep):
        raise RefusedImageError("its samples use a part of their bits (MaxSampleValue), too few are left; scale them")
    return np.minimum(shares / np.float32(white), 1)


def _space_of(profile: bytes | None) -> str | None:
    """Color space of an ICC profile (RGB, GRAY, CMYK, Lab, ...), None if it is damaged."""
    try:
        space = ImageCms.ImageCmsProfile(BytesIO(profile)).profile.xcolor_space.strip() if profile else ""
    except (OSError, ImportError):
        # also where Pillow was built without LittleCMS
        return None
    return space if space.isalnum() else None


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image | None:
    """The picture as sRGB; None without a profile, or if LittleCMS cannot use it."""
    if profile is None:
        return None
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except ImageCms.PyCMSError:
        return None


BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, PLANAR = 258, 259, 262, 277, 284
LEAST, MOST = (280, 340), (281, 341)  # unsigned integers have tags of their own, beside those for any format
COLOR_MAP, EXTRA_SAMPLES, SAMPLE_FORMAT = 320, 338, 339
SIGNED = 2
SEPARATE = 2
MULTIPLIED = 1
UNCOMPRESSED = 1
WHITE_IS_ZERO = 0


def check_tiff(file: ImageFile.ImageFile) -> None:
    """Refuse samples that Pillow would decode to other numbers; call before they are.

    RefusedImageError: signed samples, planes apart of a kind that Pillow mixes up, no word whether 0 is black.
    """
    tags = _tags(file)
    if SIGNED in tags.get(SAMPLE_FORMAT, ()):
        raise RefusedImageError("its samples are signed, so black is unknown; convert it to unsigned samples")
    if PHOTOMETRIC not in tags and file.mode != "RGB":
        raise RefusedImageError("it does not say whether 0 is black (PhotometricInterpretation); convert it to PNG")
    if tags.get(PLANAR) == SEPARATE and not _reads_planes(file, tags):
        raise RefusedImageError("its planes are stored apart, in a form that cannot be read; interleave its samples")
    if file.mode in ("P", "PA") and max(colors := tags[COLOR_MAP]) < 256:
        # some writers fill 8 of the 16 bits; Pillow drops those 8
        file.palette = ImagePalette.raw("RGB;L", bytes(colors))


def is_negative(file: ImageFile.ImageFile) -> bool:
    """Whether 0 is white."""
    return _tags(file).get(PHOTOMETRIC) == WHITE_IS_ZERO


def largest_sample(file: ImageFile.ImageFile) -> float:
    """What the bits of a sample can hold at most; 1 for floating samples."""
    return 1.0 if file.mode == "F" else 2.0 ** max(_tags(file).get(BITS, (1,))) - 1


def white_share(file: ImageFile.ImageFile, shares: np.ndarray) -> float:
    """The share that is white.

    `MaxSampleValue` is the white where it is a power of two less one, as it then says how many bits are in use. The
    standard has it as a statistic, the brightest sample; such a one is known by a sample that reaches it, and believed
    in the upper half of the range, where it cannot stand for fewer bits. `MinSampleValue` likewise.

    Args:
        file: a TIFF.
        shares: of its samples, before anything is turned round.
    Raises:
        RefusedImageError: white or black cannot be known.
    """
    tags, largest = _tags(file), largest_sample(file)
    # of colors Pillow keeps 8 bits
    is_reduced = file.mode not in ("F", "I") and not file.mode.startswith("I;") and largest > 255
    tolerance = largest / 255 if is_reduced else largest * 1e-6
    least, most = (_number(tags, LEAST, min), _number(tags, MOST, max))
    if least and abs(shares.min() * largest - least) > tolerance:
        raise RefusedImageError(f"its black is unknown (MinSampleValue {least:g}); scale its samples to begin at 0")
    if most is None and largest > 65535:
        raise RefusedImageError("its white is unknown (32-bit samples, no MaxSampleValue); convert it to 16 bits")
    if most is None or most == largest or (most > largest and file.mode != "F"):
        return 1.0
    if most >= 1 and np.log2(most + 1).is_integer():
        return most / largest
    if abs(shares.max() * largest - most) <= tolerance and most > largest / 2:
        return 1.0
    raise RefusedImageError(
        f"its white is unknown (MaxSampleValue {most:g}, neither all {largest:g} nor fewer whole bits); "
        "scale its samples or correct the tag"
    )


def _tags(file: ImageFile.ImageFile) -> Mapping[int, Any]:
    tags: Mapping[int, Any] = getattr(file, "tag_v2", {})
    return tags


def _reads_planes(file: ImageFile.ImageFile, tags: Mapping[int, Any]) -> bool:
    """Whether Pillow decodes planes that are stored apart to the right numbers (found out by trying them all)."""
    is_raw, is_8_bit = tags.get(COMPRESSION, 1) == UNCOMPRESSED, largest_sample(file) == 255
    if tags.get(SAMPLES, 1) == 1:
        return not is_raw or (is_8_bit and not is_negative(file))
    is_multiplied = MULTIPLIED in tags.get(EXTRA_SAMPLES, ())
    return file.mode in ("RGB", "RGBA", "CMYK") and not is_multiplied and (is_8_bit or not is_raw)


def _number(tags: Mapping[int, Any], names: tuple[int, ...], choose: Any) -> float | None:
    """The first of the tags that is there; of several bands the least or the most."""
    found = [tags[name] for name in names if name in tags]
    return float(choose(np.atleast_1d(found[0]))) if found else None
