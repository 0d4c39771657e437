"""Positions, masks, adapters, cache, generation."""

import pytest
import torch

from varestorer.systems.varestorer import VARestorer
from varestorer.tokenizer import ScaleSchedule
from varestorer.transformer import TextFeatures, TransformerConfig, VARTransformer
from varestorer.transformer.adapters import (
    adapter_parameters,
    adapters_off,
    merge_adapters,
    plain_state_dict,
    use_adapters,
)
from varestorer.transformer.blocks import ffn_width
from varestorer.transformer.conditions import RMSNorm
from varestorer.transformer.generation import MultiStepGenerator, SamplingOptions
from varestorer.transformer.heads import BitHead, keyed_noise
from varestorer.transformer.layout import (
    PositionRule,
    block_causal_mask,
    grid_positions,
    long_layout,
    pyramid_layout,
    rotate,
)

CPU = torch.device("cpu")
ROPE = PositionRule("rope", 16)
HEAD = BitHead(1, 1)


def pixels(system: VARestorer, batch_size: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch_size, 3, system.tile, system.tile, generator=torch.Generator().manual_seed(seed))


def teacher_parts(system: VARestorer) -> tuple[torch.Tensor, TextFeatures]:
    return system.encode(pixels(system)), system.null_text(2)


# positions


def test_grid_positions_round_halves_to_even() -> None:
    rows = grid_positions((4, 4), (6, 6))[::4, 0]
    assert rows.tolist() == [0.0, 2.0, 3.0, 4.0]  # 0, 1.5, 3, 4.5
    assert grid_positions((4, 4), (6, 6), round_positions=False)[::4, 0].tolist() == [0.0, 1.5, 3.0, 4.5]


def test_rotation_keeps_lengths_and_depends_on_relative_position() -> None:
    layout = pyramid_layout(ScaleSchedule.template(3), ROPE, CPU)
    q, k = torch.randn(2, 1, 1, len(layout), 16).unbind(0)
    assert torch.allclose(rotate(q, layout.cos_LD, layout.sin_LD).norm(dim=-1), q.norm(dim=-1), atol=1e-5)
    same_q, same_k = q[:, :, :1].expand_as(q), k[:, :, :1].expand_as(k)
    turned_q = rotate(same_q, layout.cos_LD, layout.sin_LD)
    turned_k = rotate(same_k, layout.cos_LD, layout.sin_LD)
    last = turned_q[0, 0, -16:] @ turned_k[0, 0, -16:].T  # 4x4 tokens, row-major
    assert last[0, 1].item() == pytest.approx(last[5, 6].item(), abs=1e-4)
    assert last[0, 1].item() != pytest.approx(last[0, 4].item(), abs=1e-2)


def test_long_layout_reads_on_in_the_table_or_repeats_its_own_rows() -> None:
    schedule = ScaleSchedule.template(3)
    table = pyramid_layout(ScaleSchedule.template(4), ROPE, CPU)
    total, added = schedule.num_tokens, schedule.num_tokens_per_scale[-1]
    reading_on = long_layout(schedule, ROPE, CPU)
    own = long_layout(schedule, ROPE, CPU, "own")
    assert torch.equal(reading_on.cos_LD[total:], table.cos_LD[total : total + added])
    assert torch.equal(own.cos_LD[total:], table.cos_LD[total - added : total])
    assert own.levels_L[total:].tolist() == [3] * added
    with pytest.raises(ValueError, match="next_scale or own"):
        long_layout(schedule, ROPE, CPU, "nearest")


def test_long_layout_at_1m_takes_its_own_rows() -> None:
    schedule = ScaleSchedule.template("1M")
    layout = long_layout(schedule, PositionRule("rope", 8), CPU)
    assert torch.equal(layout.cos_LD[10521:], layout.cos_LD[10521 - 4096 : 10521])


# masks


