"""Photographs packed into webdataset shards, and read back by place."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from varestorer.data import BicubicDegradation, Degradation, PhotoCrops, build_loader
from varestorer.data import packing as packing_module
from varestorer.data import shards as shards_module
from varestorer.data.packing import pack
from varestorer.data.shards import INDEX, packed_photographs
from varestorer.data.text import EncoderRecord, TextWriter, write_captions
from varestorer.utils.errors import UserError
from varestorer.utils.files import cache_folder
from varestorer.utils.images import load_image


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    for number, name in enumerate(["a2.png", "a10.jpg", "sub/b.c.png", "sub/b_c.png", "sub/z.png"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(root / name)
    return root


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    write_captions(folder / "captions.json", {"a2.png": "a dog", "sub/b.c.png": "a cat", "sub/z.png": ""})
    writer = TextWriter(folder, EncoderRecord("encoder", "f", 8, "fp16"))
    prompts = {"a2.png": "a dog", "a10.jpg": "", "sub/b.c.png": "a cat"}
    writer.add(prompts, {"a2.png": torch.full((2, 4), 0.5), "sub/b.c.png": torch.full((3, 4), 1 / 3)})
    return folder


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tar(path, **members):
    """A tar file of somebody else's."""
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def png(level=0, side=8):
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def names(folder):
    return [sample.name for sample in packed_photographs(folder)]


def same(a, b):
    return a["key"] == b["key"] and torch.equal(a["hq"], b["hq"]) and torch.equal(a["lq"], b["lq"])


def test_shards_hold_the_files_as_they_were_in_natural_order(photos, tmp_path):
    packing = pack(tmp_path / "out", photos, 12_000)
    assert len(packing.shards) > 1 and packing.num_photographs == 5 and not packing.skipped
    assert names(tmp_path / "out") == ["a2.png", "a10.jpg", "sub/b_c.png", "sub/b_c_2.png", "sub/z.png"]
    packed = packed_photographs(tmp_path / "out")
    for sample, name in zip(packed, ["a2.png", "a10.jpg", "sub/b.c.png", "sub/b_c.png", "sub/z.png"], strict=True):
        assert sample.read(sample.image) == (photos / name).read_bytes()
        assert torch.equal(sample.load(), load_image(photos / name)) and sample.num_pixels() == 40 * 48
    assert packed[2].stem == "b_c"


def test_shards_are_the_same_bytes_every_time(photos, tmp_path):
    pack(tmp_path / "a", photos, 12_000)
    pack(tmp_path / "b", photos, 12_000)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_tar_files_are_plain_ones(photos, tmp_path):
    pack(tmp_path / "out", photos, 10**9)
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as file:
        infos = file.getmembers()
        assert [info.name for info in infos][:2] == ["a2.png", "a10.jpg"]
        assert {(info.mtime, info.uid, info.uname) for info in infos} == {(0, 0, "")}
        assert file.extractfile("sub/z.png").read() == (photos / "sub" / "z.png").read_bytes()


