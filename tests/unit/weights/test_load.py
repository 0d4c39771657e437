"""Published names, strict loading, refusal of what is more than tensors."""

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from varestorer.systems.varestorer import VARestorer
from varestorer.tokenizer import TokenizerConfig
from varestorer.transformer import TransformerConfig
from varestorer.transformer.adapters import plain_state_dict
from varestorer.utils.errors import UserError
from varestorer.weights.files import read_entries, read_tensors
from varestorer.weights.load import load_part
from varestorer.weights.published import to_published
from varestorer.weights.published.infinity import (
    LFQ_MASKS,
    adapter_rank,
    derived_tokenizer_buffers,
    derived_transformer_buffers,
    published_tokenizer_name,
    read_manifest,
    tokenizer_sizes,
    transformer_names,
    transformer_sizes,
)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def published_tokenizer(system: VARestorer) -> dict[str, torch.Tensor]:
    state = system.tokenizer.state_dict()
    names = {name: published_tokenizer_name(name, 2) for name in state}
    derived = derived_tokenizer_buffers(8)
    return to_published({name: tensor + 1 for name, tensor in state.items()}, names, derived)


def published_transformer(system: VARestorer, with_adapters: bool) -> dict[str, torch.Tensor]:
    plain = plain_state_dict(system.transformer)
    if not with_adapters:
        plain = {name: tensor for name, tensor in plain.items() if ".lora_" not in name}
    names = transformer_names(plain, 1)
    derived = derived_transformer_buffers(names.values(), 32)
    return to_published({name: tensor + 1 for name, tensor in plain.items()}, names, derived)


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
    assert "1 missing: head.bias" in message
    assert "1 unexpected: stranger" in message
    assert "word_embed.weight (wanted (32, 8), got (3, 3))" in message


def test_long_lists_name_a_dozen_and_the_count(tiny_system: VARestorer, tmp_path: Path) -> None:
    tensors = published_transformer(tiny_system, with_adapters=False)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("block_chunks.1")}
    torch.save(kept, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"model\.pth does not fit") as caught:
        load_part(tiny_system, "transformer", tmp_path / "model.pth")
    gone = len(tensors) - len(kept)
    assert f"{gone} missing: block_chunks.1.module.0.ada_gss" in str(caught.value)
    assert f"and {gone - 12} more" in str(caught.value)
    assert str(caught.value).count("block_chunks.1") == 12


def test_an_integer_tensor_does_not_pass_for_a_weight(tiny_system: VARestorer, tmp_path: Path) -> None:
    tensors = published_transformer(tiny_system, with_adapters=False)
    torch.save(tensors | {"head.bias": torch.zeros(16, dtype=torch.int64)}, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"head\.bias \(wanted \(16,\) float32, got \(16,\) int64\)"):
        load_part(tiny_system, "transformer", tmp_path / "model.pth")


@pytest.mark.parametrize("there", LFQ_MASKS)
def test_either_name_of_the_mask_is_enough_and_none_is_too_few(
    tiny_system: VARestorer, tmp_path: Path, there: str
) -> None:
    tensors = published_tokenizer(tiny_system)
    one = {name: tensor for name, tensor in tensors.items() if name == there or name not in LFQ_MASKS}
    torch.save({"vae": one}, tmp_path / "one.pth")
    load_part(tiny_system, "tokenizer", tmp_path / "one.pth")
    none = {name: tensor for name, tensor in tensors.items() if name not in LFQ_MASKS}
    torch.save({"vae": none}, tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"none\.pth.*1 missing: quantizer\.lfq\.mask"):
        load_part(tiny_system, "tokenizer", tmp_path / "none.pth")


def test_a_missing_zero_bias_is_reported(tiny_system: VARestorer, tmp_path: Path) -> None:
    tensors = published_transformer(tiny_system, with_adapters=True)
    del tensors["block_chunks.1.module.0.sa.zero_k_bias"]
    torch.save(tensors, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"1 missing: block_chunks\.1\.module\.0\.sa\.zero_k_bias"):
        load_part(tiny_system, "transformer", tmp_path / "model.pth")


