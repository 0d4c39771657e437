"""`convert` from the command line: published files to bundles and back, adapters apart, merged and alone, checks."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published_files import write_release
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from varestorer.commands.convert import COMMAND, check_publishable
from varestorer.systems.varestorer import VARestorer
from varestorer.transformer.adapters import plain_state_dict
from varestorer.utils.errors import UserError
from varestorer.weights.files import NESTED, read_tensors

pytestmark = pytest.mark.smoke
COMPANIONS = ("infinity_vae_d32reg.pth", "general_swinir_v1.ckpt")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small release's student; teacher, tokenizer and restorer beside it."""
    return write_release(tmp_path_factory.mktemp("release, (small)"))


@pytest.fixture(scope="module")
def bundle(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release as a bundle; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    assert run(input=release, output=folder) == 0
    return folder


def run(**words: object) -> int:
    return COMMAND.main([f"{key}={value}" for key, value in words.items()])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def published(path: Path) -> dict[str, Tensor]:
    return read_tensors(path, NESTED)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, tensor in one.items() if tensor.dtype != other[name].dtype] == []
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []


def test_a_release_becomes_a_bundle_that_says_where_it_came_from(release: Path, bundle: Path) -> None:
    names = {f"{part}.safetensors" for part in ("transformer", "adapters", "tokenizer", "restorer")}
    assert {path.name for path in bundle.iterdir()} == names | {"config.json", "README.md"}
    card = (bundle / "README.md").read_text()
    for name in (release.name, *COMPANIONS):
        assert hashlib.sha256((release.parent / name).read_bytes()).hexdigest() in card
    loaded, original = VARestorer.from_pretrained(bundle), VARestorer.from_pretrained(release)
    assert_equal(plain_state_dict(loaded), plain_state_dict(original))


def test_converting_twice_gives_the_same_bytes(release: Path, bundle: Path, tmp_path: Path) -> None:
    assert run(input=release, output=tmp_path / "again") == 0
    assert files_of(tmp_path / "again") == files_of(bundle)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("part", ["transformer", "tokenizer", "restorer"])
def test_the_way_back_gives_the_published_tensors(
    release: Path, bundle: Path, tmp_path: Path, part: str, suffix: str
) -> None:
    original = dict(zip(("transformer", "tokenizer", "restorer"), (release.name, *COMPANIONS), strict=True))[part]
    for name in ("one", "two"):
        assert run(input=bundle, output=tmp_path / f"{name}{suffix}", part=part) == 0
    assert_equal(published(tmp_path / f"one{suffix}"), published(release.parent / original))
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


def test_merged_weights_are_the_base_and_the_product_of_the_adapters(bundle: Path, tmp_path: Path) -> None:
    assert run(input=bundle, output=tmp_path / "merged", adapters="merged") == 0
    assert not (tmp_path / "merged" / "adapters.safetensors").exists()
    merged = read_tensors(tmp_path / "merged" / "transformer.safetensors")
    base, adapters = read_tensors(bundle / "transformer.safetensors"), read_tensors(bundle / "adapters.safetensors")
    adapted = {name.removesuffix(".lora_up.weight") for name in adapters if name.endswith("up.weight")}
    assert len(adapted) == 10
    for layer in adapted:
        product = adapters[f"{layer}.lora_up.weight"] @ adapters[f"{layer}.lora_down.weight"]
        assert product.abs().max() > 0.1
        torch.testing.assert_close(merged[f"{layer}.weight"], base[f"{layer}.weight"] + product)
    assert "merged into the transformer" in (tmp_path / "merged" / "README.md").read_text()


def test_bf16_halves_the_blocks_and_fp32_keeps_their_values(bundle: Path, tmp_path: Path) -> None:
    assert run(input=bundle, output=tmp_path / "small", dtype="bf16") == 0
    small = read_tensors(tmp_path / "small" / "transformer.safetensors")
    assert small["blocks.0.ffn.fc1.weight"].dtype == torch.bfloat16
    assert run(input=tmp_path / "small", output=tmp_path / "kept") == 0
    assert_equal(read_tensors(tmp_path / "kept" / "transformer.safetensors"), small)
    assert run(input=tmp_path / "small", output=tmp_path / "wide", dtype="fp32") == 0
    wide = read_tensors(tmp_path / "wide" / "transformer.safetensors")
    assert wide["blocks.0.ffn.fc1.weight"].dtype == torch.float32
    assert torch.equal(wide["blocks.0.ffn.fc1.weight"], small["blocks.0.ffn.fc1.weight"].float())


