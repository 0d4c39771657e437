"""Published names, strict loading, refusal of what is more than tensors."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from varestorer.systems.parts import load_part
from varestorer.systems.varestorer import VARestorer
from varestorer.transformer.adapters import plain_state_dict
from varestorer.utils.errors import UserError
from varestorer.weights.files import read_tensors
from varestorer.weights.load import transformer_names
from varestorer.weights.published import (
    derived_tokenizer_buffers,
    derived_transformer_buffers,
    published_tokenizer_name,
    to_published,
)


class Malicious:
    def __reduce__(self) -> tuple:
        return os.system, ("echo never",)


def published_tokenizer(system: VARestorer) -> dict[str, torch.Tensor]:
    state = system.tokenizer.state_dict()
    names = {name: published_tokenizer_name(name, 2) for name in state}
    derived = derived_tokenizer_buffers(8, ["quantizer.lfq.mask", "quantize.lfq.mask"])
    return to_published({name: tensor + 1 for name, tensor in state.items()}, names, derived)


def published_transformer(system: VARestorer, with_adapters: bool) -> dict[str, torch.Tensor]:
    plain = plain_state_dict(system.transformer)
    if not with_adapters:
        plain = {name: tensor for name, tensor in plain.items() if ".lora_" not in name}
    names = transformer_names(plain, 1)
    derived = derived_transformer_buffers(names.values(), 32)
    return to_published({name: tensor + 1 for name, tensor in plain.items()}, names, derived)


@pytest.mark.parametrize("manifest", ["infinity_2b", "varestorer_student_lora_r32", "infinity_vae_d32"])
def test_every_published_tensor_has_one_of_ours(shared: Path, manifest: str) -> None:
    published = json.loads((shared / "keys" / f"{manifest}.json").read_text())
    rank = 32 if "student" in manifest else 0
    with torch.device("meta"):
        system = VARestorer({"size": "0.25M"}, {}, {}, {"lora_rank": rank})
    if manifest == "infinity_vae_d32":
        ours = system.tokenizer.state_dict()
        names = {name: published_tokenizer_name(name, 5) for name in ours}
        derived = derived_tokenizer_buffers(32, published)
    else:
        ours = plain_state_dict(system.transformer)
        names = transformer_names(ours, 4)
        derived = derived_transformer_buffers(names.values(), 2048)
    shapes = {name: list(tensor.shape) for name, tensor in to_published(ours, names, derived).items()}
    assert len(set(names.values())) == len(names)
    assert shapes == {name: entry["shape"] for name, entry in published.items()}


@pytest.mark.parametrize("bare_names", [False, True])
def test_a_published_tokenizer_loads_with_and_without_infixes(
    tiny_system: VARestorer, tmp_path: Path, bare_names: bool
) -> None:
    expected = {name: tensor + 1 for name, tensor in tiny_system.tokenizer.state_dict().items()}
    tensors = published_tokenizer(tiny_system)
    if bare_names:
        tensors = {re.sub(r"\.(conv|norm)(?=\.(weight|bias)$)", "", name): t for name, t in tensors.items()}
    torch.save({"vae": tensors, "optimizer": {}}, tmp_path / "vae.pth")
    load_part(tiny_system, "tokenizer", tmp_path / "vae.pth")
    assert all(torch.equal(tiny_system.tokenizer.state_dict()[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("with_adapters", [False, True])
def test_a_published_transformer_loads(tiny_system: VARestorer, tmp_path: Path, with_adapters: bool) -> None:
    before = {name: tensor.clone() for name, tensor in plain_state_dict(tiny_system.transformer).items()}
    torch.save(published_transformer(tiny_system, with_adapters), tmp_path / "model.pth")
    load_part(tiny_system, "transformer", tmp_path / "model.pth")
    for name, tensor in plain_state_dict(tiny_system.transformer).items():
        changed = with_adapters or ".lora_" not in name
        assert torch.equal(tensor, before[name] + 1 if changed else before[name])


def test_a_wrong_file_names_what_is_wrong(tiny_system: VARestorer, tmp_path: Path) -> None:
    tensors = published_transformer(tiny_system, with_adapters=False)
    tensors["word_embed.weight"] = torch.zeros(3, 3)
    tensors["stranger"] = torch.zeros(1)
    del tensors["head.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_part(tiny_system, "transformer", tmp_path / "model.safetensors")
    message = str(caught.value)
    assert "missing: head.bias" in message
    assert "unexpected: stranger" in message
    assert "word_embed.weight (wanted (32, 8), got (3, 3))" in message


def test_a_derived_tensor_of_another_value_is_refused(tiny_system: VARestorer, tmp_path: Path) -> None:
    tensors = published_tokenizer(tiny_system)
    tensors["quantizer.lfq.mask"] = tensors["quantizer.lfq.mask"] + 1
    torch.save({"vae": tensors}, tmp_path / "vae.pth")
    with pytest.raises(UserError, match=r"quantizer\.lfq\.mask has other values"):
        load_part(tiny_system, "tokenizer", tmp_path / "vae.pth")


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1), "payload": Malicious()}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=r"bad\.pth: damaged, or it holds more than tensors"):
        read_tensors(tmp_path / "bad.pth")


@pytest.mark.parametrize(("name", "content"), [("a.pth", b""), ("a.pth", b"x" * 99), ("a.safetensors", b"{}")])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        read_tensors(tmp_path / name)


def test_a_missing_file_says_which_to_get(tiny_system: VARestorer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"infinity_2b_reg\.pth.*model\.weights\.transformer"):
        load_part(tiny_system, "transformer", tmp_path / "none.pth")
