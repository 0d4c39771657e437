"""The counter against formulas from the sizes alone; least bytes; what counting leaves as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from formulas import decoder_flops, encoder_flops, swinir_flops, text_flops, transformer_flops
from omegaconf import DictConfig, OmegaConf

from varestorer.benchmark.counting import Ledger, as_on_cuda, count
from varestorer.benchmark.networks import Source, restoring_counts, sharing, without_weights
from varestorer.conditioning.restorer import PUBLISHED_SIZES
from varestorer.systems.acceleration import Acceleration
from varestorer.systems.varestorer import VARestorer
from varestorer.transformer.blocks import ffn_width
from varestorer.utils.watch import observed, watch

C, DEPTH, BITS, TEXT_WIDTH, TEXT = 32, 2, 8, 16, 3  # of `tiny_system`, as are sides 1, 2, 4 and rank 4
PREDICTED = 1 + 4 + 16
TOKENS = PREDICTED + 16  # and the long input, which the last block makes only keys and values of
RANK = 4


def flops_by_hand() -> int:
    """Two operations for each multiply-add of every matrix product of the merged student."""
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
    merged = restoring_counts(without_weights(tiny_system).merge_adapters())
    assert merged["transformer"].flops == flops_by_hand()
    # queries, keys and values of all tokens; self attention's output, and cross attention's queries and output
    tokens = DEPTH * TOKENS * 4 * C + ((DEPTH - 1) * TOKENS + PREDICTED) * 3 * 2 * C
    extra = 2 * RANK * (tokens + DEPTH * TEXT * 3 * C)
    assert restoring_counts(without_weights(tiny_system))["transformer"].flops == flops_by_hand() + extra


@pytest.mark.parametrize("means", [None, "merged", "bf16"])
def test_counter_and_formulas_agree(tiny_system: VARestorer, means: str | None) -> None:
    blank, sizes = without_weights(tiny_system), tiny_system.transformer.config
    counts = restoring_counts(blank, 2, None if means is None else Acceleration.parse(means))
    rank = RANK if means is None else 0
    whole = 2 * transformer_flops(sizes, TOKENS, TEXT, PREDICTED, rank) - text_flops(sizes, TEXT, rank)
    if means is not None:  # the text is prepared once for all
        whole -= text_flops(sizes, TEXT)
    assert counts["transformer"].flops == whole
    assert counts["VAE encoder"].flops == 2 * encoder_flops(tiny_system.tokenizer.config, tiny_system.tile)
    assert counts["VAE decoder"].flops == 2 * decoder_flops(tiny_system.tokenizer.config, tiny_system.tile)
    assert all(counts[part].flops == 0 for part in ("quantize", "select", "sum codes", "the rest"))


def test_the_published_restorer_is_counted(tiny_system: VARestorer) -> None:
    source = Source(
        "tiny", {"_target_": "varestorer.systems.varestorer.VARestorer", **tiny_system.config}, None, "published"
    )
    blank = source.blank(merged=True)
    assert restoring_counts(blank)["restorer"].flops == swinir_flops(PUBLISHED_SIZES, 64)


def test_the_counter_agrees_with_the_formulas_of_varsr_and_hvar(compose: Callable[..., DictConfig]) -> None:
    # by formula, in multiply-adds: prefix encoder; both halves of the blocks and the head; refiner whose condition and
    # time are embedded once; decoder of 512 pixels
    wanted = {
        "varsr": {"prefix encoder": 0.073, "transformer": 5.45, "refiner": 0.692, "VAE decoder": 0.791},
        "hvar": {"VAE encoder": 0.433, "transformer": 1.307, "VAE decoder": 0.791},
    }
    quick = "model.tokenizer.enlarge=bilinear"  # without weights bicubic takes seconds, and neither is a product
    for name, stages in wanted.items():
        model: Any = OmegaConf.to_container(compose("train", f"system={name}", quick).model, resolve=True)
        counts = restoring_counts(Source(name, model).blank(merged=True))
        assert stages == pytest.approx({stage: counts[stage].flops / 2e12 for stage in stages}, rel=0.015)


def test_the_real_thing_counts_as_much_as_the_one_without_numbers(tiny_system: VARestorer) -> None:
    images = torch.rand(1, 3, tiny_system.tile, tiny_system.tile)
    real = count(lambda: tiny_system.restore_batch(images))
    blank = restoring_counts(without_weights(tiny_system))
    assert {part: cost.flops for part, cost in real.items()} == {part: cost.flops for part, cost in blank.items()}


def test_least_bytes_are_weights_and_what_goes_in_and_out(tiny_system: VARestorer) -> None:
    counts = restoring_counts(without_weights(tiny_system), 3)
    image, codes = 3 * 3 * tiny_system.tile**2, 3 * 8 * 4 * 4  # batch 3; 8 bits at 4x4 positions
    weights = sum(parameter.numel() for parameter in tiny_system.tokenizer.decoder.parameters())
    assert counts["VAE decoder"].bytes == 4 * (weights + codes + image)
    halved = restoring_counts(without_weights(tiny_system), 3, Acceleration.parse("bf16"))
    assert counts["transformer"].bytes / 4 < halved["transformer"].bytes < counts["transformer"].bytes / 1.5


def test_a_ledger_tells_what_was_made_from_what_was_there() -> None:
    weight, kept = torch.zeros(100), []
    with Ledger() as ledger, observed(ledger.opened):
        with watch("x"):
            passing = weight * 2  # read once, made and gone
            kept.append(passing[:10] + weight[:10])
            del passing
        with watch("y"):
            kept.append(kept[0] + 1)
    assert ledger.moved == {"x": 4 * (100 + 10), "y": 4 * (10 + 10)}
    assert ledger.live == {"x": 40, "y": 40} and sum(ledger.at_peak.values()) == 440


def test_counting_changes_nothing(tiny_system: VARestorer) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_system.state_dict().items()}
    twin = sharing(tiny_system).set_precision("bf16")
    restoring_counts(without_weights(tiny_system))
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_system.state_dict().items())
    assert twin.transformer.blocks[0].ffn.fc1.weight.dtype == torch.bfloat16


def test_the_imitation_of_cuda_leaves_torch_as_it_was() -> None:
    before = torch.autocast, torch.utils.checkpoint.checkpoint
    with as_on_cuda(), torch.autocast("meta", dtype=torch.bfloat16):
        assert (torch.empty(2, 2, device="meta") @ torch.empty(2, 2, device="meta")).dtype == torch.bfloat16
    assert (torch.autocast, torch.utils.checkpoint.checkpoint) == before
