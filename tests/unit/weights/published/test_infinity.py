"""What files hold, compared with the manifests of the published ones, whose names are frozen here too.

A wrong map of names would write and read its own files.
"""

import json
import resource
from itertools import product
from pathlib import Path

import pytest
import torch
from published_files import small_restorer, small_system
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from varestorer.systems.varestorer import VARestorer
from varestorer.transformer.adapters import plain_state_dict
from varestorer.utils.errors import UsageError, UserError
from varestorer.utils.seeds import torch_generator
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


NUM_BLOCKS = 16
SIZES = {
    "schedule": {"sides": [1, 2]},
    "tokenizer": {
        "channels": 32,
        "multipliers": [1, 2, 2],
        "latent_width": 8,
        "num_encoder_blocks": 1,
        "num_decoder_blocks": 2,
    },
    "transformer": {
        "width": 32,
        "depth": NUM_BLOCKS,
        "num_heads": 2,
        "latent_width": 8,
        "text_width": 16,
        "text_length": 3,
        "num_levels": 4,
    },
}

# published name, our name; of layers with a weight and a bias
RESIDUAL_BLOCKS = """
encoder.down.0.block.0 encoder.levels.0.blocks.0
encoder.down.1.block.0 encoder.levels.1.blocks.0
encoder.down.2.block.0 encoder.levels.2.blocks.0
encoder.mid.block_1 encoder.middle.0
encoder.mid.block_2 encoder.middle.1
decoder.mid.block_1 decoder.middle.0
decoder.mid.block_2 decoder.middle.1
decoder.up.2.block.0 decoder.levels.0.blocks.0
decoder.up.2.block.1 decoder.levels.0.blocks.1
decoder.up.1.block.0 decoder.levels.1.blocks.0
decoder.up.1.block.1 decoder.levels.1.blocks.1
decoder.up.0.block.0 decoder.levels.2.blocks.0
decoder.up.0.block.1 decoder.levels.2.blocks.1
"""
OF_RESIDUAL_BLOCK = "norm1.norm norm1\nconv1.conv conv1\nnorm2.norm norm2\nconv2.conv conv2"
OTHERS_OF_TOKENIZER = """
encoder.conv_in.conv encoder.conv_in
encoder.down.0.downsample.conv.conv encoder.levels.0.resample.conv
encoder.down.1.block.0.nin_shortcut.conv encoder.levels.1.blocks.0.shortcut
encoder.down.1.downsample.conv.conv encoder.levels.1.resample.conv
encoder.norm_out.norm encoder.norm_out
encoder.conv_out.conv encoder.conv_out
decoder.conv_in.conv decoder.conv_in
decoder.up.2.upsample.conv.conv decoder.levels.0.resample.conv
decoder.up.1.upsample.conv.conv decoder.levels.1.resample.conv
decoder.up.0.block.0.nin_shortcut.conv decoder.levels.2.blocks.0.shortcut
decoder.norm_out.norm decoder.norm_out
decoder.conv_out.conv decoder.conv_out
"""

# published name, our name; of tensors
OUTSIDE_OF_BLOCKS = """
pos_start start
cfg_uncond condition.null_features
text_norm.weight condition.norm.weight
text_proj_for_sos.ca.mat_q condition.pool.query
text_proj_for_sos.ca.v_bias condition.pool.v_bias
text_proj_for_sos.ca.mat_kv.weight condition.pool.kv.weight
text_proj_for_sos.ca.proj.weight condition.pool.proj.weight
text_proj_for_sos.ca.proj.bias condition.pool.proj.bias
text_proj_for_ca.0.weight condition.memory.0.weight
text_proj_for_ca.0.bias condition.memory.0.bias
text_proj_for_ca.2.weight condition.memory.2.weight
text_proj_for_ca.2.bias condition.memory.2.bias
shared_ada_lin.1.weight condition.modulation.weight
shared_ada_lin.1.bias condition.modulation.bias
word_embed.weight word_embed.weight
word_embed.bias word_embed.bias
lvl_embed.weight level_embed.weight
head_nm.ada_lin.1.weight head_modulation.weight
head_nm.ada_lin.1.bias head_modulation.bias
head.weight head.weight
head.bias head.bias
"""
OF_BLOCK = """
ada_gss modulation
sa.q_bias self_attention.q_bias
sa.v_bias self_attention.v_bias
sa.scale_mul_1H11 self_attention.log_scale
ca_norm.weight cross_norm.weight
ca_norm.bias cross_norm.bias
ca.v_bias cross_attention.v_bias
ffn.fc1.weight ffn.fc1.weight
ffn.fc1.bias ffn.fc1.bias
ffn.fc2.weight ffn.fc2.weight
ffn.fc2.bias ffn.fc2.bias
"""
ADAPTED = """
sa.mat_qkv self_attention.qkv
sa.proj self_attention.proj
ca.mat_q cross_attention.q
ca.mat_kv cross_attention.kv
ca.proj cross_attention.proj
"""
WITHOUT_BIAS = ("sa.mat_qkv", "ca.mat_kv")