def test_packing_goes_on_after_an_interruption(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    pack(out, photos, 12_000)
    whole = bytes_of(out)
    (out / INDEX).unlink()
    last = sorted(out.glob("*.tar"))[-1]
    last.write_bytes(last.read_bytes()[:700])
    written = []
    write = packing_module._write
    monkeypatch.setattr(packing_module, "_write", lambda path, group: written.append(path.name) or write(path, group))
    pack(out, photos, 12_000)
    assert written == [last.name] and bytes_of(out) == whole


def test_another_photograph_of_the_same_name_and_size_is_packed(photos, texts, tmp_path):
    for number, level in enumerate((10, 200)):
        Image.new("RGB", (40, 48), (level, 0, 0)).save(photos / "a3.bmp")
        for folder in ("kept", f"fresh{number}"):
            pack(tmp_path / folder, photos, 12_000, str(texts))
        assert bytes_of(tmp_path / "kept") == bytes_of(tmp_path / f"fresh{number}")


def test_other_tar_files_are_left_alone(photos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    tar(out / "mine.tar", a__png=png())
    with pytest.raises(UserError, match=r"holds other tar files \(mine.tar"):
        pack(out, photos, 10**9)


def test_broken_photographs_are_named_and_left_out(photos, tmp_path):
    (photos / "a3.png").write_bytes(b"no picture")
    packing = pack(tmp_path / "out", photos, 10**9)
    assert packing.num_photographs == 5 and "a3.png" not in names(tmp_path / "out")
    assert len(packing.skipped) == 1 and "a3.png" in packing.skipped[0]


def test_pairs_from_shards_are_those_of_the_folder(photos, tmp_path):
    pack(tmp_path / "out", photos, 12_000)
    folder = PhotoCrops(str(photos), 24, Degradation(), seed=3)
    packed = PhotoCrops(str(tmp_path / "out"), 24, Degradation(), seed=3, packed=True)
    assert len(packed) == 5 and all(same(packed[n], folder[n]) for n in (0, 7, 3, 12))


def test_a_shard_reads_pictures_as_a_folder_does(tmp_path):
    """12 bits in 16, colors that nobody sees, and what is refused."""
    (tmp_path / "in").mkdir()
    kinds = {"a.png": np.random.default_rng(0).integers(0, 255, (8, 9, 4), np.uint8) // 255 * 255 + 7}
    kinds["a.png"][:4, :, 3] = 0
    for name, pixels in kinds.items():
        Image.fromarray(pixels).save(tmp_path / "in" / name)
    twelve = Image.fromarray(np.full((8, 9), 2048, np.uint16))
    twelve.save(tmp_path / "in" / "b.tif", tiffinfo={281: 4095})
    Image.fromarray(np.full((8, 9), 2048, np.int32)).save(tmp_path / "in" / "c.tif")
    content = {path.name.replace(".", "__"): path.read_bytes() for path in sorted((tmp_path / "in").iterdir())}
    (tmp_path / "shards").mkdir()
    tar(tmp_path / "shards" / "0.tar", **content)
    first, second, third = packed_photographs(tmp_path / "shards")
    assert torch.equal(first.load(), load_image(tmp_path / "in" / "a.png"))
    assert torch.equal(second.load(), load_image(tmp_path / "in" / "b.tif"))
    assert abs(float(second.load().mean()) - 2048 / 4095) < 1e-4
    with pytest.raises(UserError, match=r"0\.tar:c\.tif: its samples are signed"):
        third.load()


def test_a_resume_in_the_middle_with_workers_gives_the_same_batches(photos, tmp_path):
    pack(tmp_path / "out", photos, 12_000)
    data = PhotoCrops(str(tmp_path / "out"), 16, BicubicDegradation(), seed=0, packed=True)
    whole = [batch for batch, _ in zip(build_loader(data, 3), range(4), strict=False)]
    rest = [b for b, _ in zip(build_loader(data, 3, start_sample=6, num_workers=2), range(2), strict=False)]
    assert all(torch.equal(a["hq"], b["hq"]) and a["name"] == b["name"] for a, b in zip(rest, whole[2:], strict=True))


def test_text_is_packed_beside_its_photograph(photos, texts, tmp_path):
    pack(tmp_path / "out", photos, 12_000, str(texts))
    first, second, third = packed_photographs(tmp_path / "out")[:3]
    assert first.read(first.caption) == b"a dog" and second.caption is None and second.features is None
    assert first.load_features().tolist() == [[0.5] * 4] * 2 and first.features.size < third.features.size
    data = PhotoCrops(str(tmp_path / "out"), 16, None, seed=0, packed=True, text="shards")
    found = {sample["name"]: sample["text"] for sample in (data[n] for n in range(5))}
    assert found["a10"] is None and found["a2"].dtype == torch.float32 and found["a2"].shape == (2, 4)
    assert torch.equal(third.load_features(), torch.full((3, 4), 1 / 3))


def test_text_of_a_folder_goes_with_shards_too(photos, texts, tmp_path):
    pack(tmp_path / "out", photos, 12_000)
    data = PhotoCrops(str(tmp_path / "out"), 16, None, seed=0, packed=True, text=str(texts))
    assert {s["name"]: s["text"] is None for s in (data[n] for n in range(5))}["a2"] is False
    with pytest.raises(UserError, match="shards of .* hold no text"):
        PhotoCrops(str(tmp_path / "out"), 16, None, seed=0, packed=True, text="shards")


def test_other_peoples_shards_are_scanned_once(tmp_path, monkeypatch):
    tar(tmp_path / "x-2.tar", c__jpg=png(3), c__json=b"{}")
    tar(tmp_path / "x-10.tar", e__png=png(5))
    tar(tmp_path / "x-1.tar", a__json=b"{}", a__png=png(1), b__txt=b"words alone", d__x__png=png(2))
    scanned = []
    scan = shards_module.scan
    monkeypatch.setattr(shards_module, "scan", lambda path: scanned.append(path.name) or scan(path))
    assert names(tmp_path) == ["a.png", "c.jpg", "e.png"] and len(scanned) == 3
    assert [int(sample.load()[0, 0, 0] * 255) for sample in packed_photographs(tmp_path)] == [1, 3, 5]
    assert len(scanned) == 3
    tar(tmp_path / "x-2.tar", f__png=png(9), g__png=png(10))
    assert names(tmp_path) == ["a.png", "f.png", "g.png", "e.png"] and scanned[3:] == ["x-2.tar"]
    assert len(list((cache_folder() / "shards").iterdir())) == 1


def test_an_index_of_other_tar_files_is_refused(photos, tmp_path):
    out = tmp_path / "out"
    pack(out, photos, 12_000)
    (out / "shard-000000.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"index.json does not fit the tar files \(shard-000000.tar"):
        packed_photographs(out)


@pytest.mark.parametrize("content", ["", "[]", '{"format": "other"}', '{"format": "varestorer shards 1", "shards": 3}'])
def test_an_index_of_another_kind_is_not_used(photos, tmp_path, content):
    pack(tmp_path / "out", photos, 10**9)
    (tmp_path / "out" / INDEX).write_text(content)
    assert len(names(tmp_path / "out")) == 5


def test_the_index_says_where_the_bytes_are(photos, tmp_path):
    out = tmp_path / "out"
    pack(out, photos, 12_000)
    index = json.loads((out / INDEX).read_text())
    assert index["columns"] == ["shard", "key", "extension", "offset", "size"]
    shard, key, extension, offset, size = index["members"][0]
    assert (out / shard).read_bytes()[offset : offset + size] == (photos / f"{key}.{extension}").read_bytes()


def test_broken_members_are_skipped_and_named(tmp_path, caplog):
    tar(tmp_path / "x.tar", **{f"{n:03}__png": png(n) if n != 30 else b"no picture" for n in range(40)})
    data = PhotoCrops(str(tmp_path), 8, None, seed=0, packed=True)
    assert len({data[n]["name"] for n in range(40)}) == 39
    assert f"{tmp_path / 'x.tar'}:030.png" in caplog.text and caplog.text.count("skipping") == 1


def test_what_is_no_folder_of_shards(tmp_path):
    with pytest.raises(UserError, match="data.root=.*webdataset shards"):
        packed_photographs(tmp_path / "gone")
    with pytest.raises(UserError, match=r"holds no .tar file"):
        packed_photographs(tmp_path)
    tar(tmp_path / "x.tar", a__txt=b"words")
    with pytest.raises(UserError, match="hold no image"):
        packed_photographs(tmp_path)
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(UserError, match=r"x.tar.*uncompressed"):
        packed_photographs(tmp_path)


def test_what_a_shard_holds_and_is_not_used_is_named(tmp_path, caplog):
    dotted = {f"IMG.{n:04}.png": png(n) for n in range(7)}
    tar(tmp_path / "x.tar", **dotted, b__png=png(), b__jpg=png(), b__txt=b"used", b__json=b"{}", c__cls=b"0")
    assert names(tmp_path) == ["b.png"]
    (images,) = [line for line in caplog.messages if "images of the shards are not used" in line]
    assert images.startswith(f"{tmp_path}: 8 images") and "x.tar:IMG.0000.png" in images and images.endswith(", ...")
    (others,) = [line for line in caplog.messages if "members of the shards" in line]
    assert others == f"{tmp_path}: 2 members of the shards are not used: x.tar:b.json, x.tar:c.cls"
    tar(tmp_path / "x.tar", **dotted)
    with pytest.raises(UserError, match=r"hold no image that is used: x.tar:IMG.0000.png.*rename them"):
        packed_photographs(tmp_path)


def test_what_systems_leave_in_shards_and_beside_them_is_skipped(tmp_path, caplog):
    rubbish = ("._a.png", "__MACOSX/b.png", "x/@eaDir/c.png", ".DS_Store", "x/Thumbs.db")
    tar(tmp_path / "x.tar", **{"./../p/a.png": png()}, **dict.fromkeys(rubbish, png()))
    (tmp_path / "._x.tar").write_bytes(b"Mac OS X")
    assert names(tmp_path) == ["../p/a.png"] and not caplog.messages
    (tmp_path / "y.tar.gz").write_bytes(b"")
    (tmp_path / "more").mkdir()
    tar(tmp_path / "more" / "z.tar", a__png=png())
    assert len(names(tmp_path)) == 1
    assert caplog.messages == [f"{tmp_path}: 2 files are not used, as no .tar or in a subfolder: more/z.tar, y.tar.gz"]


def test_links_inside_a_shard_are_what_they_lead_to(tmp_path, caplog):
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        for name, kind, target in (
            ("p/soft.png", tarfile.SYMTYPE, "../q/a.png"),
            ("q/a.png", tarfile.REGTYPE, ""),
            ("hard.png", tarfile.LNKTYPE, "q/a.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, 0 if target else len(png(7))
            file.addfile(info, None if target else io.BytesIO(png(7)))
    found = packed_photographs(tmp_path)
    assert [sample.name for sample in found] == ["p/soft.png", "q/a.png", "hard.png"]
    assert {int(sample.load()[0, 0, 0] * 255) for sample in found} == {7}


def test_a_shard_that_got_shorter_is_named(photos, tmp_path):
    pack(tmp_path / "out", photos, 10**9)
    sample = packed_photographs(tmp_path / "out")[-1]
    sample.shard.write_bytes(sample.shard.read_bytes()[:2000])
    with pytest.raises(UserError, match="shard-000000.tar ends inside sub/z.png"):
        sample.load()