def test_block_causal_mask_sees_own_and_coarser_scales() -> None:
    mask = block_causal_mask(torch.tensor([0, 1, 1, 2]))
    assert mask.int().tolist() == [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_teacher_does_not_see_finer_scales_and_student_does(tiny_system: VARestorer) -> None:
    pyramid, text = teacher_parts(tiny_system)
    tokens, layout = pyramid.inputs(), pyramid_layout(tiny_system.schedule, ROPE, CPU)
    changed = tokens.clone()
    changed[:, -1] += 1.0  # a token of the last scale
    coarse = slice(0, tiny_system.schedule.slices[-1].start)
    mask = block_causal_mask(layout.levels_L)
    with torch.no_grad():
        causal = [tiny_system.transformer(x, text, layout, mask)[:, coarse] for x in (tokens, changed)]
        full = [tiny_system.transformer(x, text, layout)[:, coarse] for x in (tokens, changed)]
    assert torch.equal(*causal)
    assert not torch.allclose(*full)


# text


def test_padding_of_prompts_changes_nothing(tiny_system: VARestorer) -> None:
    long, short = torch.randn(3, 16), torch.randn(2, 16)
    path = tiny_system.transformer.condition
    together, alone = path(TextFeatures.from_list([long, short])), path(TextFeatures.from_list([short]))
    assert torch.allclose(together.cond_BC[1], alone.cond_BC[0], atol=1e-6)
    layout = pyramid_layout(tiny_system.schedule, ROPE, CPU)
    tokens = torch.randn(2, len(layout) - 1, 8)
    both = tiny_system.transformer(tokens, together, layout)[1]
    assert torch.allclose(both, tiny_system.transformer(tokens[1:], alone, layout)[0], atol=1e-5)


def test_adapters_sit_on_attention_only(tiny_system: VARestorer) -> None:
    layers = {name.split(".lora_")[0] for name in adapter_parameters(tiny_system.transformer)}
    per_block = ["cross_attention.kv", "cross_attention.proj", "cross_attention.q"]
    per_block += ["self_attention.proj", "self_attention.qkv"]
    assert layers == {f"blocks.{k}.{layer}" for k in range(2) for layer in per_block}


def test_published_counts() -> None:
    with torch.device("meta"):
        system = VARestorer({"size": "0.25M"}, {}, {}, {"lora_rank": 32})
    adapters = adapter_parameters(system.transformer)
    total = sum(p.numel() for p in system.transformer.parameters())
    assert (len(adapters), sum(p.numel() for p in adapters.values())) == (320, 27_262_976)
    assert total - 27_262_976 == 2_204_564_032


def student_with(system: VARestorer, cross_value_bias: bool) -> VARestorer:
    config = system.config | {"student": {"lora_rank": 4, "cross_value_bias": cross_value_bias}}
    other = VARestorer(**{k: v for k, v in config.items() if k != "restorer"}).eval()
    state = {name: t for name, t in system.state_dict().items() if "lora_B" not in name}
    other.load_state_dict(state | {n: torch.zeros_like(t) for n, t in other.state_dict().items() if "lora_B" in n})
    return other


@pytest.mark.parametrize("cross_value_bias", [True, False])
def test_fresh_adapters_equal_the_base_where_the_value_bias_stays(
    tiny_system: VARestorer, cross_value_bias: bool
) -> None:
    system = student_with(tiny_system, cross_value_bias)
    pyramid, text = teacher_parts(system)
    layout = pyramid_layout(system.schedule, ROPE, CPU)
    with torch.no_grad():
        student = system.transformer(pyramid.inputs(), text, layout)
        with adapters_off(system.transformer):
            base = system.transformer(pyramid.inputs(), text, layout)
    assert torch.equal(student, base) is cross_value_bias


def test_switching_adapters_off_and_on_gives_the_student_back(tiny_system: VARestorer) -> None:
    condition, text = tiny_system.condition(pixels(tiny_system)), tiny_system.null_text(2)
    with torch.no_grad():
        before = tiny_system.student_logits(condition, text)
        with adapters_off(tiny_system.transformer):
            teacher = tiny_system.student_logits(condition, text)
        after = tiny_system.student_logits(condition, text)
    assert torch.equal(before, after)
    assert not torch.allclose(before, teacher, atol=1e-3)


def test_merged_equals_unmerged_and_holds_no_adapters(tiny_system: VARestorer) -> None:
    condition, text = tiny_system.condition(pixels(tiny_system)), tiny_system.null_text(2)
    with torch.no_grad():
        unmerged = tiny_system.student_logits(condition, text)
        merge_adapters(tiny_system.transformer)
        merged = tiny_system.student_logits(condition, text)
    assert torch.allclose(unmerged, merged, atol=1e-5)
    assert not adapter_parameters(tiny_system.transformer)
    assert not any("base_layer" in name for name in tiny_system.state_dict())


def test_plain_names_are_those_without_adapters(tiny_system: VARestorer) -> None:
    config = tiny_system.config | {"student": {"lora_rank": 0}}
    bare = VARestorer(**{k: v for k, v in config.items() if k != "restorer"})
    plain = plain_state_dict(tiny_system.transformer)
    assert {name for name in plain if ".lora_" not in name} == set(bare.transformer.state_dict())


# cache and generation


def test_cached_generation_equals_the_teacher_forced_pass(tiny_system: VARestorer) -> None:
    system, text = tiny_system, tiny_system.null_text(2)
    use_adapters(system.transformer, False)
    generate = MultiStepGenerator(system.transformer, system.tokenizer.quantizer, system.schedule)
    result = generate(text, SamplingOptions())
    total = torch.zeros(2, 8, 4, 4)
    inputs = []
    for bits, scale in zip(result.indices[:-1], system.schedule.scales[1:], strict=True):
        total = total + system.tokenizer.quantizer.indices_to_codes([bits], system.schedule)
        resized = torch.nn.functional.interpolate(total, size=scale, mode="bilinear", align_corners=False)
        inputs.append((total if scale == (4, 4) else resized).flatten(2).transpose(1, 2))
    layout = pyramid_layout(system.schedule, ROPE, CPU)
    with torch.no_grad():
        forced = system.transformer(torch.cat(inputs, dim=1), text, layout, block_causal_mask(layout.levels_L))
    cached = torch.cat(list(result.logits.values()), dim=1)
    assert torch.allclose(cached, forced, atol=1e-5)


def test_known_scales_are_kept_and_the_rest_follows_from_them(tiny_system: VARestorer) -> None:
    system, text = tiny_system, tiny_system.null_text(2)
    use_adapters(system.transformer, False)
    generate = MultiStepGenerator(system.transformer, system.tokenizer.quantizer, system.schedule)
    alone = generate(text, SamplingOptions())
    continued = generate(text, SamplingOptions(), known=alone.indices[:2])
    assert all(torch.equal(a, b) for a, b in zip(alone.indices, continued.indices, strict=True))
    assert list(continued.logits) == [2]
    other = generate(text, SamplingOptions(), known=[~bits for bits in alone.indices[:2]])
    assert torch.equal(other.indices[0], ~alone.indices[0])
    assert not torch.equal(other.logits[2], alone.logits[2])


def test_guidance_needs_one_setting_per_scale() -> None:
    with pytest.raises(ValueError, match="one entry per scale"):
        SamplingOptions(cfg=[1.0, 2.0]).per_scale(3)


def test_checkpointed_activations_change_no_gradient(tiny_system: VARestorer) -> None:
    condition, text = tiny_system.condition(pixels(tiny_system)), tiny_system.null_text(2)
    gradients = []
    for checkpointed in (False, True):
        tiny_system.transformer.checkpoint_activations = checkpointed
        tiny_system.zero_grad()
        tiny_system.student_logits(condition, text).square().mean().backward()
        gradients.append([p.grad.clone() for p in adapter_parameters(tiny_system.transformer).values()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))
    assert any(g.abs().max() > 0 for g in gradients[0])


def test_logits_are_float32_under_autocast(tiny_system: VARestorer) -> None:
    condition, text = tiny_system.condition(pixels(tiny_system)), tiny_system.null_text(2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = tiny_system.student_logits(condition, text)
        pyramid = tiny_system.encode(pixels(tiny_system))
    assert logits.dtype == torch.float32
    assert pyramid.codes.dtype == torch.float32


# sampling


def test_sampling_draws_bits_with_their_probability() -> None:
    logits = torch.tensor([0.0, 1.5]).expand(1, 20000, 1, 2)
    uniform = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0))
    share = HEAD.select(logits, uniform).float().mean().item()
    assert share == pytest.approx(torch.tensor(1.5).sigmoid().item(), abs=0.01)
    assert HEAD.select(logits, uniform, top_k=1).all()
    assert HEAD.select(logits, uniform, top_p=0.8).all()


