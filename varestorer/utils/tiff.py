"""What the tags of a TIFF say about the numbers in it; what Pillow would decode to others is refused.

A share is a sample over the largest that its bits can hold (of floating samples the sample itself). White need not be
a share of 1: cameras and scanners store 12 bits in 16.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import ImageFile, ImagePalette

from varestorer.utils.image_files import RefusedImageError

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

    Raises:
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
        file.palette = ImagePalette.raw(
            "RGB;L", bytes(colors)
        )  # some writers fill 8 of the 16 bits; Pillow drops those 8


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
