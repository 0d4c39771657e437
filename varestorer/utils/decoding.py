"""From what Pillow decodes to float RGB and alpha: any mode, depth, orientation and colour profile."""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
from einops import rearrange
from PIL import Image, ImageCms, ImageFile, ImageOps

from varestorer.utils.image_files import BROKEN_IMAGE_ERRORS, RefusedImageError

# what turns the transparent key of a PNG into a value of the mode that Pillow decodes its samples to
_KEY_SCALE = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}

_PHOTOMETRIC = 262  # tag of a TIFF


@dataclass(frozen=True)
class Decoded:
    """Pixels of a file, the right way up.

    Attributes:
        rgb_CHW: (3, H, W) float32 in [0, 1], encoded as `icc_profile` says, else as sRGB.
        alpha_HW: float32 in [0, 1]; None for a file without transparency.
        icc_profile: an RGB profile that belongs to these colours.
        notes: what was left out or changed, for the user to know.
    """

    rgb_CHW: np.ndarray
    alpha_HW: np.ndarray | None
    icc_profile: bytes | None
    notes: list[str]


def decode(file: ImageFile.ImageFile) -> Decoded:
    """Decode the first frame of a file that `open_image` gave.

    Colours below transparent pixels are kept as they are; premultiplied ones are divided by their alpha.

    Raises:
        what Pillow raises for a damaged file (`open_image` turns it into one line).
    """
    notes = _note_frames(file)
    _scale_key(file)
    file.load()
    notes += _turn_upright(file)
    image = _simplify(file)
    bands = _positive(file, np.asarray(image))
    # Pillow itself converts LAB to sRGB
    profile = None if file.mode == "LAB" else file.info.get("icc_profile")
    alpha = _alpha(image.mode, bands, file.info.get("transparency"))
    rgb, kept_profile, profile_notes = _colours(image, bands, profile)
    return Decoded(rgb, alpha, kept_profile, notes + profile_notes)


def _note_frames(file: ImageFile.ImageFile) -> list[str]:
    count = getattr(file, "n_frames", 1)
    if count == 1:
        return []
    parts = {"TIFF": "pages", "MPO": "pictures"}.get(file.format or "")
    return [f"first of {count} {parts}" if parts else f"animated: first of {count} frames"]


def _scale_key(file: ImageFile.ImageFile) -> None:
    """Give the transparent key of a PNG the range of the decoded values; call before they are."""
    key = file.info.get("transparency")
    scale = _KEY_SCALE.get(str(file.tile[0][3])) if file.format == "PNG" and file.tile else None
    if key is not None and scale is not None:
        scaled = [int(value * scale) for value in (key if isinstance(key, tuple) else [key])]
        file.info["transparency"] = tuple(scaled) if isinstance(key, tuple) else scaled[0]


def _turn_upright(file: ImageFile.ImageFile) -> list[str]:
    try:
        ImageOps.exif_transpose(file, in_place=True)
    except BROKEN_IMAGE_ERRORS:
        return ["its EXIF data are damaged: taken as upright"]
    return []


def _simplify(image: Image.Image) -> Image.Image:
    """Convert to one of the modes L, LA, RGB, RGBA and CMYK; numbers (I, I;16 of any byte order, F) stay."""
    if _is_numeric(image.mode) or image.mode == "CMYK":
        return image
    grey = image.mode in ("1", "L", "LA", "La")
    mode = ("LA" if grey else "RGBA") if image.has_transparency_data else ("L" if grey else "RGB")
    return image.convert(mode)


def _positive(file: ImageFile.ImageFile, bands: np.ndarray) -> np.ndarray:
    """Turn 16-bit negatives round (TIFF: white is zero), which Pillow does for other depths only."""
    is_negative = getattr(file, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    return 65535 - bands if is_negative and file.mode.startswith("I;16") else bands


def _is_numeric(mode: str) -> bool:
    return mode == "F" or mode.startswith("I")


def _of_255(values: np.ndarray) -> np.ndarray:
    """0..255 to contiguous float32 in [0, 1]."""
    return np.divide(values, np.float32(255), dtype=np.float32, order="C")


def _alpha(mode: str, bands: np.ndarray, key: object) -> np.ndarray | None:
    """(H, W) float32 in [0, 1], None without transparency; a key is the one transparent value of 16-bit grey."""
    if mode in ("LA", "RGBA"):
        return _of_255(bands[..., -1])
    return (bands != key).astype(np.float32) if _is_numeric(mode) and isinstance(key, int) else None


def _colours(
    image: Image.Image, bands: np.ndarray, profile: bytes | None
) -> tuple[np.ndarray, bytes | None, list[str]]:
    """(3, H, W) float32 in [0, 1], the profile that belongs to them, and notes.

    An RGB profile is kept with its colours. Grey and CMYK profiles cannot describe RGB: they are applied, which
    gives sRGB. A profile that fits neither way is left out.

    Args:
        image: from `_simplify`.
        bands: its values, (H, W) or (H, W, C).
        profile: of the file.
    """
    mode, space = image.mode, _space_of(profile)
    if mode in ("RGB", "RGBA"):
        rgb, is_applied = _of_255(rearrange(bands[..., :3], "h w c -> c h w")), False
    elif mode == "CMYK":
        rgb, is_applied = _from_cmyk(image, profile if space == "CMYK" else None)
    else:
        rgb, is_applied = _from_grey(_grey(mode, bands), profile if space == "GRAY" else None)
    if is_applied:
        return rgb, None, [f"colours converted from its {space} profile to sRGB"]
    if space == "RGB" and mode != "CMYK":
        return rgb, profile, []
    return rgb, None, [f"its colour profile ({space or 'damaged'}) does not fit and is left out"] if profile else []


def _from_cmyk(image: Image.Image, profile: bytes | None) -> tuple[np.ndarray, bool]:
    """RGB (3, H, W), and whether the profile could be applied."""
    converted = _to_srgb(image, profile)
    bands = np.asarray(converted or image.convert("RGB"))
    return _of_255(rearrange(bands, "h w c -> c h w")), converted is not None


def _from_grey(grey_HW: np.ndarray, profile: bytes | None) -> tuple[np.ndarray, bool]:
    """RGB (3, H, W), and whether the profile could be applied: to 256 levels, and between them linearly."""
    converted = _to_srgb(Image.fromarray(np.arange(256, dtype=np.uint8)[None]), profile)
    if converted is None:
        return np.repeat(grey_HW[None], 3, axis=0), False
    columns = np.asarray(converted)[0].T / 255
    return np.stack([np.interp(grey_HW, np.linspace(0, 1, 256), column).astype(np.float32) for column in columns]), True


def _grey(mode: str, bands: np.ndarray) -> np.ndarray:
    """(H, W) float32 in [0, 1] of a grey or numeric mode."""
    if not _is_numeric(mode):
        return _of_255(bands if mode == "L" else bands[..., 0])
    peak = 1.0 if mode == "F" else 65535.0
    grey = bands.astype(np.float32) / np.float32(peak)
    if not np.isfinite(grey).all() or grey.min() < 0 or grey.max() > 1:
        raise RefusedImageError(f"values of a {mode!r} picture must be in [0, {peak:g}]; scale them")
    return grey


def _space_of(profile: bytes | None) -> str | None:
    """Colour space of an ICC profile (RGB, GRAY, CMYK, Lab, ...), None if it is damaged."""
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