def pairs(table: str) -> list[tuple[str, str]]:
    return [(published, ours) for published, ours in map(str.split, table.strip().splitlines())]


def tokenizer_names() -> dict[str, str]:
    """Published -> ours."""
    layers = pairs(OTHERS_OF_TOKENIZER)
    for (published, ours), (theirs, own) in product(pairs(RESIDUAL_BLOCKS), pairs(OF_RESIDUAL_BLOCK)):
        layers.append((f"{published}.{theirs}", f"{ours}.{own}"))
    return {f"{published}.{leaf}": f"{ours}.{leaf}" for published, ours in layers for leaf in ("weight", "bias")}


def transformer_names(has_adapters: bool) -> dict[str, str]:
    """Published -> ours, of 16 blocks, which are stored two by two."""
    of_block = pairs(OF_BLOCK)
    for published, ours in pairs(ADAPTED):
        leaves = ["weight"] if published in WITHOUT_BIAS else ["weight", "bias"]
        base = f"{published}.linear" if has_adapters else published
        of_block += [(f"{base}.{leaf}", f"{ours}.{leaf}") for leaf in leaves]
        if has_adapters:
            of_block += [(f"{published}.{way}.weight", f"{ours}.{way}.weight") for way in ("lora_down", "lora_up")]
    blocks = {
        f"block_chunks.{number // 2}.module.{number % 2}.{published}": f"blocks.{number}.{ours}"
        for number in range(NUM_BLOCKS)
        for published, ours in of_block
    }
    return dict(pairs(OUTSIDE_OF_BLOCKS)) | blocks


def derived(part: str) -> dict[str, Tensor]:
    """What the published files hold beside the weights."""
    if part == "tokenizer":
        mask = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1])
        return {"quantizer.lfq.mask": mask, "quantize.lfq.mask": mask}
    attentions = [f"block_chunks.{n // 2}.module.{n % 2}.{kind}." for n in range(NUM_BLOCKS) for kind in ("sa", "ca")]
    return {f"{name}zero_k_bias": torch.zeros(32) for name in [*attentions, "text_proj_for_sos.ca."]}


@pytest.mark.parametrize(("part", "rank"), [("tokenizer", 0), ("transformer", 0), ("transformer", 4)])
def test_every_published_tensor_goes_to_its_place_and_back(tmp_path: Path, part: str, rank: int) -> None:
    student = {"lora_rank": rank}
    names = tokenizer_names() if part == "tokenizer" else transformer_names(has_adapters=rank > 0)
    shapes = {
        name: tensor.shape
        for name, tensor in plain_state_dict(getattr(VARestorer(**SIZES, student=student), part)).items()
    }
    generator = torch_generator(0)
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    assert set(names.values()) == values.keys()
    file = {published: values[ours] for published, ours in names.items()} | derived(part)
    torch.save(file, tmp_path / "published.pth")
    loaded = VARestorer(**SIZES, student=student, weights={part: str(tmp_path / "published.pth")})
    found = plain_state_dict(getattr(loaded, part))
    assert [name for name, tensor in values.items() if not torch.equal(found[name], tensor)] == []
    written = part_tensors(loaded, part)
    assert written.keys() == file.keys()
    assert [name for name, tensor in file.items() if not torch.equal(written[name], tensor)] == []


def test_names_of_the_published_restorer() -> None:
    names = small_restorer().published_state_dict()
    of_block = "layers.0.residual_group.blocks.0"
    known = ("conv_first.1.weight", f"{of_block}.attn.qkv.weight", f"{of_block}.mlp.fc1.bias", "conv_after_body.weight")
    assert set(known) <= names.keys()
    assert not any(name.startswith(("network.", "conv_first.weight")) for name in names)
