"""What makes the transformer fast changes none of its numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from varestorer.systems.varestorer import VARestorer
from varestorer.tokenizer.quantizer import to_map
from varestorer.transformer import TextFeatures, blocks
from varestorer.transformer import layout as layouts
from varestorer.transformer.adapters import adapters_off, merge_adapters, use_adapters
from varestorer.transformer.blocks import LayerCache, attend
from varestorer.transformer.layout import (
    BlockCausal,
    PositionRule,
    TokenLayout,
    block_causal_mask,
    long_layout,
    pyramid_layout,
    rotate,
    rotate_complex,
)

CPU = torch.device("cpu")
ROPE = PositionRule("rope", 16)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layout_of(system: VARestorer) -> TokenLayout:
    return pyramid_layout(system.schedule, ROPE, CPU)


def padded(system: VARestorer) -> TextFeatures:
    return TextFeatures.from_list([drawn(3, 16, seed=1), drawn(2, 16, seed=2)])


def null(system: VARestorer) -> TextFeatures:
    return system.null_text(2)


# text computed once


@torch.no_grad()
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("text_of", [padded, null])
def test_prepared_text_gives_the_same_logits(
    tiny_system: VARestorer, text_of: Callable[[VARestorer], TextFeatures], merged: bool
) -> None:
    transformer, layout, text = tiny_system.transformer, layout_of(tiny_system), text_of(tiny_system)
    if merged:
        merge_adapters(transformer)
    tokens = drawn(2, len(layout) - 1, 8)
    expected = transformer(tokens, text, layout)
    assert torch.equal(transformer(tokens, transformer.prepare(text), layout), expected)
    assert torch.equal(transformer(tokens, transformer.prepare(transformer.context(text)), layout), expected)


@torch.no_grad()
def test_text_prepared_for_one_prompt_serves_any_batch(tiny_system: VARestorer) -> None:
    transformer, layout = tiny_system.transformer, layout_of(tiny_system)
    prepared, tokens = transformer.prepare(tiny_system.null_text(1)), drawn(3, len(layout) - 1, 8)
    expected = transformer(tokens, tiny_system.null_text(3), layout)
    assert torch.allclose(transformer(tokens, prepared, layout), expected, atol=1e-6)


@torch.no_grad()
def test_prepared_text_keeps_the_precision_of_the_blocks(tiny_system: VARestorer) -> None:
    tiny_system.set_precision("bf16")
    transformer, layout, text = tiny_system.transformer, layout_of(tiny_system), padded(tiny_system)
    prepared, tokens = transformer.prepare(text), drawn(2, len(layout) - 1, 8)
    assert prepared.blocks[0].memory.keys_BNTD.dtype == torch.bfloat16
    assert prepared.blocks[0].gains_B1C[0].dtype == torch.float32
    assert torch.equal(transformer(tokens, prepared, layout), transformer(tokens, text, layout))


@torch.no_grad()
@pytest.mark.parametrize("change", ["adapters", "precision"])
def test_text_prepared_before_a_change_is_refused(tiny_system: VARestorer, change: str) -> None:
    transformer, layout = tiny_system.transformer, layout_of(tiny_system)
    prepared, tokens = transformer.prepare(tiny_system.null_text(2)), drawn(2, len(layout) - 1, 8)
    if change == "adapters":
        use_adapters(transformer, False)
    else:
        tiny_system.set_precision("bf16")
    with pytest.raises(ValueError, match="prepare"):
        transformer(tokens, prepared, layout)


@torch.no_grad()
def test_teacher_and_student_prepare_other_texts(tiny_system: VARestorer) -> None:
    student = tiny_system.transformer.prepare(tiny_system.null_text(1))
    with adapters_off(tiny_system.transformer):
        teacher = tiny_system.transformer.prepare(tiny_system.null_text(1))
    assert not torch.allclose(student.blocks[0].memory.values_BNTD, teacher.blocks[0].memory.values_BNTD)


def test_one_null_text_for_all_has_the_gradients_of_its_copies(tiny_system: VARestorer) -> None:
    transformer, layout = tiny_system.transformer, layout_of(tiny_system)
    tokens, gradients = drawn(2, len(layout) - 1, 8), []
    for text in (tiny_system.null_text(2), TextFeatures.from_list(tiny_system.null_text(2).to_list())):
        context = transformer.context(text)
        assert len(context.memory_BTC) == (1 if text.features_BTE.stride(0) == 0 else 2)
        transformer.zero_grad()
        transformer(tokens, context, layout).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-6), name


# positions


def test_the_complex_rotation_is_the_real_one(tiny_system: VARestorer) -> None:
    layout = layout_of(tiny_system)
    x = drawn(2, len(layout), 3, 16)
    by_heads = rotate(x.transpose(1, 2), layout.cos_LD, layout.sin_LD).transpose(1, 2)
    assert torch.allclose(layout.rotate(x), by_heads, rtol=0, atol=1e-6)
    assert torch.equal(rotate_complex(x, layout.turns_LD[:, None]), layout.rotate(x))


def test_layouts_know_how_many_tokens_each_level_has(tiny_system: VARestorer) -> None:
    layout = long_layout(tiny_system.schedule, ROPE, CPU)
    assert layout.counts == (1, 4, 16, 16)
    assert layout[1:].counts == (4, 16, 16)
    assert layout[3:8].counts == (2, 3)
    prefixed = pyramid_layout(tiny_system.schedule, ROPE, CPU, prefix=(4, 4))
    assert prefixed.counts == (16, 1, 4, 16)
    shared = pyramid_layout(tiny_system.schedule, PositionRule("rope_grid", 16), CPU, prefix=(4, 4))
    assert shared.counts == (17, 4, 16)  # the start token is of the prefix's level


# masks


@pytest.mark.parametrize("together", [1, 5, 512])
@pytest.mark.parametrize("num_before", [0, 3])
@pytest.mark.parametrize("num_queries", [21, 12, 3])
def test_attention_scale_by_scale_equals_the_masked_one(
    tiny_system: VARestorer, monkeypatch: pytest.MonkeyPatch, together: int, num_before: int, num_queries: int
) -> None:
    monkeypatch.setattr(layouts, "TOGETHER", together)
    layout = layout_of(tiny_system)
    q, k, v = (drawn(2, 2, num_before + len(layout), 8, seed=n).requires_grad_() for n in range(3))
    dense = torch.nn.functional.pad(block_causal_mask(layout.levels_L), (num_before, 0), value=True)
    weights, results = drawn(2, num_queries, 16, seed=3), []
    for mask in (dense, BlockCausal.of(layout)):
        out = attend(q[:, :, num_before:], k, v, mask, scale=1.0, asked=slice(num_queries))
        results.append([out, *torch.autograd.grad((out * weights).sum(), (q, k, v))])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))


@torch.no_grad()
def test_the_scale_causal_teacher_may_read_through_a_cache(
    tiny_system: VARestorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "TOGETHER", 1)
    transformer, layout, text = tiny_system.transformer, layout_of(tiny_system), tiny_system.null_text(2)
    tokens = drawn(2, len(layout) - 1, 8)
    whole = transformer(tokens, text, layout, block_causal_mask(layout.levels_L))
    cache = [LayerCache(len(layout)) for _ in transformer.blocks]
    first, rest = layout[:1], layout[1:]
    parts = [transformer(None, text, first, None, cache)]
    parts.append(transformer(tokens, text, rest, BlockCausal.of(rest), cache))
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "dense", "causal"])
def test_tokens_that_nobody_asks_for_are_seen_all_the_same(tiny_system: VARestorer, kind: str) -> None:
    transformer, layout = tiny_system.transformer, long_layout(tiny_system.schedule, ROPE, CPU)
    mask = {"none": None, "dense": block_causal_mask(layout.levels_L), "causal": BlockCausal.of(layout)}[kind]
    tokens, text = drawn(2, len(layout) - 1, 8), padded(tiny_system)
    asked = transformer(tokens, text, layout, mask, asked=slice(0, 21))
    assert torch.allclose(asked, transformer(tokens, text, layout, mask)[:, :21], atol=1e-5)
    changed = tokens.clone()
    changed[:, -1] += 1
    assert torch.equal(transformer(changed, text, layout, mask, asked=slice(0, 21)), asked) is (kind != "none")


# compilers and devices


@torch.no_grad()
@pytest.mark.parametrize(("kind", "precision", "tolerance"), [("prepared", "fp32", 1e-5), ("causal", "bf16", 0.05)])
def test_the_network_is_one_graph(tiny_system: VARestorer, kind: str, precision: str, tolerance: float) -> None:
    """A graph break is an error under `fullgraph`."""
    torch._dynamo.reset()
    merge_adapters(tiny_system.transformer)
    tiny_system.set_precision(precision)
    transformer, layout = tiny_system.transformer, long_layout(tiny_system.schedule, ROPE, CPU)
    text = transformer.prepare(tiny_system.null_text(1)) if kind == "prepared" else tiny_system.null_text(2)
    mask = BlockCausal.of(layout) if kind == "causal" else None
    tokens = drawn(2, len(layout) - 1, 8)
    compiled = torch.compile(transformer, backend="eager", fullgraph=True, dynamic=False)
    expected = transformer(tokens, text, layout, mask, asked=slice(0, 21))
    assert torch.allclose(compiled(tokens, text, layout, mask, asked=slice(0, 21)), expected, atol=tolerance)


@pytest.mark.gpu
@torch.no_grad()
def test_the_host_does_not_wait_for_the_device(tiny_system: VARestorer) -> None:
    device = torch.device("cuda")
    merge_adapters(tiny_system.transformer)
    transformer = tiny_system.to(device).set_precision("bf16").transformer
    layout = long_layout(tiny_system.schedule, ROPE, device)
    tokens, uniform = drawn(2, len(layout) - 1, 8).to(device), torch.rand(2, 16, 8, 2, device=device)
    texts = (padded(tiny_system).features_BTE.to(device), (3, 2))
    prepared = transformer.prepare(tiny_system.null_text(1))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        transformer(tokens, TextFeatures(*texts), layout, BlockCausal.of(layout))
        logits = transformer(tokens, prepared, layout, asked=slice(0, 21))[:, 5:]
        maps = [to_map(transformer.head.select(logits, noise, top_p=0.9), (4, 4)) for noise in (None, uniform)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [tuple(bits.shape) for bits in maps] == [(2, 8, 4, 4)] * 2


@pytest.mark.parametrize("kind", ["all", "some", "broadcast"])
def test_attention_by_products_is_the_fused_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = {"all": None, "some": block_causal_mask(torch.tensor([0, 1, 1, 2, 2])), "broadcast": drawn(2, 1, 1, 5) > -1}[
        kind
    ]
    found = []
    monkeypatch.setattr(blocks, "QUERIES_AT_ONCE", 2)
    for by_products in (False, True):
        monkeypatch.setattr(blocks, "prefers_products", lambda q, k, chosen=by_products: chosen)
        q, k, v = (drawn(2, 3, 5, 8, seed=seed).requires_grad_() for seed in range(3))
        out = attend(q, k, v, mask, scale=0.7)
        gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
        found.append([out, *gradients])
    for fused, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, fused, rtol=1e-4, atol=1e-5)


def test_products_are_for_bfloat16_and_train_on_short_sequences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half, long = torch.zeros(1, 1, 5, 4, dtype=torch.bfloat16), torch.zeros(1, 1, 1025, 4, dtype=torch.bfloat16)
    for faster in (False, True):
        monkeypatch.setattr(blocks, "PRODUCTS_ARE_FASTER", faster)
        assert blocks.prefers_products(half, long) is faster
        assert not blocks.prefers_products(half.float(), half.float())
        assert not blocks.prefers_products(half.to("meta"), half.to("meta"))
        assert not blocks.prefers_products(long, long)
        with torch.no_grad():
            assert blocks.prefers_products(long, long) is faster


def test_attention_by_products_in_bfloat16_is_near_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (drawn(2, 3, 60, 32, seed=seed) for seed in range(3))
    exact = attend(q, k, v, None, scale=0.3)
    monkeypatch.setattr(blocks, "prefers_products", lambda q, k: True)
    ours = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), None, scale=0.3)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).abs().max() < 0.05 * exact.abs().max()
