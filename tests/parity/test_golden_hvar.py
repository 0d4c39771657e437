"""Hierarchical tokens, preference loss and position tables against golden tensors of H-VAR's reading."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from varestorer.commands.parity import COMMAND
from varestorer.parity import compare

pytestmark = pytest.mark.parity
TENSORS = "hit.io.safetensors"
INPUTS = {"hr_u8", "lr_u8", "dpo/logits_hr", "dpo/logits_lr", "positions/table", "positions/var_16x16"}


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    folder = shared / "fixtures" / "hvar"
    if not folder.is_dir():
        pytest.skip(f"no golden tensors in {folder}")
    return folder


def with_errors(golden: Path, target: Path) -> Path:
    """A copy in which every output is wrong in one number."""
    shutil.copytree(golden, target)
    tensors = load_file(golden / TENSORS)
    for name, tensor in tensors.items():
        if name not in INPUTS:
            flat = tensor.clone().view(-1)
            flat[flat.numel() // 2] += 1 if tensor.dtype == torch.int64 else 2e-3
            tensors[name] = flat.view(tensor.shape)
    (target / TENSORS).unlink()
    save_file(tensors, target / TENSORS)
    return target


def test_all_golden_tensors_agree_and_every_output_is_compared(golden: Path) -> None:
    checks = list(compare(golden))
    assert [check.name for check in checks if not check.ok] == []
    outputs = {f"hit/{name}" for name in load_file(golden / TENSORS) if name not in INPUTS}
    assert {check.name for check in checks} == outputs


def test_an_error_in_any_output_is_found_and_the_command_says_so(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_errors(golden, tmp_path / "wrong")
    assert COMMAND.main([f"fixtures={folder}"]) == 1
    over = {line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("over: ")}
    # golden tokens feed what is decoded and the likelihoods, so these differ at more than their own place
    assert over == {f"hit/{name}" for name in load_file(golden / TENSORS) if name not in INPUTS}


def test_a_folder_without_one_of_its_files_is_a_wrong_command(golden: Path, tmp_path: Path) -> None:
    shutil.copy(golden / "hit.json", tmp_path / "hit.json")
    assert COMMAND.main([f"fixtures={tmp_path}"]) == 2
