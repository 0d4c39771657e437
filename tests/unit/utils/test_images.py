import errno
import os

import pytest
import torch

from varestorer.utils.errors import UserError
from varestorer.utils.images import from_network, heat_map, pad_reflect, resize, to_network, to_uint8
from varestorer.utils.scanning import list_images


def test_to_uint8_rounds_and_clamps():
    values = torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255]


def test_ranges_are_inverse_and_clamped():
    img = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert to_network(img).min() < 0 and torch.allclose(from_network(to_network(img)), img)
    assert from_network(torch.tensor([-3.0, 3.0]).bfloat16()).tolist() == [0.0, 1.0]
    assert from_network(torch.zeros(1).bfloat16()).dtype == torch.float32


def test_heat_maps_run_from_dark_to_bright_over_a_fixed_range():
    values = torch.linspace(0, 1, 256).reshape(4, 64)
    colors = heat_map(values)
    assert colors.shape == (3, 4, 64) and colors.dtype == torch.float32
    luma = (colors * torch.tensor([0.2126, 0.7152, 0.0722])[:, None, None]).sum(0).flatten()
    assert (luma.diff() > 0).all() and luma[0] < 0.01 and luma[-1] > 0.9
    # not stretched to what a picture holds: halves are the same color everywhere, and outside values are clamped
    assert torch.equal(heat_map(torch.full((2, 2), 0.5))[:, 0, 0], heat_map(torch.tensor([[0.5, 1.0]]))[:, 0, 0])
    assert torch.equal(heat_map(torch.tensor([[-1.0, 2.0]])), heat_map(torch.tensor([[0.0, 1.0]])))


def lock(monkeypatch, folder):
    """Nobody may read a folder, not even root."""
    scandir = os.scandir

    def refuse(path):
        if str(path) == str(folder):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


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


@pytest.mark.parametrize(
    "name",
    ["@eaDir", "#recycle", "$RECYCLE.BIN", "$Recycle.Bin", ".Trash-1000", ".Trashes", "__MACOSX", "lost+found", ".git"],
)
def test_folders_of_systems_are_skipped(tmp_path, caplog, name):
    for path in (tmp_path / name / "a.png", tmp_path / "sub" / name / "b.png", tmp_path / "sub" / "c.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    assert list_images(tmp_path) == [tmp_path / "sub" / "c.png"] and not caplog.messages


def test_files_that_are_not_used_are_named_once(tmp_path, caplog):
    for name in ("._a.png", "Thumbs.db", "desktop.ini", ".DS_Store", "a.png", "b.heic", "sub/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "zlink").symlink_to(tmp_path / "sub")
    for _ in range(2):
        assert list_images(tmp_path) == [tmp_path / "a.png"]
    named = "b.heic, sub/notes.txt, zlink"
    assert caplog.messages == [f"{tmp_path}: 3 files are not used as images, by their extension: {named}"]


def test_a_folder_is_listed_under_its_own_name_before_a_link(tmp_path):
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "a.png").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "z")
    assert list_images(tmp_path) == [tmp_path / "z" / "a.png"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.png").write_bytes(b"")
    lock(monkeypatch, tmp_path / "locked")
    with pytest.raises(UserError, match=r"1 folders in .* cannot be read \(Permission denied\): .*locked; make them"):
        list_images(tmp_path)


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
    centers = (torch.arange(16) * 4 + 1.5) / 63
    for mode in ("bicubic", "bilinear", "area", "lanczos"):
        assert torch.allclose(resize(ramp, (16, 16), mode)[:, 8, 3:-3], centers[3:-3].expand(3, -1), atol=1e-3)


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