def test_a_layer_under_both_its_names_is_one_too_many(tiny_system: VARestorer, tmp_path: Path) -> None:
    tensors = published_tokenizer(tiny_system)
    tensors["encoder.conv_in.weight"] = tensors["encoder.conv_in.conv.weight"]
    torch.save({"vae": tensors}, tmp_path / "vae.pth")
    with pytest.raises(UserError, match=r"1 unexpected: encoder\.conv_in\.weight"):
        load_part(tiny_system, "tokenizer", tmp_path / "vae.pth")


def test_the_prefix_of_data_parallel_is_taken_off(tiny_system: VARestorer, tmp_path: Path) -> None:
    tensors = published_transformer(tiny_system, with_adapters=True)
    torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.pth")
    assert read_tensors(tmp_path / "model.pth").keys() == tensors.keys()
    torch.save(tensors | {"module.x": torch.zeros(1)}, tmp_path / "one.pth")
    assert "module.x" in read_tensors(tmp_path / "one.pth")


@pytest.mark.parametrize("kind", ["infinity_2b", "varestorer_student_lora_r32"])
def test_sizes_of_the_published_transformers_are_the_defaults(shared: Path, kind: str) -> None:
    tensors = read_manifest(shared / "keys" / f"{kind}.json")
    assert TransformerConfig(**transformer_sizes(tensors)) == TransformerConfig()
    assert adapter_rank(tensors) == (32 if "student" in kind else 0)


@pytest.mark.parametrize("bare_names", [False, True])
def test_sizes_of_the_published_tokenizer_are_the_defaults(shared: Path, bare_names: bool) -> None:
    tensors = read_manifest(shared / "keys" / "infinity_vae_d32.json")
    if bare_names:
        tensors = {re.sub(r"\.(conv|norm)(?=\.(weight|bias)$)", "", name): t for name, t in tensors.items()}
    assert TokenizerConfig(**tokenizer_sizes(tensors)) == TokenizerConfig()


def test_sizes_of_small_networks_are_read_as_well(tiny_system: VARestorer) -> None:
    student = published_transformer(tiny_system, with_adapters=True)
    ours = tiny_system.transformer.config
    assert TransformerConfig(**transformer_sizes(student), gamma_init=ours.gamma_init) == ours
    assert adapter_rank(student) == 4
    assert TokenizerConfig(**tokenizer_sizes(published_tokenizer(tiny_system))) == tiny_system.tokenizer.config


@pytest.mark.parametrize(
    ("read", "missing", "kind"),
    [
        (transformer_sizes, "word_embed.weight", r"a transformer such as infinity_2b_reg\.pth"),
        (tokenizer_sizes, r"encoder\.conv_in\.conv\.weight", r"a tokenizer such as infinity_vae_d32reg\.pth"),
    ],
)
def test_a_file_without_sizes_names_what_it_lacks(read: Callable, missing: str, kind: str) -> None:
    with pytest.raises(UserError, match=rf"no tensor {missing}: this is not {kind}"):
        read({"head.bias": torch.zeros(1)})


def test_a_derived_tensor_of_another_value_is_refused(tiny_system: VARestorer, tmp_path: Path) -> None:
    tensors = published_tokenizer(tiny_system)
    tensors["quantizer.lfq.mask"] = tensors["quantizer.lfq.mask"] + 1
    torch.save({"vae": tensors}, tmp_path / "vae.pth")
    with pytest.raises(UserError, match=r"quantizer\.lfq\.mask has other values"):
        load_part(tiny_system, "tokenizer", tmp_path / "vae.pth")


@pytest.mark.parametrize("read", [read_tensors, read_entries])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path, read: Callable) -> None:
    content = {"weight": torch.zeros(1), "payload": Malicious(tmp_path / "made")}
    torch.save(content, tmp_path / "zip.pth")
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(content["payload"]))
    for name in ("zip.pth", "old.pth", "bare.pth"):
        with pytest.raises(UserError, match=rf"{name}: damaged, or it holds more than tensors, whose code is not run"):
            read(tmp_path / name)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(("name", "content"), [("a.pth", b""), ("a.pth", b"x" * 99), ("a.safetensors", b"{}")])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        read_tensors(tmp_path / name)


def test_a_missing_file_says_which_to_get(tiny_system: VARestorer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"infinity_2b_reg\.pth.*model\.weights\.transformer"):
        load_part(tiny_system, "transformer", tmp_path / "none.pth")