def test_nucleus_never_drops_the_likelier_bit() -> None:
    even, skewed = torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.0, 4.0]]]])
    to_zero, to_one = torch.tensor([0.9, 0.1]).expand(1, 1, 1, 2), torch.tensor([0.1, 0.9]).expand(1, 1, 1, 2)
    assert not HEAD.select(even, to_zero, top_p=0.1)  # both bits are as likely: both stay
    assert HEAD.select(even, to_one, top_p=0.1)
    unlikely = torch.tensor([0.999999, 0.000001]).expand(1, 1, 1, 2)  # would draw the bit of probability 0.018
    assert not HEAD.select(skewed, unlikely)
    assert HEAD.select(skewed, unlikely, top_p=0.97)


def test_noise_of_a_sample_does_not_depend_on_its_neighbors() -> None:
    together = keyed_noise(0, [3, 7], "x", "cpu")(1, (2, 4, 8, 2))
    alone = keyed_noise(0, [7], "x", "cpu")(1, (1, 4, 8, 2))
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(keyed_noise(0, [7], "x", "cpu")(2, (1, 4, 8, 2)), alone)


def test_straight_through_bits_are_hard_with_the_soft_gradient() -> None:
    logits = torch.tensor([[[[0.2, 0.9], [1.0, -1.0]]]], requires_grad=True)
    bits = HEAD.straight_through(logits, None, tau=0.5)
    assert bits.detach().flatten().tolist() == pytest.approx([1.0, 0.0])
    bits.sum().backward()
    p = torch.softmax(logits.detach() / 0.5, dim=-1)[..., 1]
    slope = p * (1 - p) / 0.5
    assert logits.grad is not None
    assert torch.allclose(logits.grad[..., 1], slope, atol=1e-6)
    assert torch.allclose(logits.grad[..., 0], -slope, atol=1e-6)