def test_a_published_file_in_bf16_stays_in_bf16(bundle: Path, release: Path, tmp_path: Path) -> None:
    assert run(input=bundle, output=tmp_path / "varestorer.pth", dtype="bf16") == 0
    companions = {key: release.parent / name for key, name in zip(("tokenizer", "restorer"), COMPANIONS, strict=True)}
    assert run(input=tmp_path / "varestorer.pth", output=tmp_path / "bundle", **companions) == 0
    tensors = read_tensors(tmp_path / "bundle" / "transformer.safetensors")
    assert tensors["blocks.1.ffn.fc2.weight"].dtype == torch.bfloat16
    assert tensors["head.weight"].dtype == torch.float32


@pytest.mark.parametrize("base", ["bundle", "student", "teacher"])
def test_adapters_alone_and_back(bundle: Path, release: Path, tmp_path: Path, base: str) -> None:
    assert run(input=bundle, output=tmp_path / "shared", adapters="only") == 0
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["adapters.safetensors"]
    path = tmp_path / "shared" / "adapters.safetensors"
    assert path.read_bytes() == (bundle / "adapters.safetensors").read_bytes()
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["student"])["lora_rank"] == 4
    places = {"bundle": bundle, "student": release, "teacher": release.with_name("infinity_2b_reg.pth")}
    assert run(input=path, base=places[base], output=tmp_path / "again") == 0
    assert_equal(read_tensors(tmp_path / "again" / "adapters.safetensors"), read_tensors(path))
    again, wanted = VARestorer.from_pretrained(tmp_path / "again"), VARestorer.from_pretrained(places[base])
    assert again.student_config.lora_rank == 4
    kept = {name: tensor for name, tensor in plain_state_dict(again).items() if ".lora_" not in name}
    assert_equal(kept, {name: t for name, t in plain_state_dict(wanted).items() if ".lora_" not in name})


