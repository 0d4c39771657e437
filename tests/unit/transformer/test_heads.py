"""How bits are drawn: temperature, filters, and one setting for each scale."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from varestorer.systems.varestorer import VARestorer
from varestorer.tokenizer.quantizer import resize_area
from varestorer.transformer import TextFeatures
from varestorer.transformer.generation import Generation, MultiStepGenerator, SamplingOptions
from varestorer.transformer.heads import BitHead, Noise, keyed_noise
from varestorer.utils.seeds import torch_generator

HEAD = BitHead(1, 4)
NOISE = keyed_noise(3, [5, 6], "test", "cpu")


def prompts(system: VARestorer) -> TextFeatures:
    return system.text_batch(torch.randn(3, 16, generator=torch_generator(0)), 2)


def generator_of(system: VARestorer) -> MultiStepGenerator:
    return MultiStepGenerator(system.transformer, system.tokenizer.quantizer, system.schedule)


def generate(system: VARestorer, options: SamplingOptions, noise: Noise | None = NOISE, **known: Any) -> Generation:
    return generator_of(system)(prompts(system), options, noise=noise, **known)


def same(one: Generation, other: Generation) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(one.indices, other.indices, strict=True)]


def test_near_temperature_zero_a_sample_is_the_likelier_bit(tiny_system: VARestorer) -> None:
    greedy = generate(tiny_system, SamplingOptions(), noise=None)
    assert all(same(greedy, generate(tiny_system, SamplingOptions(tau=1e-6))))
    assert not any(same(greedy, generate(tiny_system, SamplingOptions(tau=1.0)))[1:])
    hot = generate(tiny_system, SamplingOptions(tau=1e6))  # a coin toss, whatever the logits
    other_logits = generate(tiny_system, SamplingOptions(tau=1e6), known=[~greedy.indices[0]])
    assert torch.equal(hot.indices[2], other_logits.indices[2])


@pytest.mark.parametrize("layers", [(0,), (-1,), (0, -2)])
def test_known_scales_do_not_move_the_settings_of_the_others(tiny_system: VARestorer, layers: tuple[int, ...]) -> None:
    options = SamplingOptions(cfg=[1.0, 4.0, 0.5], tau=[1.0, 0.2, 3.0], insertion_layers=layers)
    whole = generate(tiny_system, options)
    for count in (1, 2):
        continued = generate(tiny_system, options, known=whole.indices[:count])
        assert all(same(whole, continued))
        assert torch.allclose(continued.logits[2], whole.logits[2], atol=1e-5)


def test_each_scale_takes_its_own_guidance_and_temperature(tiny_system: VARestorer) -> None:
    """Guidance is c * conditional + (1 - c) * unconditional, then the temperature divides."""
    cfg, tau = [1.0, 4.0, -1.5], [2.0, 0.5, 1.0]
    result = generate(tiny_system, SamplingOptions(cfg=cfg, tau=tau))
    for k, bits in enumerate(result.indices):
        with_text, without = result.logits[k].chunk(2)
        logits = (cfg[k] * with_text + (1 - cfg[k]) * without) / tau[k]
        noise = NOISE(k, tuple(logits.shape))
        expected = logits - torch.log(-torch.log(noise))  # the Gumbel-max rule
        assert torch.equal(expected[..., 1] > expected[..., 0], bits.flatten(2).transpose(1, 2))


def test_guidance_compares_with_the_null_text(tiny_system: VARestorer) -> None:
    guided = generate(tiny_system, SamplingOptions(cfg=2.0), num_scales=1).logits[0]
    with_prompt = generate(tiny_system, SamplingOptions(), num_scales=1).logits[0]
    without = generator_of(tiny_system)(tiny_system.null_text(2), SamplingOptions(), num_scales=1).logits[0]
    assert torch.allclose(guided, torch.cat([with_prompt, without]), atol=1e-5)
    assert not torch.allclose(with_prompt, without, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(("layer", "block"), [(-1, 1), (-2, 0)])
def test_guidance_at_a_layer_mixes_the_output_of_that_block(tiny_system: VARestorer, layer: int, block: int) -> None:
    both = TextFeatures.from_list([*prompts(tiny_system).to_list(), *tiny_system.null_text(2).to_list()])
    layout = tiny_system.transformer.layout(tiny_system.schedule, torch.device("cpu"))[:1]

    def mixed(number: int, x_BLC: Tensor) -> Tensor:
        with_prompt, without = x_BLC.chunk(2)
        return (3 * with_prompt - 2 * without).repeat(2, 1, 1) if number == block else x_BLC

    expected = tiny_system.transformer(None, both, layout, after_block=mixed)
    options = SamplingOptions(cfg=3.0, insertion_layers=(layer,))
    assert torch.allclose(generate(tiny_system, options, num_scales=1).logits[0], expected, atol=1e-5)


def test_two_choices_are_all_of_two_and_one_is_greedy() -> None:
    logits = torch.randn(1, 500, 4, 2, generator=torch_generator(0))
    uniform = torch.rand(logits.shape, generator=torch_generator(1))
    sampled, likelier = HEAD.select(logits, uniform), logits[..., 1] > logits[..., 0]
    assert torch.equal(HEAD.select(logits, uniform, top_k=2), sampled)
    assert not torch.equal(sampled, likelier)
    assert torch.equal(HEAD.select(logits, uniform, top_k=1), likelier)


def test_a_bit_goes_when_its_probability_is_just_one_minus_top_p() -> None:
    pair = torch.tensor([[[[math.log(0.3), math.log(0.7)]]]])
    unlikely = pair.softmax(dim=-1)[0, 0, 0, 0].item()
    uniform = torch.tensor([0.99, 0.01]).expand(1, 1, 1, 2)  # would draw the unlikelier bit
    assert HEAD.select(pair, uniform, top_p=1 - unlikely).item() is True
    assert HEAD.select(pair, uniform, top_p=1 - unlikely + 1e-4).item() is False


def test_what_is_drawn_does_not_depend_on_how_many_tiles_go_together(tiny_system: VARestorer) -> None:
    image = torch.rand(3, 20, 11, generator=torch_generator(2))

    def drawn(seed: int, **options: Any) -> Tensor:
        return tiny_system.restore(image, 4, select="sample", seed=seed, **options).image

    alone = drawn(1, batch=1)
    for batch in (2, 3, 8):
        assert ((drawn(1, batch=batch) - alone).abs() > 1e-3).float().mean() < 0.01  # bits that are equally likely
    assert ((drawn(2, batch=1) - alone).abs() > 1e-3).float().mean() > 0.5


@pytest.mark.parametrize("steps", ["one", 2, "multi"])
def test_every_scale_is_drawn_with_its_own_noise(tiny_system: VARestorer, steps: str | int) -> None:
    squares = torch.rand(2, 3, 32, 32, generator=torch_generator(4))

    def other_at_the_last(number: int, shape: tuple[int, ...]) -> Tensor:
        return NOISE(number + (number == 2), shape)

    one, other = (tiny_system.restore_batch(squares, noise, steps) for noise in (NOISE, other_at_the_last))
    assert all(torch.equal(a, b) for a, b in zip(one.indices[:2], other.indices[:2], strict=True))
    assert 0.02 < (one.indices[2] != other.indices[2]).float().mean() < 0.6


def test_the_next_scales_inputs_are_resized_as_asked(tiny_system: VARestorer) -> None:
    """VARestorer's own copy of Infinity takes means of areas there."""
    seen: list[Any] = []

    def resize(total: Tensor, size: tuple[int, int]) -> Tensor:
        seen.append(size)
        return 3 * resize_area(total, size)

    usual = generator_of(tiny_system)
    results = [replace(usual, shrink=r)(prompts(tiny_system), SamplingOptions()) for r in (resize_area, resize)]
    assert seen == [(2, 2), (4, 4)]
    assert torch.equal(results[0].logits[0], results[1].logits[0])
    assert not torch.allclose(results[0].logits[1], results[1].logits[1], atol=1e-3)


def test_straight_through_bits_and_their_slope_are_of_the_same_noisy_logits() -> None:
    logits = torch.randn(1, 5, 4, 2, generator=torch_generator(0)).requires_grad_()
    uniform = torch.rand(logits.shape, generator=torch_generator(1))
    bits = HEAD.straight_through(logits, uniform, tau=0.5)
    noisy = logits.detach() - torch.log(-torch.log(uniform))
    assert torch.equal(bits.detach().round().bool(), noisy[..., 1] > noisy[..., 0])
    bits.sum().backward()
    p = (noisy / 0.5).softmax(dim=-1)[..., 1]
    assert logits.grad is not None and torch.allclose(logits.grad[..., 1], p * (1 - p) / 0.5, atol=1e-5)
