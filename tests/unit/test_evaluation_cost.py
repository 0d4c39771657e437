"""Parameters, operations, seconds and memory of a system, stage by stage."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from text_models import save_t5

from varestorer.evaluation.cost import add_published_restorer, cost_of, measure, num_trained, spent_by
from varestorer.evaluation.memory import peak_memory
from varestorer.systems.varestorer import VARestorer
from varestorer.transformer.blocks import ffn_width

C, DEPTH, BITS, TEXT_WIDTH, TEXT = 32, 2, 8, 16, 3  # of `tiny_system`, as are sides 1, 2, 4 and rank 4
PREDICTED = 1 + 4 + 16
TOKENS = PREDICTED + 16  # and the long input, which the last block makes only keys and values of
RANK = 4


def transformer_flops() -> int:
    """By hand: two operations for each multiply-add of every matrix product of the merged student."""
    outputs = [TOKENS] * (DEPTH - 1) + [PREDICTED]  # tokens that leave each block
    linear = sum(TOKENS * 3 * C * C + num * (3 * C * C + 2 * C * ffn_width(C)) for num in outputs)
    text = DEPTH * 2 * TEXT * C * C  # keys and values of cross attention
    attention = sum(2 * num * TOKENS * C + 2 * num * TEXT * C for num in outputs)
    inputs = (TOKENS - 1) * BITS * C
    head = PREDICTED * C * 2 * BITS + C * 2 * C
    pool = TEXT * TEXT_WIDTH * 2 * C + 2 * TEXT * C + C * C
    memory = TEXT * TEXT_WIDTH * C + TEXT * C * C
    modulation = C * 6 * C
    return 2 * (linear + text + attention + inputs + head + pool + memory + modulation)


def test_operations_of_the_transformer_equal_those_by_hand(tiny_system: VARestorer) -> None:
    assert cost_of(tiny_system.merge_adapters())["transformer"].flops == transformer_flops()


def test_adapters_cost_while_they_are_not_merged(tiny_system: VARestorer) -> None:
    # queries, keys and values of all tokens; self attention's output, and cross attention's queries and output
    tokens = DEPTH * TOKENS * 4 * C + ((DEPTH - 1) * TOKENS + PREDICTED) * 3 * 2 * C
    extra = 2 * RANK * (tokens + DEPTH * TEXT * 3 * C)
    assert cost_of(tiny_system)["transformer"].flops == transformer_flops() + extra


def test_operations_of_the_decoder_equal_those_by_hand(tiny_system: VARestorer) -> None:
    # 4x4 positions: 8 -> 32 channels, the middle's and the first level's three blocks of two convolutions
    # 8x8 positions: after up-sampling one more, a block, and the output of 3 * 4 * 4 channels
    coarse = 16 * 9 * (BITS * C + 6 * C * C)
    fine = 64 * 9 * (C * C + 2 * C * C + C * 48)
    assert cost_of(tiny_system)["VAE decoder"].flops == 2 * (coarse + fine)


def test_stages_hold_all_parameters(tiny_system: VARestorer) -> None:
    costs = cost_of(tiny_system)
    assert list(costs) == ["VAE encoder", "transformer", "VAE decoder"]
    assert sum(cost.params for cost in costs.values()) == sum(p.numel() for p in tiny_system.parameters())


def test_counting_changes_nothing(tiny_system: VARestorer) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_system.state_dict().items()}
    flags = [parameter.requires_grad for parameter in tiny_system.parameters()]
    cost_of(tiny_system)
    after = tiny_system.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [parameter.requires_grad for parameter in tiny_system.parameters()] == flags


def test_a_system_without_weights_costs_the_same(tiny_system: VARestorer) -> None:
    with torch.device("meta"):
        blank = VARestorer(**tiny_system.config)
    assert cost_of(blank) == cost_of(tiny_system)


def test_trained_parameters_are_those_of_the_adapters_merged_or_not(tiny_system: VARestorer) -> None:
    per_block = RANK * ((C + 3 * C) + (C + C) + (C + C) + (C + 2 * C) + (C + C))
    assert num_trained(tiny_system) == DEPTH * per_block
    assert num_trained(tiny_system.merge_adapters()) == DEPTH * per_block


def test_text_encoder_is_a_stage_of_its_own(tiny_system: VARestorer, tmp_path: Path) -> None:
    from transformers import AutoConfig, T5EncoderModel

    encoder = T5EncoderModel(AutoConfig.from_pretrained(save_t5(tmp_path / "t5"))).eval()
    cost = cost_of(tiny_system, encoder, prompt_tokens=5)["text encoder"]
    # two layers of width 16: two heads of 8, a gated feed-forward of 32
    linear, attention = 4 * 16 * 16 + 3 * 16 * 32, 2 * 5 * 16
    assert cost.flops == 2 * 2 * 5 * (linear + attention)
    assert cost.params == sum(p.numel() for p in encoder.parameters())


def test_published_restorer_is_counted(tiny_system: VARestorer) -> None:
    with torch.device("meta"):
        blank = VARestorer(**tiny_system.config)
    add_published_restorer(blank)
    assert cost_of(blank)["restorer"].params == 15_792_587
    assert list(cost_of(blank))[0] == "restorer"


def test_measured_stages_are_the_counted_ones(tiny_system: VARestorer) -> None:
    found = measure({"tiny": tiny_system}, repeats=2)["tiny"]
    assert found.stages.keys() == cost_of(tiny_system).keys()
    assert found.seconds > 0 and all(seconds > 0 for seconds in found.stages.values())
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tiny_system.state_dict().values())
    assert found.peak_bytes is None or found.peak_bytes >= weights


def test_spending_is_summed_over_calls_and_hooks_are_removed() -> None:
    module, reading = torch.nn.Identity(), iter(range(100))
    with spent_by({"x": [module]}, lambda: float(next(reading))) as spent:
        module(torch.zeros(1))
        module(torch.zeros(1))
    module(torch.zeros(1))
    assert spent == {"x": 2.0} and next(reading) == 4


def test_peak_memory_sees_what_is_freed_again() -> None:
    peak = peak_memory(lambda: torch.ones(64, 2**18).sum(), torch.device("cpu"))
    if peak is None:
        pytest.skip("this system does not tell the memory of a process")
    assert 60e6 < peak < 140e6
    assert peak_memory(lambda: None, torch.device("meta")) is None


def test_the_counter_agrees_with_the_formulas_of_varsr_and_hvar(compose: Callable[..., DictConfig]) -> None:
    # by formula, in multiply-adds: prefix encoder; both halves of the blocks and the head; refiner whose condition and
    # time are embedded once; decoder of 512 pixels
    wanted = {
        "varsr": {"prefix encoder": 0.073, "transformer": 5.45, "refiner": 0.692, "VAE decoder": 0.791},
        "hvar": {"VAE encoder": 0.433, "transformer": 1.307, "VAE decoder": 0.791},
    }
    for name, stages in wanted.items():
        with torch.device("meta"):
            system = instantiate(compose("train", f"system={name}").model)
        counted = {stage: cost.flops / 2e12 for stage, cost in cost_of(system).items()}
        assert stages == pytest.approx({stage: counted[stage] for stage in stages}, rel=0.015)


def test_what_trains_is_all_but_the_tokenizer_or_the_adapters_alone(
    compose: Callable[..., DictConfig],
) -> None:
    with torch.device("meta"):
        model = compose("train", "system=varsr", "model=varsr_tiny").model
        system, student = instantiate(model), instantiate(model, student={"lora_rank": 2})
    whole = sum(p.numel() for p in system.parameters())
    assert num_trained(system) == whole - sum(p.numel() for p in system.tokenizer.parameters())
    assert num_trained(student) == sum(p.numel() for n, p in student.named_parameters() if ".lora_" in n) > 0


def test_a_network_that_is_called_in_parts_is_timed(compose: Callable[..., DictConfig]) -> None:
    system = instantiate(compose("train", "system=varsr", "model=varsr_tiny").model).eval()
    found = measure({"varsr": system}, repeats=1)["varsr"]
    assert set(found.stages) == {"prefix encoder", "VAE encoder", "transformer", "refiner", "VAE decoder"}
    assert found.stages["refiner"] > 0 and found.stages["transformer"] > 0 and found.stages["VAE encoder"] == 0
