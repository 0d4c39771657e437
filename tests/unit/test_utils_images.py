import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from varestorer.utils.errors import UserError
from varestorer.utils.images import (
    from_network,
    list_images,
    load_image,
    pad_reflect,
    resize,
    save_image,
    to_network,
    to_uint8,
)


def smooth(height=24, width=32):
    """A smooth colour picture, uint8 (H, W, 3): survives JPEG well."""
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [rows / height, columns / width, (rows + columns) / (height + width)]
    return (np.stack(planes, axis=2) * 200 + 30).astype(np.uint8)


def write_png16(path, array):
    """A 16-bit PNG of (H, W) or (H, W, 3) by hand: Pillow cannot write 16-bit colour."""
    height, width = array.shape[:2]

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if array.ndim == 2 else 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def as_array(img):
    return img.permute(1, 2, 0).numpy() * 255


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "jpg", "ppm"])
def test_common_formats(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(smooth()).save(path, **({"lossless": True} if suffix == "webp" else {}))
    img = load_image(path)
    assert img.shape == (3, 24, 32) and img.dtype == torch.float32 and img.is_contiguous()
    assert np.abs(as_array(img) - smooth()).mean() < (3 if suffix == "jpg" else 0.01)


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn clockwise to see it upright
    Image.fromarray(smooth()).save(tmp_path / "a.png", exif=exif)
    assert np.allclose(as_array(load_image(tmp_path / "a.png")), np.rot90(smooth(), -1), atol=0.01)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_pillow_modes(tmp_path, mode):
    picture = Image.fromarray(smooth()).convert(mode if mode != "LA" else "L").convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture.save(path)
    assert np.abs(as_array(load_image(path)) - np.asarray(picture.convert("RGB"))).max() <= 1


def test_alpha_is_ignored(tmp_path):
    rgba = np.dstack([smooth(), np.zeros((24, 32), np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert np.allclose(as_array(load_image(tmp_path / "a.png")), smooth(), atol=0.01)


def test_cmyk_jpeg(tmp_path):
    Image.fromarray(smooth()).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(as_array(load_image(tmp_path / "a.jpg")) - smooth()).mean() < 4


@pytest.mark.parametrize("colour", [False, True])
def test_16_bit_png(tmp_path, colour):
    array = smooth().astype(np.uint16) * 257
    write_png16(tmp_path / "a.png", array if colour else array[..., 0])
    expected = smooth() if colour else np.repeat(smooth()[..., :1], 3, axis=2)
    assert np.abs(as_array(load_image(tmp_path / "a.png")) - expected).max() < 1.01


def test_float_tiff(tmp_path):
    grey = smooth()[..., 0].astype(np.float32) / 255
    Image.fromarray(grey).save(tmp_path / "a.tif")
    assert np.allclose(load_image(tmp_path / "a.tif")[1], grey)
    Image.fromarray(grey * 300).save(tmp_path / "b.tif")
    with pytest.raises(UserError, match=r"b.tif.*\[0, 1\]"):
        load_image(tmp_path / "b.tif")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_truncated_file_is_named(tmp_path, suffix):
    Image.fromarray(smooth(200, 200)).save(tmp_path / f"whole.{suffix}")
    data = (tmp_path / f"whole.{suffix}").read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=f"cut.{suffix}"):
        load_image(tmp_path / f"cut.{suffix}")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_rubbish_is_named(tmp_path, content):
    (tmp_path / "rubbish.png").write_bytes(content)
    with pytest.raises(UserError, match="rubbish.png"):
        load_image(tmp_path / "rubbish.png")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such image.*gone.png"):
        load_image(tmp_path / "gone.png")


def test_saving_rounds_and_loads_back(tmp_path):
    levels = torch.arange(256).float().reshape(1, 16, 16).expand(3, -1, -1)
    save_image(tmp_path / "new" / "a.png", ((levels + 0.49) / 255).clamp(0, 1))
    assert torch.equal(load_image(tmp_path / "new" / "a.png") * 255, levels)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
    with pytest.raises(ValueError, match="one RGB picture"):
        save_image(tmp_path / "b.png", levels[None])


def test_to_uint8_rounds_and_clamps():
    values = torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255]


def test_ranges_are_inverse_and_clamped():
    img = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert to_network(img).min() < 0 and torch.allclose(from_network(to_network(img)), img)
    assert from_network(torch.tensor([-3.0, 3.0]).bfloat16()).tolist() == [0.0, 1.0]
    assert from_network(torch.zeros(1).bfloat16()).dtype == torch.float32


def test_listing_is_recursive_natural_and_quiet(tmp_path):
    for name in ("b/10.png", "b/2.PNG", "a.jpg", "notes.txt", ".hidden.png", "__MACOSX/c.png", ".git/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert names == ["a.jpg", "b/2.PNG", "b/10.png"]


def test_linked_folders_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_bytes(b"")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "real")
    assert [path.name for path in list_images(tmp_path / "root")] == ["a.png"]


def test_listing_what_is_no_folder(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="a.png is a file"):
        list_images(tmp_path / "a.png")
    with pytest.raises(UserError, match="gone does not exist"):
        list_images(tmp_path / "gone")


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "area", "lanczos"])
def test_resizing_keeps_mean_rank_and_range(mode):
    img = torch.rand(3, 33, 48, generator=torch.Generator().manual_seed(0)).round()
    small = resize(img, (11, 16), mode)
    assert small.shape == (3, 11, 16) and small.dtype == img.dtype
    assert abs(small.mean() - img.mean()) < 0.02 and 0 <= small.min() and small.max() <= 1
    # antialiasing: 3 x 3 pixels become one, so white noise loses most of its contrast
    assert small.std() < 0.6 * img.std()
    batch = resize(torch.stack([img, 1 - img]), (11, 16), mode)
    assert torch.equal(batch[0], small)
    assert torch.equal(resize(img, (33, 48), mode), img)


def test_resizing_a_ramp_is_exact_inside():
    ramp = torch.linspace(0, 1, 64).expand(3, 64, 64)
    centres = (torch.arange(16) * 4 + 1.5) / 63
    for mode in ("bicubic", "bilinear", "area", "lanczos"):
        assert torch.allclose(resize(ramp, (16, 16), mode)[:, 8, 3:-3], centres[3:-3].expand(3, -1), atol=1e-3)


def test_unknown_resize_mode():
    with pytest.raises(ValueError, match="mode must be"):
        resize(torch.zeros(3, 4, 4), (2, 2), "nearest")


@pytest.mark.parametrize("pads", [(3, 2, 0, 4), (0, 0, 1, 1)])
def test_small_reflection_is_torchs(pads):
    img = torch.rand(2, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    top, bottom, left, right = pads
    expected = torch.nn.functional.pad(img, (left, right, top, bottom), mode="reflect")
    assert torch.equal(pad_reflect(img, *pads), expected)


def test_reflection_beyond_the_picture_goes_back_and_forth():
    img = torch.tensor([[[0.0, 1.0, 2.0]]])
    assert pad_reflect(img, 0, 0, 5, 4)[0, 0].tolist() == [1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2]
    assert pad_reflect(img[..., :1], 2, 2, 2, 2).shape == (1, 5, 5)
