"""What files hold, read without their data, and how that compares with the manifests of the published ones."""

import json
import resource
from pathlib import Path

import pytest
import torch
from published_files import small_system
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from varestorer.systems.varestorer import VARestorer
from varestorer.transformer.adapters import plain_state_dict
from varestorer.utils.errors import UsageError, UserError
from varestorer.weights.files import read_entries
from varestorer.weights.published.infinity import (
    KINDS,
    compare,
    kind_of,
    manifest,
    part_tensors,
    read_manifest,
    tokenizer_tensors,
    transformer_tensors,
)
from varestorer.weights.restorers import published_restorer_tensors, restorer_from_state_dict

MB = 2**20


def peak() -> int:
    """Most memory this process has had, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """A small published student."""
    return part_tensors(small_system(4), "transformer")


@pytest.mark.parametrize("kind", KINDS)
def test_every_published_tensor_is_one_of_ours(shared: Path, kind: str) -> None:
    published = read_manifest(shared / "keys" / f"{kind}.json")
    ours = manifest(kind)
    assert {name: (t.shape, t.dtype) for name, t in ours.items()} == {
        name: (t.shape, t.dtype) for name, t in published.items()
    }
    assert kind_of(published) == kind
    result = compare(ours, published)
    assert (result.mapped, result.total, bool(result.found)) == (len(published), len(published), False)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_published_networks_of_real_size_map_there_and_back(kind: str) -> None:
    rank = 32 if "student" in kind else 0
    with torch.device("meta"):
        system = VARestorer({"size": "0.25M"}, {}, {}, {"lora_rank": rank})
    part = "tokenizer" if "vae" in kind else "transformer"
    published = part_tensors(system, part)  # the weights on the meta device, the derived tensors real
    ours = plain_state_dict(getattr(system, part))
    if part == "tokenizer":
        found = tokenizer_tensors(ours, 5, 32, published, kind)
    else:
        found = transformer_tensors(ours, 2048, published, kind)
    assert found.keys() == ours.keys()
    assert all(found[name] is published[other] for name, other in names_by_identity(found, published).items())
    derived = {name for name, tensor in published.items() if not tensor.is_meta}
    assert len(found) + len(derived) == len(published)
    assert len({id(tensor) for tensor in found.values()}) == len(found)


def names_by_identity(ours: dict[str, Tensor], published: dict[str, Tensor]) -> dict[str, str]:
    """Ours -> published for the same tensors; every one of ours must be there."""
    places = {id(tensor): name for name, tensor in published.items()}
    return {name: places[id(tensor)] for name, tensor in ours.items()}


def test_the_published_restorer_of_real_size_maps_there_and_back() -> None:
    published = published_restorer_tensors()
    restorer = restorer_from_state_dict(published)
    assert sum(parameter.numel() for parameter in restorer.parameters()) == 15_792_587
    back = restorer.published_state_dict()
    assert back.keys() == published.keys()
    assert all(torch.equal(tensor, published[name]) for name, tensor in back.items())
    assert restorer.state_dict().keys() == {
        f"network.{name}".replace("conv_first.1.", "conv_first.") for name in published
    }


def test_a_full_size_file_is_checked_without_being_read(tmp_path: Path) -> None:
    wanted = manifest("varestorer_student_lora_r32")
    with FakeTensorMode():
        content = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in wanted.items()}
    path = tmp_path / "varestorer.pth"
    with torch.serialization.skip_data(materialize_fake_tensors=True):  # holes in place of the data
        torch.save(content, path)
    assert path.stat().st_size > 8.9e9
    before = peak()
    result = compare(read_entries(path), wanted)
    assert (result.mapped, result.total) == (1014, 1014)
    assert not result.found
    assert peak() - before < 100 * MB


@pytest.mark.parametrize("form", ["plain.pth", "vae.pth", "wrapped.ckpt", "plain.safetensors", "old.pth"])
def test_every_form_of_a_file_gives_the_same_entries(tensors: dict[str, Tensor], tmp_path: Path, form: str) -> None:
    path = tmp_path / form
    match form:
        case "plain.pth":
            torch.save(tensors, path)
        case "vae.pth":
            torch.save({"vae": tensors, "step": 1}, path)
        case "wrapped.ckpt":
            torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}}, path)
        case "plain.safetensors":
            save_file(tensors, path)
        case "old.pth":
            torch.save(tensors, path, _use_new_zipfile_serialization=False)
    entries = read_entries(path)
    assert {name: (t.shape, t.dtype) for name, t in entries.items()} == {
        name: (t.shape, t.dtype) for name, t in tensors.items()
    }
    assert all(tensor.is_meta for tensor in entries.values())


def test_differences_are_listed_and_counted(tensors: dict[str, Tensor]) -> None:
    other = dict(tensors)
    del other["head.bias"]
    other |= {"stranger": torch.zeros(1), "lvl_embed.weight": torch.zeros(2, 2)}
    other["pos_start"] = torch.zeros(1, 1, 32, dtype=torch.int64)
    result = compare(other, tensors)
    assert result.found.missing == ["head.bias"]
    assert result.found.unexpected == ["stranger"]
    assert [text.split()[0] for text in result.found.misshapen] == ["lvl_embed.weight", "pos_start"]
    assert (result.mapped, result.total) == (len(tensors) - 3, len(tensors))
    assert bool(result.found)


def test_another_floating_type_is_counted_but_no_difference(tensors: dict[str, Tensor]) -> None:
    small = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    result = compare(small, tensors)
    assert not result.found
    assert (result.mapped, result.retyped) == (len(tensors), len(tensors))
    assert result.types == {"bfloat16": len(tensors)}


def test_a_tokenizer_without_infixes_compares_as_equal() -> None:
    wanted = manifest("infinity_vae_d32")
    bare = {name.replace(".conv.weight", ".weight").replace(".norm.bias", ".bias"): t for name, t in wanted.items()}
    assert bare.keys() != wanted.keys()
    assert not compare(bare, wanted).found


def test_names_that_are_like_nothing_have_no_kind() -> None:
    assert kind_of({"weight": torch.zeros(1)}) is None


def test_adapters_alone_are_not_taken_for_the_published_student() -> None:
    down, base = (
        {f"{name}.weight": torch.zeros(1)} for name in ("block_chunks.0.module.0.sa.lora_down.q", "pos_start")
    )
    assert kind_of({"blocks.0.attention.lora_down.weight": torch.zeros(1)}) is None
    assert kind_of(down | base) == "varestorer_student_lora_r32"


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64"])
def test_small_and_unsigned_types_are_known(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.zeros(2).to(getattr(torch, name))}, tmp_path / "a.safetensors")
    (entry,) = read_entries(tmp_path / "a.safetensors").values()
    assert entry.dtype == getattr(torch, name)


def test_a_type_that_is_not_known_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors holds tensors of type C64"):
        read_entries(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"a": 1}', '{"a": {"shape": [1]}}', '{"a": {"shape": [1], "dtype": "floaty"}}']
)
def test_a_manifest_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(UserError, match=r"list\.json is no manifest.*wanted JSON"):
        read_manifest(tmp_path / "list.json")


def test_a_manifest_and_a_file_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"manifest=.*none\.json is neither a file nor"):
        read_manifest(tmp_path / "none.json")
    with pytest.raises(UsageError, match=r"weights not found: .*none\.pth"):
        read_entries(tmp_path / "none.pth")


def test_a_manifest_is_read_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(json.dumps({"a": {"shape": [2, 3], "dtype": "bfloat16", "kind": "param"}}))
    (entry,) = read_manifest(tmp_path / "m.json").values()
    assert (tuple(entry.shape), entry.dtype, entry.is_meta) == ((2, 3), torch.bfloat16, True)
