"""Reading picture files of every kind, and naming the bad ones; the files are made here, some byte by byte."""

import itertools
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, features

from varestorer.utils.errors import UserError
from varestorer.utils.image_files import READS_HEIC, open_image
from varestorer.utils.images import (
    IMAGE_EXTENSIONS,
    Writing,
    as_picture,
    is_gray,
    load_image,
    load_picture,
    save_image,
)

BIG = 100_000  # pixels a side in headers of pictures that are too large
PIL_MAJOR = int(PIL.__version__.split(".")[0])
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def smooth(height: int = 24, width: int = 32) -> np.ndarray:
    """A smooth color picture, uint8 (H, W, 3): survives JPEG well."""
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [rows / height, columns / width, (rows + columns) / (height + width)]
    return (np.stack(planes, axis=2) * 200 + 30).astype(np.uint8)


COLOR = smooth()
GRAY = COLOR[..., 1]
GRAY_RGB = np.repeat(GRAY[..., None], 3, axis=2)
FADE = (np.arange(24 * 32).reshape(24, 32) % 256).astype(np.uint8)
RGBA = np.dstack([COLOR, FADE])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size: tuple[int, int], depth: int, color: int, rows: Sequence[bytes], key: Sequence[int] = ()) -> bytes:
    """A PNG of any depth and color type (0 gray, 2 RGB, 4 gray and alpha, 6 RGBA), with a transparent key."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, color, 0, 0, 0))
    transparent = chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)) if key else b""
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + transparent + body + chunk(b"IEND", b"")


def png16(array: np.ndarray, key: Sequence[int] = ()) -> bytes:
    """A 16-bit PNG of (H, W) or (H, W, 2 | 3 | 4): Pillow cannot write most of them."""
    color = 0 if array.ndim == 2 else {2: 4, 3: 2, 4: 6}[array.shape[2]]
    rows = [row.astype(">u2").tobytes() for row in array]
    return png((array.shape[1], array.shape[0]), 16, color, rows, key)


def tiff(
    bands: np.ndarray,
    order: str,
    photometric: int | None,
    extra: int | None = None,
    more: dict[int, list[float]] | None = None,
    bits: int | None = None,
) -> bytes:
    """An uncompressed TIFF in a byte order (`<` or `>`).

    `extra` says what its last band is (1: alpha, multiplied); `more` are further tags, of 16 bits, of 32 where needed,
    or floats; with `bits`, each row of `bands` holds so many packed bits a sample. Where the planes
    are apart (284: 2), `bands` is (C, H, W).
    """
    apart = (more or {}).get(284) == [2]
    data = bands.astype(bands.dtype.newbyteorder(order)).tobytes()
    bands = np.moveaxis(bands, 0, 2) if apart else bands if bands.ndim == 3 else bands[..., None]
    height, width, num_bands = bands.shape
    depth = bits or bands.dtype.itemsize * 8
    width = width * bands.dtype.itemsize * 8 // depth
    tags: dict[int, list[float]] = {256: [width], 257: [height], 258: [depth] * num_bands, 259: [1]}
    tags |= {273: [8], 277: [num_bands], 278: [height], 279: [len(data)]} | ({338: [extra]} if extra else {})
    tags |= {262: [photometric]} if photometric is not None else {}
    if apart:
        size = len(data) // num_bands
        tags |= {273: [8 + size * number for number in range(num_bands)], 279: [size] * num_bands}
    tags |= more or {}
    start = 8 + len(data)
    overflow, entries = b"", b""
    for tag, values in sorted(tags.items()):
        kind, code = (11, "f") if isinstance(values[0], float) else (4, "I") if max(values) > 65535 else (3, "H")
        packed = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(packed) > 4:
            position = start + 2 + 12 * len(tags) + 4 + len(overflow)
            overflow, packed = overflow + packed, struct.pack(f"{order}I", position)
        entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + overflow
    return mark + struct.pack(f"{order}I", start) + data + directory


def icc(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """The smallest color profile that LittleCMS takes."""
    table, data = b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(content))
        data += content
    d50 = struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
    head = bytes(4) + struct.pack(">I", 0x02400000) + kind + space + connection + bytes(12) + b"acsp" + bytes(28) + d50
    body = head.ljust(124, b"\0") + struct.pack(">I", len(tags)) + table + data
    return struct.pack(">I", len(body) + 4) + body


def gray_profile() -> bytes:
    """Linear light: level 128 of 255 is 188 in sRGB."""
    white = b"XYZ " + bytes(4) + struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
    curve = b"curv" + bytes(4) + struct.pack(">IHH", 1, 0x100, 0)
    return icc(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": white, b"kTRC": curve})


def cmyk_profile() -> bytes:
    """A strange press: only black ink shows."""
    ramp = bytes(range(256))
    corners = b"".join(bytes([0 if number & 1 else 255, 128, 128]) for number in range(16))
    matrix = struct.pack(">9I", *[0x10000 * (number % 4 == 0) for number in range(9)])
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + corners + ramp * 3
    return icc(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table})


def save(image: Image.Image, name: str, **options) -> Callable[[Path], Path]:
    """Writes the image into a folder; gives its path."""

    def write(folder: Path) -> Path:
        image.save(folder / name, **options)
        return folder / name

    return write


def frames(image: Image.Image, name: str, **options) -> Callable[[Path], Path]:
    """Writes the image and two others after it into one file."""

    def write(folder: Path) -> Path:
        # Pillow leaves options of one format in the frames: new ones for each file
        others = [picture(COLOR[::-1].copy()), picture(COLOR[:, ::-1].copy())]
        image.save(folder / name, save_all=True, append_images=others, **options)
        return folder / name

    return write


def content(name: str, data: bytes) -> Callable[[Path], Path]:
    """Writes the bytes into a folder; gives their path."""

    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


def picture(array: np.ndarray) -> Image.Image:
    return Image.fromarray(array)


def palette() -> tuple[Image.Image, np.ndarray]:
    """A picture of 16 colors, and its colors."""
    image = picture(COLOR).quantize(16)
    return image, np.asarray(image.convert("RGB"))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


GRAY16 = GRAY.astype(np.uint16) * 257
COLOR16 = COLOR.astype(np.uint16) * 257 + 100  # no levels of 8 bits
RGBA16 = np.dstack([COLOR16, FADE.astype(np.uint16) * 256 + 100])
# 12 bits of the same picture, two of them packed into three bytes, and in 16 bits
GRAY_16_12 = np.round(GRAY * (4095 / 255)).astype(np.uint16)
FIRST, SECOND = GRAY_16_12[:, ::2], GRAY_16_12[:, 1::2]
GRAY_12 = np.stack([FIRST >> 4, (FIRST & 15) << 4 | SECOND >> 8, SECOND & 255], axis=2).astype(np.uint8).reshape(24, 48)
MAX_12, FLOAT = {281: [4095]}, {339: [3]}
FOUR_BITS = (GRAY[:, ::2] >> 4 << 4 | GRAY[:, 1::2] >> 4).astype(np.uint8)
FOUR_BITS_RGB = np.repeat((GRAY >> 4)[..., None], 3, axis=2) * 17
PALETTE, PALETTE_RGB = palette()
PALETTE_NUMBERS = np.asarray(PALETTE)
BILEVEL = picture(GRAY).convert("1")
BILEVEL_RGB = np.repeat(np.asarray(BILEVEL)[..., None], 3, axis=2) * 255
CMYK = picture(COLOR).convert("CMYK")
LINEAR_RGB = ((1.055 * (GRAY_RGB / 255) ** (1 / 2.4)) - 0.055) * 255
PREMULTIPLIED = np.dstack([np.round(COLOR * (FADE[..., None] / 255)).astype(np.uint8), FADE])
SEEN = FADE > 100  # where a multiplied color has not lost too many of its levels

# writer, RGB in 0..255, alpha in 0..255 or None, how many levels it may be off
KINDS = {
    "png": (save(picture(COLOR), "a.png"), COLOR, None, 0),
    "bmp": (save(picture(COLOR), "a.bmp"), COLOR, None, 0),
    "ppm": (save(picture(COLOR), "a.ppm"), COLOR, None, 0),
    "tiff": (save(picture(COLOR), "a.tif"), COLOR, None, 0),
    "tiff-lzw": (save(picture(COLOR), "a.tiff", compression="tiff_lzw"), COLOR, None, 0),
    "jpeg": (save(picture(COLOR), "a.jpg", quality=95), COLOR, None, 8),
    "gray-jpeg": (save(picture(GRAY), "a.jpeg", quality=95), GRAY_RGB, None, 4),
    "webp": (save(picture(COLOR), "a.webp", lossless=True), COLOR, None, 0),
    "webp-alpha": (save(picture(RGBA), "a.webp", lossless=True, exact=True), COLOR, FADE, 0),
    "avif": (save(picture(COLOR), "a.avif", quality=100), COLOR, None, 8),
    "avif-alpha": (save(picture(RGBA), "a.avif", quality=100), COLOR, FADE, 16),
    "jp2": (save(picture(COLOR), "a.jp2"), COLOR, None, 0),
    "wrong-extension": (save(picture(COLOR), "a.jpg", format="PNG"), COLOR, None, 0),
    "gray": (save(picture(GRAY), "a.png"), GRAY_RGB, None, 0),
    "gray-alpha": (save(picture(np.dstack([GRAY, FADE])), "a.png"), GRAY_RGB, FADE, 0),
    "rgba": (save(picture(RGBA), "a.png"), COLOR, FADE, 0),
    "bilevel": (save(BILEVEL, "a.png"), BILEVEL_RGB, None, 0),
    "bilevel-tiff": (save(BILEVEL, "a.tif"), BILEVEL_RGB, None, 0),
    "palette": (save(PALETTE, "a.png"), PALETTE_RGB, None, 0),
    "palette-key": (save(PALETTE, "a.png", transparency=3), PALETTE_RGB, 255 * (PALETTE_NUMBERS != 3), 0),
    "palette-alphas": (
        save(PALETTE, "a.png", transparency=bytes(range(0, 256, 17))),
        PALETTE_RGB,
        PALETTE_NUMBERS * 17,
        0,
    ),
    "gif": (save(PALETTE, "a.gif"), PALETTE_RGB, None, 0),
    "gif-key": (save(PALETTE, "a.gif", transparency=3), PALETTE_RGB, 255 * (PALETTE_NUMBERS != 3), 0),
    "rgb-key": (save(picture(COLOR), "a.png", transparency=(30, 30, 30)), COLOR, 255 * (COLOR.sum(2) != 90), 0),
    "gray-key": (save(picture(GRAY), "a.png", transparency=30), GRAY_RGB, 255 * (GRAY != 30), 0),
    "gray-key-of-4-bits": (
        content("a.png", png((2, 2), 4, 0, [b"\x3f", b"\x07"], [3])),
        np.array([[51, 255], [0, 119]])[..., None].repeat(3, 2),
        np.array([[0, 255], [255, 255]]),
        0,
    ),
    "bilevel-key": (
        content("a.png", png((2, 1), 1, 0, [b"\x40"], [1])),
        np.array([[0, 255]])[..., None].repeat(3, 2),
        np.array([[255, 0]]),
        0,
    ),
    "gray16": (content("a.png", png16(GRAY16)), GRAY_RGB, None, 0),
    "gray16-between-levels": (content("a.png", png16(GRAY16 + 100)), GRAY_RGB + 100 / 257, None, 0),
    "gray16-key": (content("a.png", png16(GRAY16, [30 * 257])), GRAY_RGB, 255 * (GRAY != 30), 0),
    "gray16-alpha": (content("a.png", png16(np.dstack([GRAY, FADE]).astype(np.uint16) * 257)), GRAY_RGB, FADE, 0),
    "rgb16": (content("a.png", png16(COLOR.astype(np.uint16) * 257)), COLOR, None, 0),
    "rgb16-key": (
        content("a.png", png16(COLOR.astype(np.uint16) * 257, [30 * 257] * 3)),
        COLOR,
        255 * (COLOR.sum(2) != 90),
        0,
    ),
    "rgba16": (content("a.png", png16(RGBA.astype(np.uint16) * 257)), COLOR, FADE, 0),
    "gray16-tiff-little": (content("a.tif", tiff(GRAY16, "<", 1)), GRAY_RGB, None, 0),
    "gray16-tiff-big": (content("a.tif", tiff(GRAY16, ">", 1)), GRAY_RGB, None, 0),
    "rgb16-tiff-little": (content("a.tif", tiff(COLOR.astype(np.uint16) * 257, "<", 2)), COLOR, None, 0),
    "rgb16-tiff-big": (content("a.tif", tiff(COLOR.astype(np.uint16) * 257, ">", 2)), COLOR, None, 0),
    "negative-tiff": (content("a.tif", tiff(255 - GRAY, "<", 0)), GRAY_RGB, None, 0),
    "negative16-tiff": (content("a.tif", tiff(65535 - GRAY16, "<", 0)), GRAY_RGB, None, 0),
    "12-bit-tiff": (content("a.tif", tiff(GRAY_12, "<", 1, bits=12)), GRAY_RGB, None, 0.04),
    "rgb16-between-levels": (content("a.png", png16(COLOR16)), COLOR + 100 / 257, None, 0),
    "rgba16-between-levels": (content("a.png", png16(RGBA16)), COLOR + 100 / 257, (RGBA16[..., 3] / 257), 0),
    "rgb16-tiff-between-levels": (content("a.tif", tiff(COLOR16, ">", 2)), COLOR + 100 / 257, None, 0),
    "rgb16-tiff-turned": (
        content("a.tif", tiff(np.rot90(COLOR16), "<", 2, more={274: [6]})),
        COLOR + 100 / 257,
        None,
        0,
    ),
    "12-of-16-bits-rgb": (
        content("a.tif", tiff(np.round(COLOR * (4095 / 255)).astype(np.uint16), "<", 2, more={281: [4095] * 3})),
        COLOR,
        None,
        0.04,
    ),
    "12-of-16-bits": (content("a.tif", tiff(GRAY_16_12, "<", 1, more=MAX_12)), GRAY_RGB, None, 0.04),
    "12-of-16-bits-big": (content("a.tif", tiff(GRAY_16_12, ">", 1, more={341: [4095]})), GRAY_RGB, None, 0.04),
    "12-of-16-bits-negative": (content("a.tif", tiff(4095 - GRAY_16_12, "<", 0, more=MAX_12)), GRAY_RGB, None, 0.04),
    "7-of-8-bits": (content("a.tif", tiff(GRAY // 2, "<", 1, more={281: [127]})), GRAY_RGB, None, 2),
    "7-of-8-bits-negative": (content("a.tif", tiff(127 - GRAY // 2, "<", 0, more={281: [127]})), GRAY_RGB, None, 2),
    "7-of-8-bits-rgb": (content("a.tif", tiff(COLOR // 2, "<", 2, more={281: [127] * 3})), COLOR, None, 2),
    "uint32-max-16-bits": (
        content("a.tif", tiff(GRAY16.astype(np.uint32), "<", 1, more={281: [65535]})),
        GRAY_RGB,
        None,
        0,
    ),
    "uint32-full": (
        content("a.tif", tiff(GRAY.astype(np.uint32) * 0x01010101, "<", 1, more={281: [2**32 - 1]})),
        GRAY_RGB,
        None,
        0,
    ),
    "statistic": (content("a.tif", tiff(GRAY, "<", 1, more={280: [30], 281: [int(GRAY.max())]})), GRAY_RGB, None, 0),
    "statistic-rgb16": (
        content("a.tif", tiff(COLOR.astype(np.uint16) * 257, "<", 2, more={281: [int(COLOR.max()) * 257] * 3})),
        COLOR,
        None,
        0,
    ),
    "planes-apart": (content("a.tif", tiff(np.moveaxis(COLOR, 2, 0), "<", 2, more={284: [2]})), COLOR, None, 0),
    "4-bit-negative": (content("a.tif", tiff(~FOUR_BITS, "<", 0, bits=4)), FOUR_BITS_RGB, None, 0),
    "float-of-255": (
        content("a.tif", tiff(GRAY.astype(np.float32), "<", 1, more=FLOAT | {341: [255.0]})),
        GRAY_RGB,
        None,
        0,
    ),
    "float-negative": (
        content("a.tif", tiff(1 - GRAY.astype(np.float32) / 255, ">", 0, more=FLOAT)),
        GRAY_RGB,
        None,
        0,
    ),
    "palette-of-8-bits": (
        content("a.tif", tiff(255 - GRAY, "<", 3, more={320: [*range(255, -1, -1)] * 3})),
        GRAY_RGB,
        None,
        0,
    ),
    "multi-channel": (
        content("a.tif", tiff(np.dstack([COLOR, FADE, GRAY]), "<", 2, more={338: [0, 0]})),
        COLOR,
        None,
        0,
    ),
    "pgm-of-12-bits": (
        content("a.pgm", b"P5 32 24 4095\n" + GRAY_16_12.astype(">u2").tobytes()),
        GRAY_RGB,
        None,
        0.04,
    ),
    "float-tiff": (save(picture(GRAY.astype(np.float32) / 255), "a.tif"), GRAY_RGB, None, 0),
    "cmyk-tiff": (save(CMYK, "a.tif"), COLOR, None, 1),
    "cmyk-jpeg": (save(CMYK, "a.jpg", quality=95), COLOR, None, 16),
    "ycbcr-tiff": (save(picture(COLOR).convert("YCbCr"), "a.tif"), COLOR, None, 3),
    "lab-tiff": (save(picture(COLOR).convert("LAB"), "a.tif"), COLOR, None, 16),
    "gray-profile": (save(picture(GRAY), "a.png", icc_profile=gray_profile()), LINEAR_RGB, None, 1),
    "gray-profile-alpha": (
        save(picture(np.dstack([GRAY, FADE])), "a.png", icc_profile=gray_profile()),
        LINEAR_RGB,
        FADE,
        1,
    ),
    "gray16-profile": (save(picture(GRAY16), "a.png", icc_profile=gray_profile()), LINEAR_RGB, None, 1),
    "gif-animated": (frames(PALETTE, "a.gif"), PALETTE_RGB, None, 0),
    "apng": (frames(picture(COLOR), "a.apng", format="PNG"), COLOR, None, 0),
    "webp-animated": (
        frames(picture(COLOR), "a.webp", lossless=True),
        COLOR,
        None,
        0,
    ),
    "tiff-pages": (frames(picture(COLOR), "a.tif"), COLOR, None, 0),
    "mpo": (frames(picture(COLOR), "a.jpg", format="MPO", quality=95), COLOR, None, 8),
    "one-pixel": (save(picture(COLOR[:1, :1]), "a.png"), COLOR[:1, :1], None, 0),
}


def needs(name: str) -> None:
    """Skip a kind that the installed Pillow cannot write or read."""
    for kind, feature in {"avif": "avif", "webp": "webp", "jp2": "jpg_2000"}.items():
        if name.startswith(kind) and f".{kind}" not in IMAGE_EXTENSIONS:
            pytest.skip(f"Pillow was built without {feature}")
    if name in ("ycbcr-tiff", "gray-multiplied") and PIL_MAJOR < 13:
        pytest.skip("older Pillow refuses these")


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_picture_is_read(tmp_path: Path, name: str) -> None:
    needs(name)
    write, rgb, alpha, tolerance = KINDS[name]
    path = write(tmp_path)
    with warnings.catch_warnings(action="error"):
        read = load_picture(path)
    assert read.image.shape == (3, *rgb.shape[:2]) and read.image.dtype == torch.float32
    assert read.image.is_contiguous() and torch.equal(read.image, load_image(path))
    seen = np.full(rgb.shape[:2], True) if alpha is None else alpha > 0
    assert np.abs(read.image.permute(1, 2, 0).numpy() * 255 - rgb)[seen].max() <= tolerance + 1e-3
    if alpha is None:
        assert read.alpha is None
    else:
        assert read.alpha is not None and read.alpha.dtype == torch.float32
        assert np.abs(read.alpha[0].numpy() * 255 - alpha).max() <= (8 if "avif" in name else 1e-3)


@pytest.mark.parametrize("order", ["<", ">"])
def test_multiplied_colors_are_divided_by_their_alpha(tmp_path: Path, order: str) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(PREMULTIPLIED, order, 2, extra=1))
    read = load_picture(tmp_path / "a.tif")
    assert np.abs(read.image.permute(1, 2, 0).numpy() * 255 - COLOR)[SEEN].max() < 3
    assert read.alpha is not None and torch.equal(read.alpha[0] * 255, torch.from_numpy(FADE).float())


@pytest.mark.parametrize("order", ["<", ">"])
def test_multiplied_gray_is_divided_by_its_alpha(tmp_path: Path, order: str) -> None:
    needs("gray-multiplied")
    (tmp_path / "a.tif").write_bytes(tiff(PREMULTIPLIED[..., [1, 3]], order, 1, extra=1))
    read = load_picture(tmp_path / "a.tif")
    assert np.abs(read.image[0].numpy() * 255 - GRAY)[SEEN].max() < 3 and read.alpha is not None


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "a.avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(tmp_path: Path, name: str, orientation: int) -> None:
    needs(name[2:])
    picture(COLOR).save(tmp_path / name, exif=turned(orientation), **({} if name == "a.webp" else {"quality": 95}))
    mirrored = COLOR[:, ::-1] if orientation in (2, 4, 5, 7) else COLOR
    quarters = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}[orientation]
    upright = np.rot90(mirrored, quarters)
    read = load_image(tmp_path / name).permute(1, 2, 0).numpy() * 255
    assert read.shape == upright.shape and np.abs(read - upright).mean() < 4


def test_alpha_and_16_bit_gray_are_turned_too(tmp_path: Path) -> None:
    picture(RGBA).save(tmp_path / "a.png", exif=turned(6))
    read = load_picture(tmp_path / "a.png")
    assert read.alpha is not None
    assert np.array_equal(np.round(read.alpha[0].numpy() * 255), np.rot90(FADE, 3))
    picture(GRAY16).save(tmp_path / "b.png", exif=turned(8))
    assert np.array_equal(np.round(load_image(tmp_path / "b.png")[0].numpy() * 255), np.rot90(GRAY, 1))


@pytest.mark.parametrize(("name", "orientation"), [("a.tif", 1), *(("a.png", number) for number in range(1, 9))])
def test_colors_of_16_bits_are_read_whole_and_turned(tmp_path: Path, name: str, orientation: int) -> None:
    colors = torch.rand(4, 5, 7, generator=torch.Generator().manual_seed(0)).mul(65535).round() / 65535
    numbers, exif = Image.fromarray(np.arange(35, dtype=np.uint8).reshape(5, 7)), Image.Exif()
    exif[ExifTags.Base.Orientation] = numbers.getexif()[ExifTags.Base.Orientation] = orientation
    order = torch.from_numpy(np.asarray(ImageOps.exif_transpose(numbers)).astype(np.int64))
    upright = colors.flatten(1)[:, order]
    save_image(tmp_path / name, colors[:3], colors[3:], writing=Writing(bits=16, exif=exif))
    read = load_picture(tmp_path / name)
    assert read.alpha is not None and torch.equal(torch.cat([read.image, read.alpha]), upright) and read.note is None


def test_colors_multiplied_by_alpha_are_read_with_8_bits_and_this_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(RGBA16 // 2, "<", 2, extra=1))
    read = load_picture(tmp_path / "a.tif")
    assert read.note == "its colors are read with 8 of their 16 bits" and read.bits == 16


def test_damaged_exif_does_not_spoil_a_picture(tmp_path: Path) -> None:
    picture(COLOR).save(tmp_path / "a.png", exif=b"Exif\0\0" + b"no directory of tags")
    read = load_picture(tmp_path / "a.png")
    assert torch.equal(read.image, torch.from_numpy(COLOR).permute(2, 0, 1).float() / 255)
    assert read.note == "its EXIF data are damaged: taken as upright"


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("gif-animated", "animated: first of 3 frames"),
        ("apng", "animated: first of 3 frames"),
        ("webp-animated", "animated: first of 3 frames"),
        ("tiff-pages", "first of 3 pages"),
        ("mpo", "first of 3 pictures"),
        ("gray-profile", "colors converted from its GRAY profile to sRGB"),
        ("png", None),
        ("gif", None),
    ],
)
def test_what_was_left_out_is_said(tmp_path: Path, name: str, note: str | None) -> None:
    needs(name)
    assert load_picture(KINDS[name][0](tmp_path)).note == note


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "avif"])
def test_an_rgb_profile_is_kept(tmp_path: Path, suffix: str) -> None:
    needs(suffix)
    picture(COLOR).save(tmp_path / f"a.{suffix}", icc_profile=SRGB)
    read = load_picture(tmp_path / f"a.{suffix}")
    assert read.icc_profile == SRGB and read.note is None


@pytest.mark.parametrize("name", ["palette", "rgba"])
def test_an_rgb_profile_is_kept_for_pictures_that_become_rgb(tmp_path: Path, name: str) -> None:
    image = {"palette": PALETTE, "rgba": picture(RGBA)}[name]
    image.save(tmp_path / "a.png", icc_profile=SRGB)
    read = load_picture(tmp_path / "a.png")
    assert read.icc_profile == SRGB and not read.is_gray


def test_an_rgb_profile_of_gray_is_applied_as_no_gray_file_may_have_one(tmp_path: Path) -> None:
    picture(GRAY).save(tmp_path / "a.png", icc_profile=SRGB)
    read = load_picture(tmp_path / "a.png")
    assert (read.icc_profile, read.is_gray) == (None, True)
    assert np.array_equal(np.round(read.image[0].numpy() * 255), GRAY)


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_a_cmyk_profile_is_applied(tmp_path: Path, suffix: str) -> None:
    inks = np.zeros((16, 16, 4), dtype=np.uint8)
    inks[:, :8, 0] = 255
    inks[8:, :, 3] = 255
    image = Image.frombytes("CMYK", (16, 16), inks.tobytes())
    image.save(tmp_path / f"a.{suffix}", icc_profile=cmyk_profile())
    read = load_picture(tmp_path / f"a.{suffix}")
    assert (read.icc_profile, read.note) == (None, "colors converted from its CMYK profile to sRGB")
    assert read.image[:, :8].min() > 0.97 and read.image[:, 8:].max() < 0.03
    image.save(tmp_path / f"b.{suffix}")
    assert load_image(tmp_path / f"b.{suffix}")[0, :8, :8].max() < 0.03


@pytest.mark.parametrize(
    ("image", "profile", "space"),
    [
        (picture(COLOR), gray_profile(), "GRAY"),
        (picture(COLOR), cmyk_profile(), "CMYK"),
        (picture(GRAY), cmyk_profile(), "CMYK"),
        (CMYK, SRGB, "RGB"),
        (CMYK, gray_profile(), "GRAY"),
        (picture(COLOR), SRGB[:100], "damaged"),
        (picture(COLOR), b"no profile" * 20, "damaged"),
        (picture(GRAY), gray_profile()[:140], "damaged"),
        (CMYK, cmyk_profile()[:-1000], "CMYK"),
        (CMYK, icc(b"prtr", b"CMYK", b"Lab ", {}), "CMYK"),
    ],
    ids=itertools.count(),  # profiles hold the time, and every process must name the tests alike
)
def test_a_profile_that_does_not_fit_is_left_out(
    tmp_path: Path, image: Image.Image, profile: bytes, space: str
) -> None:
    image.save(tmp_path / "a.tif")
    plain = load_image(tmp_path / "a.tif")
    image.save(tmp_path / "b.tif", icc_profile=profile)
    read = load_picture(tmp_path / "b.tif")
    assert torch.equal(read.image, plain) and read.icc_profile is None
    assert read.note == f"its color profile ({space}) does not fit and is left out"


def test_extensions_are_those_that_pillow_reads() -> None:
    reads = Image.registered_extensions().keys()
    assert {extension for extension in IMAGE_EXTENSIONS if extension not in {*reads, ".jpe", ".jfif"}} == set()
    assert {".png", ".jpg", ".gif", ".tif", ".bmp"} <= IMAGE_EXTENSIONS and (".heic" in IMAGE_EXTENSIONS) == READS_HEIC
    assert (".jp2" in IMAGE_EXTENSIONS) == features.check("jpg_2000")


def half(name: str, **options) -> Callable[[Path], Path]:
    """A picture whose second half is missing."""

    def write(folder: Path) -> Path:
        path = save(picture(smooth(120, 120)), name, **options)(folder)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return path

    return write


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "a.png")
    return folder / "a.png"


def a_folder(folder: Path) -> Path:
    (folder / "a.png").mkdir()
    return folder / "a.png"


def dead_link(folder: Path) -> Path:
    (folder / "a.png").symlink_to("gone.png")
    return folder / "a.png"


DAMAGED = r"it is truncated or damaged \(.+\); copy it again or remove it$"
NO_PICTURE = "it holds no picture in a known format, or a damaged one, or one of zero pixels; copy it again, "
BMP_HEADER = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 0, 5, 1, 24, 0, 0, 0, 0, 0, 0)
TOO_LARGE = (
    f"it has {BIG} x {BIG} = {BIG**2} pixels, more than the limit of 178956970; "
    f"if you trust the file, allow it with max_pixels={BIG**2}$"
)

# writer, what the line says after the name of the file
BAD = {
    "empty": (content("a.png", b""), "the file is empty; copy it again or remove it$"),
    "text": (content("a.png", b"hello"), NO_PICTURE),
    "html": (content("a.jpg", b"<html><body>404</body></html>"), NO_PICTURE),
    "zeros": (content("a.jpg", bytes(1000)), NO_PICTURE),
    "png-signature-only": (content("a.png", b"\x89PNG\r\n\x1a\n"), NO_PICTURE),
    "jpeg-start-only": (content("a.jpg", b"\xff\xd8\xff\xe0"), NO_PICTURE),
    "png-half": (half("a.png"), DAMAGED),
    "jpeg-half": (half("a.jpg"), DAMAGED),
    "webp-half": (half("a.webp"), DAMAGED),
    "gif-half": (half("a.gif"), DAMAGED),
    "bmp-half": (half("a.bmp"), DAMAGED),
    "ppm-half": (half("a.ppm"), DAMAGED),
    "tiff-half": (half("a.tif"), DAMAGED),
    "tiff-lzw-half": (half("a.tif", compression="tiff_lzw"), NO_PICTURE),
    "avif-half": (half("a.avif"), NO_PICTURE),
    "jp2-half": (half("a.jp2"), DAMAGED),
    "png-0x5": (content("a.png", png((0, 5), 8, 2, [b""])), NO_PICTURE),
    "png-5x0": (content("a.png", png((5, 0), 8, 2, [b""])), NO_PICTURE),
    "bmp-0x5": (content("a.bmp", BMP_HEADER), NO_PICTURE),
    "ppm-0x5": (content("a.ppm", b"P6 0 5 255\n"), NO_PICTURE),
    "png-too-large": (content("a.png", png((BIG, BIG), 8, 2, [b""])), TOO_LARGE),
    "ppm-too-large": (content("a.ppm", f"P6 {BIG} {BIG} 255\n".encode()), TOO_LARGE),
    "float-above-1": (save(picture(GRAY.astype(np.float32)), "a.tif"), r"values of a 'F' picture must be in \[0, 1\]"),
    "float-nan": (save(picture(np.full((4, 4), np.nan, np.float32)), "a.tif"), r"must be in \[0, 1\]; scale them$"),
    "int-of-pillow": (save(picture(GRAY16.astype(np.int32)), "a.tif"), "its samples are signed, so black is unknown; "),
    "signed-8": (content("a.tif", tiff(GRAY, "<", 1, more={339: [2]})), "its samples are signed"),
    "signed-16": (content("a.tif", tiff(GRAY16, ">", 1, more={339: [2]})), "its samples are signed"),
    "uint32": (content("a.tif", tiff(GRAY.astype(np.uint32), "<", 1)), r"its white is unknown \(32-bit samples"),
    "12-of-16-bits-cmyk": (
        content("a.tif", tiff(RGBA.astype(np.uint16) * 16, "<", 5, more={281: [4095] * 4})),
        "its samples use a part of their bits",
    ),
    "max-1000": (
        content("a.tif", tiff(GRAY16 // 128, "<", 1, more={281: [1000]})),
        r"its white is unknown \(MaxSampleValue 1000",
    ),
    "dark-statistic": (
        content("a.tif", tiff(GRAY16 // 128, "<", 1, more={281: [int((GRAY16 // 128).max())]})),
        "its white is unknown",
    ),
    "min-100": (
        content("a.tif", tiff(GRAY16, "<", 1, more={280: [100]})),
        r"its black is unknown \(MinSampleValue 100\)",
    ),
    "above-max": (content("a.tif", tiff(GRAY16, "<", 1, more=MAX_12)), r"must be in \[0, 4095\]; scale them$"),
    "float-below-0": (
        content("a.tif", tiff(GRAY.astype(np.float32) / 127 - 1, "<", 1, more=FLOAT)),
        r"must be in \[0, 1\]",
    ),
    "no-photometric": (content("a.tif", tiff(GRAY, "<", None)), "it does not say whether 0 is black"),
    "negative-apart": (
        content("a.tif", tiff(GRAY[None], "<", 0, more={284: [2]})),
        "its planes are stored apart, in a form that cannot be read; interleave its samples$",
    ),
    "rgb16-apart": (
        content("a.tif", tiff(np.moveaxis(COLOR, 2, 0).astype(np.uint16) * 257, "<", 2, more={284: [2]})),
        "its planes are stored apart",
    ),
    "half-floats": (content("a.tif", tiff(GRAY.astype(np.float16), "<", 1, more=FLOAT)), NO_PICTURE),
    "spider": (save(picture(GRAY.astype(np.float32) / 255), "a.spider", format="SPIDER"), "its white is unknown"),
    "folder": (a_folder, "it is a folder; give a file$"),
    "pipe": (fifo, "it is a pipe, a socket or a device; give a regular file$"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_gets_one_line_with_its_name_and_a_remedy(tmp_path: Path, name: str) -> None:
    needs(name)
    write, message = BAD[name]
    path = write(tmp_path)
    with warnings.catch_warnings(action="error"), pytest.raises(UserError, match=message) as caught:
        load_picture(path)
    assert str(caught.value).startswith(f"cannot read the image {path}: ")
    assert "\n" not in str(caught.value) and str(caught.value).count(str(path)) == 1


def test_missing_files_and_dead_links_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^no such image: .*/gone.png$"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(UserError, match=r"^no such image: .*/a.png \(a link to gone.png, which is not there\)$"):
        load_image(dead_link(tmp_path))


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(picture(COLOR), "a.png")(tmp_path)

    def refuse(*args) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    # a test that runs as root may read everything
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(UserError, match=r"a.png: no permission to read it; change that \(chmod \+r\) or remove it$"):
        load_image(path)


def test_max_pixels_allows_less_and_more_than_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(picture(COLOR), "a.png")(tmp_path)
    with pytest.raises(UserError, match="32 x 24 = 768 pixels, more than the limit of 767; .* max_pixels=768$"):
        load_picture(path, max_pixels=767)
    assert load_picture(path, max_pixels=768).image.shape == (3, 24, 32)
    # Pillow warns above its limit and raises above twice its limit
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.raises(UserError, match="more than the limit of 600"):
        load_picture(path)
    assert load_picture(path, max_pixels=768).image.shape == (3, 24, 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with warnings.catch_warnings(action="error"):
        assert load_picture(path).image.shape == (3, 24, 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_picture(path).image.shape == (3, 24, 32)


def test_a_large_picture_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(picture(COLOR), "a.jpg")(tmp_path)

    def decode(self) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(UserError, match="max_pixels=768"):
        load_picture(path, max_pixels=100)


def test_pillow_is_left_as_it_was(tmp_path: Path) -> None:
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    good = save(picture(COLOR), "good.png")(tmp_path)
    (tmp_path / "bad.png").write_bytes(b"hello")
    for path, max_pixels in [(good, 10), (good, 10**9), (good, None), (tmp_path / "bad.png", 10)]:
        try:
            load_picture(path, max_pixels)
        except UserError:
            pass
        assert limit == Image.MAX_IMAGE_PIXELS and warnings.filters == filters


def test_opening_does_not_decode_and_may_be_nested(tmp_path: Path) -> None:
    first, second = half("a.png")(tmp_path), save(picture(COLOR), "b.png")(tmp_path)
    with open_image(first) as one, open_image(second) as two:
        assert (one.size, two.size) == ((120, 120), (32, 24))


def test_saving_rounds_and_loads_back(tmp_path: Path) -> None:
    levels = torch.arange(256).float().reshape(1, 16, 16).expand(3, -1, -1)
    save_image(tmp_path / "new" / "a.png", ((levels + 0.49) / 255).clamp(0, 1))
    assert torch.equal(load_image(tmp_path / "new" / "a.png"), levels / 255)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_alpha_and_profile_are_saved(tmp_path: Path) -> None:
    img = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    save_image(tmp_path / "a.png", img, 1 - img[:1], SRGB)
    read = load_picture(tmp_path / "a.png")
    assert read.alpha is not None and read.icc_profile == SRGB
    assert (read.image - img).abs().max() <= 0.5 / 255 + 1e-6
    assert (read.alpha - (1 - img[:1])).abs().max() <= 0.5 / 255 + 1e-6
    save_image(tmp_path / "b.png", img)
    plain = load_picture(tmp_path / "b.png")
    assert (plain.alpha, plain.icc_profile, plain.note) == (None, None, None)


def cut_out(hidden: np.ndarray) -> np.ndarray:
    """A red half disc beside a blue one that fade out, with other colors where nothing is visible; RGBA."""
    rows, columns = np.mgrid[:24, :32]
    alpha = np.clip(9.5 - np.hypot(rows - 11.5, columns - 15.5), 0, 1)[..., None]
    colors = np.where(columns[..., None] < 16, [200, 20, 30], [10, 40, 220])
    return np.dstack([np.where(alpha > 0, colors, hidden), np.ceil(alpha * 255)]).astype(np.uint8)


HIDDEN = {
    "black": np.zeros((24, 32, 3)),
    "noise": np.random.default_rng(0).integers(0, 256, (24, 32, 3)),
}


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_colors_that_nobody_sees_do_not_matter(tmp_path: Path, name: str) -> None:
    needs(name[2:])
    options = {"lossless": True, "exact": True} if name == "a.webp" else {}
    read = {}
    for kind, hidden in HIDDEN.items():
        picture(cut_out(hidden)).save(tmp_path / name, **options)
        read[kind] = load_picture(tmp_path / name)
        assert torch.equal(load_image(tmp_path / name), read[kind].image)
    assert torch.equal(read["black"].image, read["noise"].image)
    seen = read["black"].alpha[0] > 0
    assert torch.equal(
        read["black"].image[:, seen] * 255, torch.tensor(cut_out(HIDDEN["black"])[seen][:, :3].T).float()
    )


def test_colors_go_on_where_nothing_is_visible(tmp_path: Path) -> None:
    picture(cut_out(HIDDEN["noise"])).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png") * 255
    assert torch.allclose(image[:, 11, 0], torch.tensor([200.0, 20, 30]), atol=30)
    assert torch.allclose(image[:, 11, 31], torch.tensor([10.0, 40, 220]), atol=30)
    # no mixture leaves what is between the two colors
    low, high = torch.tensor([10.0, 20, 30]), torch.tensor([200.0, 40, 220])
    assert ((image.amin((1, 2)) >= low - 1e-3) & (image.amax((1, 2)) <= high + 1e-3)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (16, 16)])
def test_one_visible_pixel_gives_its_color_to_all(tmp_path: Path, size: tuple[int, int]) -> None:
    pixels = np.zeros((*size, 4), np.uint8)
    pixels[-1, -1] = 60, 120, 180, 1
    picture(pixels).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png") * 255
    assert torch.allclose(image, torch.tensor([60.0, 120, 180])[:, None, None].expand_as(image), atol=1e-3)


@pytest.mark.parametrize("key", [None, 3])
def test_a_picture_of_which_nothing_is_visible(tmp_path: Path, key: int | None) -> None:
    image = picture(np.full((6, 8), 3, np.uint8)) if key else picture(RGBA * np.array([1, 1, 1, 0], np.uint8))
    image.save(tmp_path / "a.png", **({"transparency": key} if key else {}))
    read = load_picture(tmp_path / "a.png")
    assert read.alpha is not None and not read.alpha.any() and not read.image.any()
    with pytest.raises(UserError, match=r"a\.png: it is wholly transparent; give it colors or remove it$"):
        load_image(tmp_path / "a.png")


GRAY_PALETTE = picture(GRAY).convert("P")
GRAY_KINDS = {
    "gray", "gray-jpeg", "gray-alpha", "bilevel", "bilevel-tiff", "gray-key", "gray-key-of-4-bits", "bilevel-key",
    "gray16", "gray16-between-levels", "gray16-key", "gray16-alpha", "gray16-tiff-little", "gray16-tiff-big",
    "negative-tiff", "negative16-tiff", "12-bit-tiff", "12-of-16-bits", "12-of-16-bits-big", "12-of-16-bits-negative",
    "7-of-8-bits", "7-of-8-bits-negative", "uint32-max-16-bits", "uint32-full", "statistic", "4-bit-negative",
    "float-of-255", "float-negative", "palette-of-8-bits", "pgm-of-12-bits", "float-tiff", "gray-profile",
    "gray-profile-alpha", "gray16-profile",
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_gray_is_known_by_its_file(tmp_path: Path, name: str) -> None:
    needs(name)
    read = load_picture(KINDS[name][0](tmp_path))
    assert read.is_gray == (name in GRAY_KINDS)
    assert not read.is_gray or is_gray(read.image)


def test_a_palette_of_grays_is_gray_and_equal_channels_are_a_choice_of_the_file(tmp_path: Path) -> None:
    assert load_picture(save(GRAY_PALETTE, "a.png")(tmp_path)).is_gray
    assert load_picture(save(GRAY_PALETTE, "b.png", transparency=3)(tmp_path)).is_gray
    read = load_picture(save(picture(GRAY_RGB), "c.png")(tmp_path))
    assert is_gray(read.image) and not read.is_gray


def test_a_very_dark_16_bit_picture_gets_a_note(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png16(GRAY16 // 17))
    assert (load_picture(tmp_path / "a.png").note or "").startswith("very dark: ")
    (tmp_path / "b.png").write_bytes(png16(GRAY16 // 8))
    assert load_picture(tmp_path / "b.png").note is None


# extension: what Pillow calls its format, levels that reading it back may be off, whether it holds alpha
WRITTEN = {
    "png": ("PNG", 0, True),
    "PNG": ("PNG", 0, True),
    "tif": ("TIFF", 0, True),
    "tiff": ("TIFF", 0, True),
    "webp": ("WEBP", 0, True),
    "bmp": ("BMP", 0, False),
    "jpg": ("JPEG", 8, False),
    "jpeg": ("JPEG", 8, False),
}


@pytest.mark.parametrize("suffix", WRITTEN)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_file_is_of_the_format_that_its_name_says(tmp_path: Path, suffix: str, channels: int) -> None:
    needs(suffix)
    kind, tolerance, holds_alpha = WRITTEN[suffix]
    img = torch.from_numpy(COLOR).permute(2, 0, 1)[:channels].float() / 255
    path = tmp_path / f"a.{suffix}"
    save_image(path, img)
    with Image.open(path) as file:
        assert (file.format, len(file.getbands())) == (kind, 3 if suffix == "webp" else channels)
    assert (load_image(path) - img).abs().max() * 255 <= tolerance + 1e-3
    alpha = torch.from_numpy(FADE)[None].float() / 255
    if not holds_alpha:
        with pytest.raises(ValueError, match=rf"{kind} holds no transparency; give a name ending in \.png$"):
            save_image(path, img, alpha)
        return
    save_image(path, img, alpha)
    read = load_picture(path)
    assert read.alpha is not None and torch.equal(read.alpha, alpha)
    with Image.open(path) as file:
        assert len(file.getbands()) == (4 if suffix == "webp" else channels + 1)


@pytest.mark.parametrize("name", ["a", "a.gif", "a.jpg.part", "a.xyz", "png"])
def test_a_name_that_says_no_format_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"cannot write .*/{name}: wanted a name ending in \.png, \.jpg, "):
        save_image(tmp_path / name, torch.zeros(3, 4, 4))
    assert list(tmp_path.iterdir()) == []


def test_a_profile_is_not_lost_in_a_format_without(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="BMP holds no color profile"):
        save_image(tmp_path / "a.bmp", torch.zeros(3, 4, 4), None, SRGB)
    save_image(tmp_path / "a.jpg", torch.zeros(3, 4, 4), None, SRGB)
    assert load_picture(tmp_path / "a.jpg").icc_profile == SRGB


UNIT = torch.linspace(0, 1, 72).reshape(3, 6, 4)
NO_PICTURES = {
    "uint8": ((UNIT * 255).to(torch.uint8), r"got torch\.uint8: use x\.float\(\) / 255"),
    "int64": ((UNIT * 255).long(), r"got torch\.int64: use floats"),
    "bool": (UNIT > 0.5, r"got torch\.bool: use floats"),
    "0..255": (UNIT * 255, "got values from 0 to 255: use x / 255"),
    "-1..1": (UNIT * 2 - 1, r"got values from -1 to 1: use \(x \+ 1\) / 2"),
    "overshoot": (UNIT * 1.1, r"got values from 0 to 1\.1: use x\.clamp\(0, 1\)"),
    "nan": (UNIT * float("nan"), "got NaN or infinite numbers"),
    "inf": (UNIT / 0, "got NaN or infinite numbers"),
    "numpy": (UNIT.numpy(), r"got numpy\.ndarray: use load_image for a file, torch\.from_numpy"),
    "pil": (picture(COLOR), r"got PIL\.Image\.Image"),
    "none": (None, "got builtins.NoneType"),
    "hwc": (UNIT.permute(1, 2, 0), r"got the shape \(6, 4, 3\): use x\.permute\(2, 0, 1\)"),
    "gray": (UNIT[:1], r"got the shape \(1, 6, 4\): use x\.expand\(3, -1, -1\)"),
    "gray-2d": (UNIT[0], r"got the shape \(6, 4\): use x\.expand\(3, -1, -1\)"),
    "rgba": (torch.rand(4, 8, 8), r"got the shape \(4, 8, 8\): take x\[:3\]"),
    "batch": (UNIT[None], r"got the shape \(1, 3, 6, 4\): give the pictures of a batch one by one"),
    "empty": (UNIT[:, :0], r"got the shape \(3, 0, 4\): it has no pixels"),
    "two": (UNIT[:2, :, :2], r"got the shape \(2, 6, 2\): give its red"),
}


@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_picture_in_the_range_is_named(name: str) -> None:
    given, message = NO_PICTURES[name]
    with pytest.raises(ValueError, match=message) as caught:
        as_picture(given)
    assert str(caught.value).startswith("wanted one RGB picture: a torch tensor (3, H, W), float, in [0, 1]; got ")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_floating_type_and_rounding_are_taken(dtype: torch.dtype) -> None:
    taken = as_picture((UNIT * 1.0005).to(dtype))
    assert taken.dtype == torch.float32 and taken.max() == 1 and (taken - UNIT).abs().max() < 0.01


@pytest.mark.parametrize("name", ["uint8", "int64", "0..255", "-1..1", "overshoot", "numpy"])
def test_what_is_out_of_range_is_not_saved(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"wanted .*; got |wanted a tensor, .* got ndarray"):
        save_image(tmp_path / "a.png", NO_PICTURES[name][0])
    with pytest.raises(UserError, match=r"the picture for .*a\.png is not finite"):
        save_image(tmp_path / "a.png", UNIT * float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_picture_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one RGB picture .* got shape"):
        save_image(tmp_path / "a.png", torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"alpha \(1, H, W\) of \(4, 4\)"):
        save_image(tmp_path / "a.png", torch.zeros(3, 4, 4), torch.zeros(1, 4, 5))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quality", [30, 49, 50, 75, 95])
def test_a_heavy_jpeg_is_told(tmp_path: Path, quality: int) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)).save(
        tmp_path / "a.jpg", quality=quality
    )
    note = load_picture(tmp_path / "a.jpg").note
    assert note is None if quality >= 50 else (note or "").startswith(f"a JPEG of quality {quality} or so: ")
