"""Names and sizes of the published VAR and VARSR files."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from published_files import VARSR_SIZES as RELEASED
from published_files import to_published_varsr, to_published_vqvae
from published_files import write_varsr as release
from safetensors.torch import load_file
from torch import Tensor

from varestorer.parity.golden import GoldenVARSR
from varestorer.systems.varsr import VARSR
from varestorer.tokenizer import MultiScaleTokenizer, TokenizerConfig
from varestorer.utils.errors import UserError
from varestorer.weights.published.varsr import (
    LEVELS,
    MASK,
    USAGE,
    VQVAE,
    network_kind,
    sequence_levels,
    varsr_sizes,
    varsr_tensors,
    vqvae_sizes,
    vqvae_tensors,
)

SIDES_10 = [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]
SIDES_VAR = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
SIDES_12 = [1, 2, 3, 4, 6, 9, 12, 16, 20, 24, 28, 32]
SIDES = {10: SIDES_10, 12: SIDES_12}


def system_of(sizes: dict, sides: list[int], device: str = "cpu") -> VARSR:
    """A system of the sizes that a file tells."""
    classes = {name: sizes[name] for name in ("width", "depth", "num_heads", "num_classes", "num_levels")}
    if sizes["refiner_width"] is None:
        classes |= {"positions": "rows", "position_size": sum(side * side for side in sides)}
    refiner = {"width": sizes["refiner_width"], "depth": sizes["refiner_depth"]}
    channels = sizes["prefix_channels"]
    codes = {"latent_width": sizes["code_width"], "vocabulary": sizes["num_codes"]}
    image = {"channels": 32, "multipliers": [1] * 5, "num_encoder_blocks": 1, "num_decoder_blocks": 1}
    with torch.device(device):
        return VARSR(
            {"sides": sides},
            image | codes | VQVAE,
            classes,
            None if channels is None else {"channels": channels},
            None if sizes["refiner_width"] is None else refiner,
        )


def tokenizer_of_sizes(sizes: dict, device: str = "cpu") -> MultiScaleTokenizer:
    with torch.device(device):
        return MultiScaleTokenizer(TokenizerConfig(**sizes))


def manifest(shared: Path, name: str) -> tuple[dict[str, Tensor], set[str]]:
    """Tensors of a published file on the meta device, and the names of those that are no parameters."""
    entries = json.loads((shared / "keys" / f"{name}.json").read_text())
    tensors = {
        name: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta")
        for name, entry in entries.items()
    }
    return tensors, {name for name, entry in entries.items() if entry["kind"] != "param"}


def number_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


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
    network = system_of(sizes, SIDES[sizes["num_levels"]] if kind != "var" else SIDES_VAR, "meta").network()
    assert parameters is None or number_of(network.values()) == parameters
    weights = {name: tensor for name, tensor in tensors.items() if name not in derived}
    loaded = varsr_tensors(network, [1, 2], weights, name)
    assert len(loaded) == len(weights)
    assert {t.shape for t in loaded.values()} == {t.shape for t in weights.values()}


def test_twelve_scales_have_1_101_919_520_parameters(shared: Path) -> None:
    sizes = varsr_sizes(manifest(shared, "varsr_d24")[0])
    network = system_of(sizes | {"num_levels": 12}, SIDES_12, "meta").network()
    assert number_of(network.values()) == 1_101_919_520


@pytest.mark.parametrize("name", ["varsr_vqvae", "var_vae_ch160v4096z32"])
def test_published_autoencoders_map_one_to_one(shared: Path, name: str) -> None:
    tensors, _ = manifest(shared, name)
    assert network_kind(tensors) == "vqvae"
    tokenizer = tokenizer_of_sizes(vqvae_sizes(tensors), "meta")
    assert number_of(tokenizer.parameters()) == 108_948_355
    loaded = vqvae_tensors(tokenizer.state_dict(), 5, tensors, name)
    assert len(loaded) == len(tensors) - 1


@pytest.mark.parametrize("stem", ["var", "varsr", "isr10", "c2i12"])
def test_golden_transformers_come_and_go(shared: Path, stem: str) -> None:
    golden = GoldenVARSR(shared / "fixtures" / "varsr")
    if stem not in golden.stems:
        pytest.skip(f"no golden tensors in {golden.folder}")
    tensors, system = load_file(golden.weights_file(stem, "own")), golden.system(stem)
    published = to_published_varsr(system.network(), [h for h, _ in system.schedule.scales])
    assert published.keys() - tensors.keys() <= {MASK}  # left out of the larger fixtures
    assert all(torch.equal(published[name].to(tensor.dtype), tensor) for name, tensor in tensors.items())


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
    network = system_of(tiny_sizes(), [1, 2]).network()
    published = to_published_varsr(network, [1, 2])
    assert varsr_sizes(published) == tiny_sizes()
    bare = {name: t for name, t in published.items() if name not in (LEVELS, MASK) and "zero_k" not in name}
    for tensors in (published, bare):
        loaded = varsr_tensors(network, [1, 2], tensors, "file")
        assert loaded.keys() == network.keys()


def test_what_follows_from_another_configuration_is_refused() -> None:
    network = system_of(tiny_sizes(), [1, 2]).network()
    published = to_published_varsr(network, [1, 2])
    assert published[LEVELS].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 1]]
    assert published[MASK][0, 0, 0].isinf().tolist() == [False] * 5 + [True] * 4
    published[LEVELS] = published[LEVELS].flip(1)
    with pytest.raises(UserError, match="file: lvl_1L has other values"):
        varsr_tensors(network, [1, 2], published, "file")
    with pytest.raises(UserError, match="lvl_1L"):
        varsr_tensors(network, [1, 3], to_published_varsr(network, [1, 2]), "file")


def test_a_missing_part_is_named() -> None:
    network = system_of(tiny_sizes(), [1, 2]).network()
    published = to_published_varsr(network, [1, 2])
    del published["diffloss.net.cond_embed.weight"]
    with pytest.raises(UserError, match="file does not fit the model; 1 missing: diffloss.net.cond_embed.weight"):
        varsr_tensors(network, [1, 2], published, "file")
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
        "vocabulary": 6,
        "latent_width": 4,
        **VQVAE,
    }
    tokenizer = tokenizer_of_sizes(sizes)
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


# ---- whole systems in the released form, at small sizes


CLASSES = RELEASED | {"prefix": None, "transformer": RELEASED["transformer"] | {"num_classes": 5}}
VAR = CLASSES | {"refiner": None, "sampling": {"raw_last": False}}
VAR["transformer"] = VAR["transformer"] | {"positions": "rows", "position_size": 5}


@pytest.mark.parametrize(("name", "sizes"), [("VARSR.pth", RELEASED), ("VARSR_C2I.pth", CLASSES), ("var_d16.pth", VAR)])
def test_released_files_open(tmp_path: Path, name: str, sizes: dict) -> None:
    ours = VARSR(**sizes, seed=3)
    system = VARSR.from_pretrained(release(ours, tmp_path, name))
    state = ours.state_dict()
    assert state.keys() == system.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in system.state_dict().items())
    if sizes["prefix"]:
        assert system.restore(torch.rand(3, 3, 5), 2).image.shape == (3, 6, 10)
    else:
        assert system.make([0, 1]).images_B3HW.shape == (2, 3, 4, 4)


def test_a_restorer_starts_from_classes(tmp_path: Path) -> None:
    classes = VARSR(**CLASSES, seed=3)
    file = release(classes, tmp_path, "VARSR_C2I.pth")
    system = VARSR(**RELEASED, weights={"transformer": str(file), "tokenizer": str(tmp_path / "VQVAE.pth")}, seed=4)
    assert torch.equal(system.transformer.head.weight, classes.transformer.head.weight)
    embedding = classes.transformer.condition.embedding.weight
    assert torch.equal(system.transformer.condition.embedding.weight, embedding[:2])
    assert system.transformer.start.shape == (1, 5, 8)
    assert "prefix_encoder.conv_in.weight" in system.initial_state()
    assert not any(name.startswith("tokenizer.") for name in system.initial_state())


@pytest.mark.parametrize(("name", "sizes"), [("VARSR_C2I.pth", CLASSES), ("var_d16.pth", VAR)])
def test_a_restorer_with_learned_positions_starts_from_classes(tmp_path: Path, name: str, sizes: dict) -> None:
    file = release(VARSR(**sizes, seed=3), tmp_path, name)
    rows = RELEASED["transformer"] | {"positions": "rows", "position_size": 9}
    system = VARSR(**(RELEASED | {"transformer": rows}), weights={"transformer": str(file)})
    assert "transformer.positions.table" in system.initial_state()
    assert system.restore(torch.rand(3, 3, 5), 2).image.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": {"sides": [1, 2, 2]}}, r"VARSR.pth has 2 scales, and model.schedule has 3"),
        ({"transformer": {**RELEASED["transformer"], "num_classes": 3}}, r"2 classes, and the model 3: set model.tr"),
        ({"refiner": None}, r"VARSR.pth does not fit the model; \d+ unexpected: decoder_norm"),
        ({"transformer": {**RELEASED["transformer"], "depth": 2}}, r"missing: blocks.1"),
        ({"prefix": None}, r"con_embedding"),
    ],
)
def test_another_model_is_refused_by_name(tmp_path: Path, change: dict, message: str) -> None:
    file = release(VARSR(**RELEASED), tmp_path, "VARSR.pth")
    with pytest.raises(UserError, match=message):
        VARSR(**(RELEASED | change), weights={"transformer": str(file)})


def test_missing_files_are_named(tmp_path: Path) -> None:
    file = release(VARSR(**RELEASED), tmp_path, "VARSR.pth")
    (tmp_path / "VQVAE.pth").unlink()
    with pytest.raises(UserError, match=r"VQVAE.pth; get VQVAE.pth .*qyp2000/VARSR"):
        VARSR.from_pretrained(file)
    with pytest.raises(UserError, match=r"set model.weights.transformer"):
        VARSR(**RELEASED, weights={"transformer": str(tmp_path / "nothing.pth")})
