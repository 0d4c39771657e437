"""The restorer: files it reads, sizes it takes, files it refuses."""

import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from spandrel import UnsupportedModelError
from torch import Tensor

from varestorer.conditioning.restorer import Restorer
from varestorer.utils.errors import UserError
from varestorer.weights.restorers import load_restorer, published_restorer_tensors, restorer_from_state_dict


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """A small SwinIR with the published names: unshuffle by 8, three doublings, window 8."""
    from spandrel.architectures.SwinIR import SwinIR

    torch.manual_seed(0)
    size = {"img_size": 16, "embed_dim": 12, "depths": [2], "num_heads": [2], "mlp_ratio": 2.0}
    form = {"window_size": 8, "upscale": 8, "upsampler": "nearest+conv", "start_unshuffle": 8, "in_chans": 3}
    network = SwinIR(**size, **form)
    renamed = {"conv_first.weight": "conv_first.1.weight", "conv_first.bias": "conv_first.1.bias"}
    return {renamed.get(name, name): tensor.clone() for name, tensor in network.state_dict().items()}


def test_plain_wrapped_and_prefixed_files_give_the_same(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / "plain.pth")
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "wrapped.ckpt")
    prefixed = {f"module.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"state_dict": prefixed}, tmp_path / "general_swinir_v1.ckpt")
    save_file(tensors, tmp_path / "plain.safetensors")
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    want = restorer_from_state_dict(tensors)(image)
    for name in ("plain.pth", "wrapped.ckpt", "general_swinir_v1.ckpt", "plain.safetensors", ""):
        assert torch.equal(load_restorer(tmp_path / name)(image), want), name


@pytest.mark.parametrize("size", [(1, 1), (5, 90), (64, 65), (100, 31)])
def test_any_size_comes_back_with_its_size(tensors: dict[str, Tensor], size: tuple[int, int]) -> None:
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(2))
    out = restorer_from_state_dict(tensors)(image)
    assert out.shape == image.shape and out.isfinite().all()


def test_it_is_frozen_and_stays_in_evaluation_mode(tensors: dict[str, Tensor]) -> None:
    restorer = restorer_from_state_dict(tensors)
    owner = torch.nn.ModuleList([restorer]).train()
    assert not any(part.training for part in owner[0].modules())
    assert not any(parameter.requires_grad for parameter in restorer.parameters())


def test_output_is_not_clamped_and_padding_is_cropped() -> None:
    class Double(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[-2:] == (16, 8)
            return 2 * x

    image = torch.rand(1, 3, 9, 5, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(Restorer(Double(), multiple=8)(image), 2 * image)


def test_a_missing_file_is_named_with_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.ckpt.*general_swinir_v1.ckpt.*model\.restorer"):
        load_restorer(tmp_path / "nowhere.ckpt")
    with pytest.raises(UserError, match=r"found at .*general_swinir_v1.ckpt"):
        load_restorer(tmp_path)


class _Harmful:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_files_that_are_not_plain_tensors_are_refused_unopened(tmp_path: Path) -> None:
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"state_dict": _Harmful(tmp_path / "made")}))
    torch.save({"state_dict": _Harmful(tmp_path / "made")}, tmp_path / "evil.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    (tmp_path / "text.safetensors").write_text("not tensors")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    for name in ("evil.ckpt", "evil.pth", "list.pth", "text.safetensors", "empty.ckpt"):
        with pytest.raises(UserError, match=name):
            load_restorer(tmp_path / name)
    assert not (tmp_path / "made").exists()


def test_tensors_that_do_not_fit_are_named(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    without = {name: tensor for name, tensor in tensors.items() if name != "conv_hr.bias"}
    torch.save(without, tmp_path / "less.pth")
    torch.save(tensors | {"conv_hr.extra": torch.zeros(1)}, tmp_path / "more.pth")
    torch.save({"weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    messages = {"less": r"conv_hr\.bias", "more": r"conv_hr\.extra", "other": "no such architecture"}
    for name, message in messages.items():
        with pytest.raises(UserError, match=rf"(?s){name}\.pth.*{message}"):
            load_restorer(tmp_path / f"{name}.pth")


def test_the_lists_of_a_file_near_the_published_one_are_those_of_its_names(tmp_path: Path) -> None:
    published = published_restorer_tensors()
    first = "layers.0.residual_group.blocks.0.norm1.weight"  # spandrel knows a SwinIR by it
    for name in ("conv_up3.weight", first):
        with pytest.raises(UserError, match=rf"\(1 missing: {re.escape(name)}\)"):
            restorer_from_state_dict({other: tensor for other, tensor in published.items() if other != name})
    changed = published | {"stranger": torch.zeros(1), "conv_hr.bias": torch.zeros(3)}
    with pytest.raises(UserError, match=r"1 unexpected: stranger; 1 misshapen: conv_hr\.bias \(wanted \(64,\), got"):
        restorer_from_state_dict(changed)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("upscale 8 needs\n another version"), r"\(upscale 8 needs another version\)"),
        (RuntimeError(), r"\(RuntimeError\)"),
        (UnsupportedModelError(), r"\(spandrel knows no such architecture\)"),
    ],
)
def test_a_version_that_cannot_build_the_published_network_says_why(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("spandrel.ModelLoader.load_from_state_dict", fail)
    with pytest.raises(UserError, match=told):  # no tensor is wrong, so none can be named
        restorer_from_state_dict(published_restorer_tensors())


def test_missing_unexpected_and_misshapen_tensors_of_other_sizes_are_listed(tensors: dict[str, Tensor]) -> None:
    layers = {name for name in tensors if ".blocks.1.mlp." in name}
    changed = {name: tensor for name, tensor in tensors.items() if name not in layers}
    changed |= {f"stranger{number}": torch.zeros(1) for number in range(15)} | {"conv_hr.bias": torch.zeros(3)}
    with pytest.raises(
        UserError, match=r"4 missing: layers\.0\..*; 15 unexpected: .* and 3 more; 1 misshapen: conv_hr"
    ):
        restorer_from_state_dict(changed)


@pytest.mark.parametrize("name", ["attn_mask", "attn.relative_position_index"])
def test_derived_tensors_are_checked_against_the_architecture(tensors: dict[str, Tensor], name: str) -> None:
    full = f"layers.0.residual_group.blocks.1.{name}"
    with pytest.raises(UserError, match=rf"{re.escape(full)} has other values"):
        restorer_from_state_dict(tensors | {full: tensors[full] + 1})


def test_the_published_names_come_back(tensors: dict[str, Tensor]) -> None:
    back = restorer_from_state_dict(tensors).published_state_dict()
    assert back.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in back.items())