def test_entropy_is_zero_where_decided_and_one_where_even() -> None:
    logits = torch.tensor([[[[0.0, 60.0]], [[0.0, 0.0]]]])
    assert HEAD.entropy(logits)[0].tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


@pytest.mark.parametrize(("width", "hidden"), [(2048, 8192), (768, 3072), (96, 512), (64, 256), (32, 256)])
def test_feed_forward_is_four_times_as_wide_in_steps_of_256(width: int, hidden: int) -> None:
    assert ffn_width(width) == hidden


def test_head_sizes_that_cannot_turn_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        VARTransformer(TransformerConfig(width=30, num_heads=5))


@torch.no_grad()
def test_the_learned_scale_of_attention_stops_at_100(tiny_system: VARestorer) -> None:
    condition, text = tiny_system.condition(pixels(tiny_system)), tiny_system.null_text(2)
    logits = []
    for scale in (50.0, 100.0, 1000.0):
        for name, parameter in tiny_system.transformer.named_parameters():
            if name.endswith("self_attention.log_scale"):
                parameter.fill_(scale).log_()
        logits.append(tiny_system.student_logits(condition, text))
    assert torch.allclose(logits[1], logits[2], atol=1e-5) and not torch.allclose(logits[0], logits[1], atol=1e-3)


def test_text_is_normalized_however_weak_it_is() -> None:
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    expected = x / x.square().mean(dim=-1, keepdim=True).sqrt()
    for strength in (0.02, 1.0, 50.0):
        assert torch.allclose(RMSNorm(64)(strength * x), expected, atol=5e-3)
