"""The names of tensors in the published files, frozen here: a wrong map of names would write and read its own files."""

from itertools import product
from pathlib import Path

import pytest
import torch
from published_files import small_restorer
from torch import Tensor

from varestorer.systems.varestorer import VARestorer
from varestorer.transformer.adapters import plain_state_dict
from varestorer.utils.seeds import torch_generator
from varestorer.weights.published.infinity import part_tensors

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
