"""Names and sizes of the published VAR and VARSR files."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from varsr_parts import Tokenizer, golden_folder

from varestorer.conditioning.prefix_encoder import PrefixEncoder
from varestorer.transformer.attention import SelfAttention
from varestorer.transformer.blocks import FeedForward
from varestorer.transformer.refiner import Refiner
from varestorer.utils.errors import UserError
from varestorer.weights.published_varsr import (
    LEVELS,
    MASK,
    USAGE,
    network_kind,
    sequence_levels,
    to_published_varsr,
    to_published_vqvae,
    varsr_sizes,
    varsr_tensors,
    vqvae_sizes,
    vqvae_tensors,
)

SIDES_10 = [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]
SIDES_12 = [1, 2, 3, 4, 6, 9, 12, 16, 20, 24, 28, 32]


class Transformer(nn.Module):
    """The parameters of VAR, VARSR or C2I under the names the table wants."""

    def __init__(self, sizes: dict) -> None:
        super().__init__()
        width = sizes["width"]
        self.start = nn.Parameter(torch.zeros(1, sizes["num_first"], width))
        if sizes["refiner_width"] is None:
            self.positions = nn.Parameter(torch.zeros(1, sizes["num_positions"], width))
        else:
            self.refiner_norm = nn.LayerNorm(width)
            self.refiner = Refiner(sizes["code_width"], width, sizes["refiner_width"], sizes["refiner_depth"])
        if sizes["prefix_channels"] is not None:
            self.prefix_encoder = PrefixEncoder(width, sizes["prefix_channels"])
        self.word_embed = nn.Linear(sizes["code_width"], width)
        self.condition.embedding = nn.Embedding.from_pretrained(torch.zeros(sizes["num_classes"], width), freeze=False)
        self.level_embed = nn.Embedding.from_pretrained(torch.zeros(sizes["num_levels"], width), freeze=False)
        self.blocks = nn.ModuleList()
        for _ in range(sizes["depth"]):
            block = nn.Module()
            block.self_attention = SelfAttention(width, sizes["num_heads"])
            block.ffn = FeedForward(width, 4 * width)
            block.modulation = nn.Linear(width, 6 * width)
            self.blocks.append(block)
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, sizes["num_codes"])


def manifest(shared: Path, name: str) -> tuple[dict[str, Tensor], set[str]]:
    """Tensors of a published file on the meta device, and the names of those that are no parameters."""
    entries = json.loads((shared / "keys" / f"{name}.json").read_text())
    tensors = {
        name: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta")
        for name, entry in entries.items()
    }
    return tensors, {name for name, entry in entries.items() if entry["kind"] != "param"}


def number_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "kind", "parameters"),
    [
        ("varsr_d24", "varsr", 1_101_916_448),
        ("varsr_c2i_d24_p10", "c2i", None),
        ("varsr_c2i_d24_p12", "c2i", None),
        ("var_d16", "var", 310_283_520),
    ],
)
def test_published_transformers_map_one_to_one(shared: Path, name: str, kind: str, parameters: int | None) -> None:
    tensors, derived = manifest(shared, name)
    assert network_kind(tensors) == kind
    sizes = varsr_sizes(tensors)
    if kind == "var":
        sizes["num_positions"] = tensors["pos_1LC"].shape[1]
    with torch.device("meta"):
        network = Transformer(sizes)
    assert parameters is None or number_of(network) == parameters
    weights = {name: tensor for name, tensor in tensors.items() if name not in derived}
    loaded = varsr_tensors(network.state_dict(), [1, 2], weights, name)
    assert len(loaded) == len(weights)
    assert {t.shape for t in loaded.values()} == {t.shape for t in weights.values()}


def test_twelve_scales_have_1_101_919_520_parameters(shared: Path) -> None:
    sizes = varsr_sizes(manifest(shared, "varsr_d24")[0])
    with torch.device("meta"):
        assert number_of(Transformer(sizes | {"num_levels": 12})) == 1_101_919_520


@pytest.mark.parametrize("name", ["varsr_vqvae", "var_vae_ch160v4096z32"])
def test_published_autoencoders_map_one_to_one(shared: Path, name: str) -> None:
    tensors, _ = manifest(shared, name)
    assert network_kind(tensors) == "vqvae"
    with torch.device("meta"):
        tokenizer = Tokenizer(vqvae_sizes(tensors))
    assert number_of(tokenizer) == 108_948_355
    loaded = vqvae_tensors(tokenizer.state_dict(), 5, tensors, name)
    assert len(loaded) == len(tensors) - 1


@pytest.mark.parametrize(
    ("stem", "sides"),
    [("var", [1, 2, 3, 4, 6, 8]), ("varsr", [1, 2, 3, 4, 6, 8]), ("isr10", SIDES_10), ("c2i12", SIDES_12)],
)
def test_golden_transformers_come_and_go(shared: Path, stem: str, sides: list[int]) -> None:
    tensors = golden_folder(shared).weights(stem)
    sizes = varsr_sizes(tensors)
    network = Transformer(sizes | {"num_positions": sum(side * side for side in sides)})
    network.load_state_dict(varsr_tensors(network.state_dict(), sides, tensors, stem))
    published = to_published_varsr(network.state_dict(), sides)
    assert published.keys() - tensors.keys() <= {MASK}  # left out of the larger fixtures
    assert all(torch.equal(published[name].to(tensor.dtype), tensor) for name, tensor in tensors.items())
    assert published.keys() >= tensors.keys()


def tiny_sizes() -> dict:
    return {
        "width": 8,
        "depth": 1,
        "num_heads": 2,
        "num_codes": 5,
        "code_width": 4,
        "num_classes": 2,
        "num_levels": 2,
        "num_first": 5,
        "prefix_channels": (2, 2, 2, 3, 3),
        "refiner_width": 4,
        "refiner_depth": 1,
    }


def test_a_file_without_what_follows_from_the_configuration_loads() -> None:
    network = Transformer(tiny_sizes())
    published = to_published_varsr(network.state_dict(), [1, 2])
    assert varsr_sizes(published) == tiny_sizes()
    bare = {name: t for name, t in published.items() if name not in (LEVELS, MASK) and "zero_k" not in name}
    for tensors in (published, bare):
        loaded = varsr_tensors(network.state_dict(), [1, 2], tensors, "file")
        assert loaded.keys() == network.state_dict().keys()


def test_what_follows_from_another_configuration_is_refused() -> None:
    network = Transformer(tiny_sizes())
    published = to_published_varsr(network.state_dict(), [1, 2])
    assert published[LEVELS].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 1]]
    assert published[MASK][0, 0, 0].isinf().tolist() == [False] * 5 + [True] * 4
    published[LEVELS] = published[LEVELS].flip(1)
    with pytest.raises(UserError, match="file: lvl_1L has other values"):
        varsr_tensors(network.state_dict(), [1, 2], published, "file")
    with pytest.raises(UserError, match="lvl_1L"):
        varsr_tensors(network.state_dict(), [1, 3], to_published_varsr(network.state_dict(), [1, 2]), "file")


def test_a_missing_part_is_named() -> None:
    network = Transformer(tiny_sizes())
    published = to_published_varsr(network.state_dict(), [1, 2])
    del published["diffloss.net.cond_embed.weight"]
    with pytest.raises(UserError, match="file does not fit the model; 1 missing: diffloss.net.cond_embed.weight"):
        varsr_tensors(network.state_dict(), [1, 2], published, "file")
    with pytest.raises(UserError, match="pos_start is missing: this is no file of VAR"):
        varsr_sizes({name: t for name, t in published.items() if name != "pos_start"})


def test_levels_of_the_sequence() -> None:
    assert sequence_levels([1, 2], 1).tolist() == [0, 1, 1, 1, 1]
    assert len(sequence_levels(SIDES_10, 1025)) == 3264
    assert len(sequence_levels(SIDES_12, 1025)) == 4355


def test_an_autoencoder_comes_and_goes_whatever_the_usage_of_its_codes() -> None:
    sizes = {
        "channels": 32,
        "multipliers": (1, 2),
        "num_encoder_blocks": 1,
        "num_decoder_blocks": 2,
        "num_codes": 6,
        "code_width": 4,
    }
    tokenizer = Tokenizer(sizes)
    state = tokenizer.state_dict()
    published = to_published_vqvae(state, 2, num_scales=3)
    assert published[USAGE].shape == (3, 6)
    assert {"decoder.up.1.attn.1.proj_out.weight", "encoder.down.1.block.0.nin_shortcut.weight"} <= published.keys()
    assert vqvae_sizes(published) == sizes
    published[USAGE] = torch.ones(7, 6)
    loaded = vqvae_tensors(state, 2, published, "file")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_other_files_are_none_of_these() -> None:
    assert network_kind(["word_embed.weight", "cfg_uncond"]) is None
