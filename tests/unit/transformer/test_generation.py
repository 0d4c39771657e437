"""Scale-by-scale generation: the cache, prepared text, stopping early, and nothing that waits for the device."""

import pytest
import torch

from varestorer.benchmark.generate import generate_without_cache, runner
from varestorer.benchmark.networks import words_of
from varestorer.systems.varestorer import VARestorer
from varestorer.transformer.generation import MultiStepGenerator, Prefix, SamplingOptions

GUIDED = SamplingOptions(cfg=3.0)


def generator_of(system: VARestorer) -> MultiStepGenerator:
    return MultiStepGenerator(system.transformer, system.tokenizer.quantizer, system.schedule)


def images(system: VARestorer, batch_size: int = 2) -> torch.Tensor:
    drawn = torch.rand(batch_size, 3, system.tile, system.tile, generator=torch.Generator().manual_seed(0))
    return drawn.to(system.device)


def prefix(system: VARestorer) -> Prefix:
    return system.prefix_of(system.condition(images(system)).pyramid)


@pytest.mark.parametrize("options", [SamplingOptions(), GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("has_prefix", [False, True])
def test_without_a_cache_the_same_bits_come_out(
    tiny_system: VARestorer, options: SamplingOptions, has_prefix: bool
) -> None:
    generator, seen = generator_of(tiny_system), prefix(tiny_system) if has_prefix else None
    text = generator.prepare(tiny_system.null_text(2), options.is_guided)
    cached, slow = generator(text, options, prefix=seen), generate_without_cache(generator, text, options, seen)
    assert all(torch.equal(a, b) for a, b in zip(cached.indices, slow.indices, strict=True))
    assert torch.equal(cached.codes, slow.codes)
    assert torch.allclose(cached.logits[2], slow.logits[2], atol=1e-5)


def test_prepared_text_gives_what_its_features_give(tiny_system: VARestorer) -> None:
    generator, text = generator_of(tiny_system), tiny_system.null_text(2)
    plain = generator(text, GUIDED)
    prepared = generator(generator.prepare(text, is_guided=True), GUIDED)
    assert all(torch.equal(plain.logits[k], prepared.logits[k]) for k in plain.logits)


def test_generation_stops_where_it_is_told(tiny_system: VARestorer) -> None:
    generator, text = generator_of(tiny_system), tiny_system.null_text(1)
    whole, part = generator(text, SamplingOptions()), generator(text, SamplingOptions(), num_scales=2)
    assert len(part.indices) == 2 and list(part.logits) == [0, 1]
    assert all(torch.equal(a, b) for a, b in zip(whole.indices, part.indices, strict=False))


@pytest.mark.parametrize("has_prefix", [False, True])
def test_generation_asks_the_device_for_no_value(tiny_system: VARestorer, has_prefix: bool) -> None:
    system = tiny_system.to("meta")  # tensors without values: to ask for one is an error
    seen = prefix(system) if has_prefix else None
    result = generator_of(system)(system.null_text(2), GUIDED, prefix=seen)
    assert result.codes.shape == (2, 8, 4, 4)
    known = [torch.zeros(2, 8, side, side, dtype=torch.bool, device="meta") for side in (1, 2)]
    assert generator_of(system)(system.null_text(2), GUIDED, known=known, prefix=seen).codes.is_meta


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["one", "multi", "multi+cfg", "multi+cfg+prefix", "multi+cfg+nocache"])
def test_graphs_give_what_eager_code_gives(tiny_system: VARestorer, name: str) -> None:
    system = tiny_system.merge_adapters().to("cuda")
    eager, graphed = (runner(system, words_of("generate", name + words), images(system)) for words in ("", "+graphs"))
    expected = eager()
    for _ in range(3):
        assert torch.equal(graphed(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "multi+cfg"])
def test_compiled_blocks_give_the_codes_of_eager_ones(tiny_system: VARestorer, name: str) -> None:
    system = tiny_system.merge_adapters()
    eager, compiled = (runner(system, words_of("generate", name + words), images(system)) for words in ("", "+compile"))
    assert (eager() != compiled()).float().mean().item() < 0.02  # bits whose two logits are equal may flip
