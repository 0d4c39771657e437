"""Multi-step restoring from a prefix: who sees whom, and that generation is the trained network step by step."""

import pytest
import torch

from varestorer.systems.varestorer import VARestorer
from varestorer.training.tasks.teacher import PrefixTask
from varestorer.transformer.layout import prefix_causal_mask
from varestorer.utils.errors import UserError


@pytest.fixture
def prefixed(tiny_system: VARestorer) -> VARestorer:
    config = tiny_system.config
    config["student"] |= {"conditioning": "prefix", "guidance": 2.0}
    system = VARestorer(**config).eval()
    system.load_state_dict(tiny_system.state_dict())
    return system


def photo(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_the_mask_by_hand() -> None:
    levels = torch.tensor([0, 1, 1, 2, 2])
    is_prefix = torch.tensor([False, False, False, True, True])
    mask = prefix_causal_mask(levels, is_prefix)
    assert mask.int().tolist() == [
        [1, 0, 0, 1, 1],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
        [0, 0, 0, 1, 1],
        [0, 0, 0, 1, 1],
    ]
    both = prefix_causal_mask(levels, is_prefix, torch.tensor([False, True]))
    assert both.shape == (2, 1, 5, 5)
    assert torch.equal(both[0, 0], mask)
    assert both[1, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1],
        [0, 0, 0, 1, 1],
    ]


@torch.no_grad()
def test_generation_equals_the_trained_network_given_its_own_bits(prefixed: VARestorer) -> None:
    """What the cache gives scale by scale is what one pass over the finished pyramid gives."""
    lq = prefixed.encode(photo(0))
    text = prefixed.null_text(2)
    generation = prefixed._generate_from_prefix(lq, text, None)
    pyramid = _pyramid_of(prefixed, generation.indices)
    given = prefixed.prefix_logits(pyramid, lq, text)
    without = prefixed.prefix_logits(pyramid, lq, text, torch.tensor([True, True]))
    generated = torch.cat([generation.logits[k] for k in range(3)], dim=1)
    assert torch.allclose(generated[:2], given, atol=1e-4)
    assert torch.allclose(generated[2:], without, atol=1e-4)
    assert not torch.allclose(given, without, atol=1e-2)
    mixed = 2 * given - without
    bits = torch.cat([bits.flatten(2).transpose(1, 2) for bits in generation.indices], dim=1)
    decided = (mixed[..., 1] - mixed[..., 0]).abs() > 1e-3
    assert torch.equal((mixed[..., 1] > mixed[..., 0])[decided], bits[decided])


def _pyramid_of(system: VARestorer, bits: list[torch.Tensor]):  # noqa: ANN202
    from varestorer.tokenizer import TokenPyramid
    from varestorer.tokenizer.quantizer import resize_bilinear

    sums = [torch.zeros(2, 8, 4, 4)]
    for one in bits:
        codes = system.tokenizer.quantizer.codebook.codes(one)
        sums.append(sums[-1] + resize_bilinear(codes, system.schedule.latent_size))
    return TokenPyramid(tuple(bits), tuple(bits), tuple(sums[:-1]), tuple(sums[1:]), sums[-1])


@torch.no_grad()
def test_a_sample_without_its_prefix_does_not_depend_on_the_degraded_image(prefixed: VARestorer) -> None:
    pyramid, text = prefixed.encode(photo(1)), prefixed.null_text(2)
    dropped = torch.tensor([False, True])
    one = prefixed.prefix_logits(pyramid, prefixed.encode(photo(2)), text, dropped)
    two = prefixed.prefix_logits(pyramid, prefixed.encode(photo(3)), text, dropped)
    assert torch.equal(one[1], two[1])
    assert not torch.allclose(one[0], two[0], atol=1e-3)


def test_the_stage_trains_adapters_and_restores(prefixed: VARestorer, tiny_system: VARestorer) -> None:
    task = PrefixTask(prefixed, prefix_drop=0.5)
    batch = {"hq": photo(4), "lq": photo(5), "name": ["a", "b"], "key": torch.tensor([3, 4])}
    losses = task(batch, 1)
    losses["loss"].backward()
    assert {name for name, p in task.named_parameters() if p.grad is not None} == {
        f"system.{name}" for name in task.trainable_parameters()
    }
    assert all(".lora_" in name for name in task.trainable_parameters())
    assert task.restored(batch)["multi-step"].shape == (2, 3, 32, 32)
    assert prefixed.restore(photo(6)[0], 2).image.shape == (3, 64, 64)
    with pytest.raises(UserError, match="conditioning=prefix"):
        PrefixTask(tiny_system)
    with pytest.raises(UserError, match="uncertainty is the one-step student's"):
        prefixed.restore(photo(6)[0], 2, uncertainty=True)


@torch.no_grad()
def test_guidance_compares_with_the_same_prompt_without_the_prefix(prefixed: VARestorer) -> None:
    lq = prefixed.encode(photo(0))
    text = prefixed.text_batch(torch.randn(3, 16, generator=torch.Generator().manual_seed(7)), 2)
    generation = prefixed._generate_from_prefix(lq, text, None)
    pyramid, dropped = _pyramid_of(prefixed, generation.indices), torch.tensor([True, True])
    generated = torch.cat([generation.logits[k] for k in range(3)], dim=1)
    assert torch.allclose(generated[:2], prefixed.prefix_logits(pyramid, lq, text), atol=1e-4)
    assert torch.allclose(generated[2:], prefixed.prefix_logits(pyramid, lq, text, dropped), atol=1e-4)
    no_prompt = prefixed.prefix_logits(pyramid, lq, prefixed.null_text(2), dropped)
    assert not torch.allclose(generated[2:], no_prompt, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_one_hides_every_prefix_and_of_zero_none(prefixed: VARestorer, share: float) -> None:
    batch = {"hq": photo(4), "lq": photo(5), "name": ["a", "b"], "key": torch.tensor([3, 4])}
    loss = PrefixTask(prefixed, prefix_drop=share, flip_strength=0.0, reweight_by_scale=False)(batch, 1)["loss"]
    pyramid, dropped = prefixed.encode(batch["hq"]), torch.tensor([share == 1, share == 1])
    logits = prefixed.prefix_logits(pyramid, prefixed.encode(batch["lq"]), prefixed.null_text(2), dropped)
    assert loss.item() == pytest.approx(
        prefixed.transformer.head.cross_entropy(logits, pyramid.labels()).mean().item(), rel=1e-5
    )
