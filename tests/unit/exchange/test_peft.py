"""Adapters in PEFT's own file format: read by peft's loader, and read back."""

import json
import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from varestorer.exchange import peft
from varestorer.systems.varestorer import VARestorer
from varestorer.transformer import VARTransformer
from varestorer.transformer.adapters import TARGETS, target_pattern
from varestorer.utils.errors import UserError
from varestorer.weights.bundle import adapter_tensors, put_adapters
from varestorer.weights.files import read_tensors, save_tensors


def teacher_of(system: VARestorer) -> VARTransformer:
    """A copy of the base network, in which peft knows nothing of our adapters."""
    teacher = VARTransformer(system.transformer.config)
    teacher.load_state_dict(system.parts()["transformer"])
    return teacher.eval().requires_grad_(False)


def read_again(system: VARestorer, folder: Path) -> VARestorer:
    student, tensors = peft.read(folder, system)
    return put_adapters(system, folder / peft.TENSORS, student, tensors)


def test_pefts_own_loader_makes_the_student_of_the_teacher(tiny_system: VARestorer, tmp_path: Path) -> None:
    peft.save(tiny_system, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    condition, text = (
        tiny_system.condition(torch.rand(2, 3, tiny_system.tile, tiny_system.tile)),
        tiny_system.null_text(2),
    )
    wanted = tiny_system.student_logits(condition, text)

    def logits(network: VARTransformer) -> torch.Tensor:
        for block in network.blocks:
            block.cross_attention.use_v_bias = False  # type: ignore[union-attr]  # the student's, no matter of peft's
        count = slice(0, tiny_system.schedule.num_tokens)
        return network(condition.tokens_BLZ, text, condition.layout, asked=count)

    before = logits(teacher_of(tiny_system))
    loaded = PeftModel.from_pretrained(teacher_of(tiny_system), str(tmp_path))
    torch.testing.assert_close(logits(loaded.base_model.model), wanted)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), wanted)
    assert (before - wanted).abs().max() > 0.1  # so that adapters that are not loaded would show


def test_what_is_written_is_read_back_to_the_bit(tiny_system: VARestorer, tmp_path: Path) -> None:
    peft.save(tiny_system, tmp_path)
    again = read_again(tiny_system, tmp_path)
    assert again.student_config == tiny_system.student_config
    wanted, got = adapter_tensors(tiny_system), adapter_tensors(again)
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_adapters_that_peft_wrote_are_read_with_their_scale(
    tiny_system: VARestorer, tmp_path: Path, caplog: pytest.LogCaptureFixture, use_rslora: bool
) -> None:
    config = LoraConfig(r=3, lora_alpha=12, target_modules=target_pattern(TARGETS), use_rslora=use_rslora)
    model = get_peft_model(teacher_of(tiny_system), config)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(str(tmp_path))
    with caplog.at_level(logging.WARNING):
        ours = read_again(tiny_system, tmp_path).merge_adapters()
    assert "says nothing of the student" in caplog.text
    assert ours.student_config.lora_rank == 3 and ours.student_config.lora_targets == TARGETS
    theirs = model.merge_and_unload().state_dict()
    for name, tensor in ours.transformer.state_dict().items():
        if not name.endswith("cross_attention.v_bias"):  # zero in this student, see `StudentConfig`
            torch.testing.assert_close(tensor, theirs[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "only plain LoRA adapters of one rank can be read, got IA3 of rank 4"),
        ({"use_dora": True, "bias": "all"}, "got LORA of rank 4 with use_dora, bias"),
        ({"r": None}, "is no config of a LoRA adapter"),
    ],
)
def test_adapters_of_another_kind_are_refused(
    tiny_system: VARestorer, tmp_path: Path, changes: dict, message: str
) -> None:
    peft.save(tiny_system, tmp_path)
    path = tmp_path / peft.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        peft.read(tmp_path, tiny_system)


def test_tensors_that_do_not_fit_and_systems_without_adapters_are_refused(
    tiny_system: VARestorer, tmp_path: Path
) -> None:
    peft.save(tiny_system, tmp_path)
    tensors = read_tensors(tmp_path / peft.TENSORS)
    tensors.pop("base_model.model.blocks.0.self_attention.qkv.lora_A.weight")
    save_tensors(tmp_path / peft.TENSORS, tensors)
    with pytest.raises(UserError, match="1 missing: blocks.0.self_attention.qkv.lora_down.weight"):
        read_again(tiny_system, tmp_path)
    with pytest.raises(UserError, match="no adapters of its own"):
        peft.save(tiny_system.merge_adapters(), tmp_path)