def test_adapters_in_pefts_form_and_back(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # the second time over the first
        assert run(input=bundle, output=tmp_path / "peft", adapters="peft", overwrite=True) == 0
    assert set(files_of(tmp_path / "peft")) == {"adapter_config.json", "adapter_model.safetensors"}
    assert run(input=tmp_path / "peft", base=bundle, output=tmp_path / "again") == 0
    assert_equal(published(tmp_path / "again" / "adapters.safetensors"), published(bundle / "adapters.safetensors"))
    assert run(input=tmp_path / "peft", output=tmp_path / "out") == 2
    assert "add base=MODEL" in capsys.readouterr().err


def test_adapters_that_do_not_fit_are_refused(
    bundle: Path, tmp_path: Path, tiny_system: VARestorer, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_system.merge_adapters().save_pretrained(tmp_path / "merged")
    assert run(input=bundle / "adapters.safetensors", base=tmp_path / "merged", output=tmp_path / "out") == 1
    assert "its teacher is gone" in capsys.readouterr().err
    config = tiny_system.config
    shallow = {**config, "transformer": {**config["transformer"], "depth": 1}, "student": {"lora_rank": 0}}
    VARestorer(**shallow).save_pretrained(tmp_path / "shallow")
    assert run(input=bundle / "adapters.safetensors", base=tmp_path / "shallow", output=tmp_path / "out") == 1
    assert "10 unexpected: blocks.1.cross_attention.kv.lora_down.weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_without_adapters_of_its_own_has_none_to_write(
    tmp_path: Path, tiny_system: VARestorer, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_system.merge_adapters().save_pretrained(tmp_path / "merged")
    assert run(input=tmp_path / "merged", output=tmp_path / "out", adapters="only") == 1
    assert "has no adapters of its own" in capsys.readouterr().err


def test_nothing_is_written_over_unless_asked_for(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert run(input=bundle, output=tmp_path / "empty") == 0
    assert run(input=bundle, output=tmp_path / "empty", adapters="merged") == 1
    assert "add overwrite=true" in capsys.readouterr().err
    assert (tmp_path / "empty" / "adapters.safetensors").exists()
    assert run(input=tmp_path / "empty", output=tmp_path / "empty", adapters="merged", overwrite=True) == 0
    assert not (tmp_path / "empty" / "adapters.safetensors").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.txt").write_text("mine")
    assert run(input=bundle, output=tmp_path / "photos", overwrite=True) == 1
    assert "folder with other things in it" in capsys.readouterr().err
    assert files_of(tmp_path / "photos") == {"mine.txt": b"mine"}
    (tmp_path / "old.pth").write_text("old")
    assert run(input=bundle, output=tmp_path / "old.pth") == 1
    assert run(input=bundle, output=tmp_path / "old.pth", overwrite=True) == 0
    assert len(published(tmp_path / "old.pth")) > 50


def test_a_broken_input_leaves_nothing_behind(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = published(release)
    tensors["stranger"] = tensors.pop("head.bias")
    torch.save(tensors, tmp_path / "varestorer.pth")
    words = {"tokenizer": release.parent / COMPANIONS[0], "restorer": release.parent / COMPANIONS[1]}
    assert run(input=tmp_path / "varestorer.pth", output=tmp_path / "out", **words) == 1
    error = capsys.readouterr().err
    assert "1 missing: head.bias; 1 unexpected: stranger" in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["varestorer.pth"]


def test_check_prints_how_much_maps_and_every_difference(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = published(release)
    entries = {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in tensors.items()
    }
    path = tmp_path / "my, manifest.json"
    path.write_text(json.dumps(entries))
    assert run(check=release, manifest=path) == 0
    assert f"{len(entries)} / {len(entries)} tensors" in capsys.readouterr().out
    entries["head.bias"]["shape"] = [3]
    entries["another"] = {"shape": [1], "dtype": "float32"}
    del entries["pos_start"]
    path.write_text(json.dumps(entries))
    assert run(check=release, manifest=path) == 1
    shown = capsys.readouterr().out
    assert f"{len(entries) - 2} / {len(entries)} tensors" in shown
    for line in ("1 missing:\n  another", "1 unexpected:\n  pos_start", r"1 misshapen:\n  head.bias \(wanted \(3,\)"):
        assert re.search(line, shown)


def test_check_finds_the_manifest_by_the_names(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(check=release) == 1  # a small network is not of the published sizes
    assert "/ 1014 tensors of varestorer_student_lora_r32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "add input=... output=..., or check=..."),
        ({"input": "a.pth"}, "no value for input or output"),
        ({"check": "a.pth", "output": "b"}, "check= only looks at a file"),
        ({"input": "a.pth", "output": "b", "manifest": "c.json"}, "manifest= belongs to check=FILE"),
        ({"input": "a.pth", "output": "b", "adapters": "gone"}, "adapters must be one of separate, merged, only"),
        ({"input": "a.pth", "output": "b", "dtype": "fp8"}, "dtype must be one of fp16, bf16, fp32, got dtype=fp8"),
        ({"input": "a.pth", "output": "b", "part": "all"}, "part must be one of transformer, tokenizer, restorer"),
        ({"input": "nowhere/a.pth", "output": "b"}, "nowhere/a.pth does not exist"),
        ({"input": "nowhere/a.safetensors", "base": "c", "output": "b"}, "nowhere/a.safetensors does not exist"),
        ({"input": "a", "base": "b", "output": "c", "adapters": "only"}, "choose one of the two"),
        ({"inptu": "a"}, "inptu"),
        ({"input": "a", "output": "b", "part": "tokenizer"}, "part=tokenizer goes with a published file"),
        ({"input": "a", "output": "b.PTH", "adapters": "only"}, "adapters=only writes a folder or a .safetensors file"),
        ({"input": "a", "output": "b.pth", "adapters": "peft"}, "adapters=peft writes a folder"),
        ({"input": "a", "output": "b.safetensors", "adapters": "only", "part": "restorer"}, "goes with a published"),
        ({"input": "a", "output": "b.pth", "dtype": "bf16", "part": "restorer"}, "leave out dtype="),
        ({"check": "a.pth", "dtype": "bf16"}, "leave out dtype="),
        ({"input": "a", "output": "."}, "is the current folder or one around it"),
        ({"input": "a", "output": "../x/.."}, "is the current folder or one around it"),
    ],
)
def test_wrong_commands_end_with_two(
    words: dict[str, str], message: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(**words) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_student_without_adapters_is_no_published_file(
    tmp_path: Path, tiny_system: VARestorer, bundle: Path, release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    VARestorer(**(tiny_system.config | {"student": {"lora_rank": 0}})).save_pretrained(tmp_path / "full")
    for source, more in ((bundle, {"adapters": "merged"}), (tmp_path / "full", {})):
        assert run(input=source, output=tmp_path / "out.pth", **more) == 1
        assert "no place for a student without adapters; write a bundle" in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()
    assert run(input=tmp_path / "full", output=tmp_path / "out.pth", part="tokenizer") == 0
    teacher = release.with_name("infinity_2b_reg.pth")
    assert run(input=teacher, output=tmp_path / "teacher.PTH") == 0  # which stays a teacher
    assert_equal(published(tmp_path / "teacher.PTH"), published(teacher))


def test_what_the_published_form_cannot_hold_is_warned_of_with_the_transformer_only(
    tmp_path: Path, tiny_system: VARestorer, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_system.save_pretrained(tmp_path / "tiny")
    capsys.readouterr()
    assert run(input=tmp_path / "tiny", output=tmp_path / "tokenizer.pth", part="tokenizer") == 0
    assert "published form" not in "".join(capsys.readouterr())
    assert run(input=tmp_path / "tiny", output=tmp_path / "varestorer.pth") == 0
    said = "".join(capsys.readouterr())
    assert "no place for the schedule" in said
    assert "no restorer, and the published form wants general_swinir_v1.ckpt beside it" in said


def test_a_tilde_is_the_users_folder(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(bundle.parent))
    monkeypatch.chdir(tmp_path)
    assert run(input=f"~/{bundle.name}", output="~/adapters", adapters="only") == 0
    assert (bundle.parent / "adapters" / "adapters.safetensors").is_file()
    assert run(input="~/adapters/adapters.safetensors", base=f"~/{bundle.name}", output="~/again") == 0
    assert (bundle.parent / "again" / "config.json").is_file()
    assert not any(tmp_path.iterdir())


def test_a_model_of_another_kind_is_told_before_companions_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"conv_first.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "esrgan.safetensors")
    assert run(input=tmp_path / "esrgan.safetensors", output=tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "holds no model: no tensor word_embed.weight" in error and "method=spandrel" in error


def test_a_missing_companion_is_named_with_the_way_out(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = tmp_path / release.name
    student.symlink_to(release)
    for key, name in zip(("tokenizer", "restorer"), COMPANIONS, strict=True):
        assert run(input=student, output=tmp_path / "out") == 1
        error = capsys.readouterr().err
        assert f"{tmp_path / name} is missing; put it" in error
        assert f"scripts/convert.py ({key}=FILE) and use the bundle" in error and "model." not in error
        (tmp_path / name).symlink_to(release.parent / name)
    assert run(input=student, output=tmp_path / "out", restorer="nowhere.ckpt") == 2
    assert "restorer=nowhere.ckpt does not exist" in capsys.readouterr().err


def test_options_that_do_not_go_with_the_input_are_refused(
    bundle: Path, release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(input=bundle, output=tmp_path / "out", tokenizer=release) == 2
    assert "go with a published file" in capsys.readouterr().err
    assert run(input=release, output=tmp_path / "out", base=bundle) == 2
    assert "of peft's, but" in capsys.readouterr().err
    assert run(input=bundle / "adapters.safetensors", output=tmp_path / "out") == 2
    assert "add base=MODEL" in capsys.readouterr().err


def test_traits_that_the_published_form_cannot_hold_are_refused(tiny_system: VARestorer) -> None:
    check_publishable(tiny_system, Path("run"))
    tiny_system.student_config = replace(tiny_system.student_config, keep_bits=1.0)
    with pytest.raises(UserError, match=r"no place for student.keep_bits=1.0; write a bundle: output=FOLDER"):
        check_publishable(tiny_system, Path("run"))
