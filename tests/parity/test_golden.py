"""Our networks against golden tensors of the published ones, through the parity command."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from varestorer.commands.parity import COMMAND
from varestorer.parity import compare

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    folder = shared / "fixtures" / "infinity"
    if not folder.is_dir():
        pytest.skip(f"no golden tensors in {folder}")
    return folder


def copy_with_error(golden: Path, target: Path, file: str, tensor: str, error: float) -> None:
    shutil.copytree(golden, target)
    tensors = load_file(golden / file)
    flat = tensors[tensor].clone().view(-1)
    flat[flat.numel() // 2] += error
    tensors[tensor] = flat.view(tensors[tensor].shape)
    (target / file).unlink()
    save_file(tensors, target / file)


def test_every_golden_output_is_compared_and_agrees(golden: Path) -> None:
    checks = list(compare(golden))
    assert [check.name for check in checks if not check.ok] == []
    assert len(checks) >= 138
    compared = {check.name for check in checks}
    outputs = {
        f"{file.stem}/{name}"
        for file in golden.glob("*.safetensors")
        for name in load_file(file)
        if not name.startswith(("sd/", "input/")) and name not in ("apply/q", "apply/k")
        if not name.endswith("/token_index")
    }
    assert outputs - compared == set()


@pytest.mark.parametrize(
    ("file", "tensor", "error"),
    [
        ("student.safetensors", "out/logits_long", 1e-2),
        ("vae.safetensors", "encode/summed_codes", 1e-2),
        ("swinir.safetensors", "mid/layer0", 1e-2),
        ("teacher_outputs.safetensors", "multi_neg/bits_3", 1),
    ],
)
def test_a_planted_error_is_reported(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, tensor: str, error: float
) -> None:
    copy_with_error(golden, tmp_path / "copy", file, tensor, error)
    assert COMMAND.main([f"fixtures={tmp_path / 'copy'}"]) == 1
    over = [line for line in capsys.readouterr().out.splitlines() if line.startswith("over: ")]
    assert len(over) == 1
    assert f"{file.removesuffix('.safetensors')}/{tensor} " in over[0]


def test_a_nan_is_over_the_tolerance(golden: Path, tmp_path: Path) -> None:
    copy_with_error(golden, tmp_path / "copy", "teacher_outputs.safetensors", "forced/loss_plain", float("nan"))
    bad = [check.name for check in compare(tmp_path / "copy") if not check.ok]
    assert bad == ["teacher_outputs/forced/loss_plain"]


def test_a_missing_folder_is_a_wrong_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMAND.main([f"fixtures={tmp_path / 'nowhere'}"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_derived_tensors_are_checked(golden: Path, tmp_path: Path) -> None:
    copy_with_error(golden, tmp_path / "copy", "student.safetensors", "sd/block_chunks.0.module.0.sa.zero_k_bias", 1)
    with pytest.raises(Exception, match="zero_k_bias has other values"):
        list(compare(tmp_path / "copy"))


def test_weights_load_strictly(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden, tmp_path / "copy")
    tensors = load_file(golden / "teacher_weights.safetensors")
    tensors["sd/extra"] = torch.zeros(1)
    del tensors["sd/head.bias"]
    (tmp_path / "copy" / "teacher_weights.safetensors").unlink()
    save_file(tensors, tmp_path / "copy" / "teacher_weights.safetensors")
    with pytest.raises(Exception, match=r"1 missing: head\.bias; 1 unexpected: extra"):
        list(compare(tmp_path / "copy"))
