"""H-VAR: nested tokens, three sizes from one pass, the start from VAR, its losses."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from published_files import to_published_varsr
from tiny_sizes import HVAR_SIZES

from varestorer.losses.tokens import log_likelihood, preference_loss
from varestorer.systems.hvar import HVAR, VAR_SIDES, enlarged_grid, start_from_var
from varestorer.tokenizer.quantizer import resize_area
from varestorer.training.tasks.hvar import HVARTask, HVARTokenizerTask
from varestorer.transformer import TransformerConfig, VARTransformer
from varestorer.transformer.heads import BitHead, CodeHead
from varestorer.utils.errors import UserError
from varestorer.utils.seeds import torch_generator
from varestorer.utils.tiling import restore_tiled, restore_to_sizes

READINGS = ("tokens", "sum", "none")


def tiny(reuse: str = "tokens") -> HVAR:
    """Random weights whose codes and heads are not idle, so that differences show."""
    system = HVAR(**{**HVAR_SIZES, "tokenizer": HVAR_SIZES["tokenizer"] | {"reuse": reuse}})
    generator = torch_generator(0, "test")
    with torch.no_grad():
        system.tokenizer.quantizer.codebook.entries.normal_(std=0.3, generator=generator)
        for name, parameter in system.transformer.named_parameters():
            if name.endswith(("bias", "head.weight")):
                parameter.normal_(std=0.3, generator=generator)
    return system.eval()


def squares(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def batch() -> dict[str, Any]:
    return {"hq": squares(), "lq": squares(seed=1), "name": ["a", "b"], "key": torch.tensor([5, 6])}


@pytest.mark.parametrize("reuse", ["tokens", "sum"])
@torch.no_grad()
def test_the_first_groups_are_the_tokens_of_the_smaller_image(reuse: str) -> None:
    system = tiny(reuse)
    smaller = replace(system.schedule, scales=system.schedule.scales[:4], position_scales=(), targets=((2, 2), (4, 4)))
    system.tokenizer.quantizer.phi = None  # which convolution a scale takes depends on how many there are
    whole = system.encode(squares()).indices
    nested = system.tokenizer.encode(resize_area(squares(), (16, 16)) * 2 - 1, smaller).indices
    assert all(torch.equal(a, b) for a, b in zip(whole[:4], nested, strict=True))


@pytest.mark.parametrize("reuse", READINGS)
@torch.no_grad()
def test_each_prefix_of_groups_decodes_to_an_image_of_its_size(reuse: str) -> None:
    system = tiny(reuse)
    pyramid = system.encode(squares())
    images = system.decode_sides([*pyramid.indices], system.sides)
    assert [image.shape[-1] for image in images] == [8, 16, 32] == list(system.sides)
    for count, image in ((2, images[0]), (4, images[1])):
        alone = system.decode_sides([*pyramid.indices[:count]], system.sides)[-1]
        assert torch.equal(alone, image)
    torch.testing.assert_close(images[-1], system.decode(pyramid.codes))


@pytest.mark.parametrize("reuse", READINGS)
@torch.no_grad()
def test_teacher_forcing_gives_the_logits_of_the_generation(reuse: str) -> None:
    system = tiny(reuse)
    generation = system.generate(squares())
    total, inputs = system.tokenizer.quantizer.running_sum(system.schedule), []
    for indices in generation.indices[:-1]:
        total.add(indices)
        inputs.append(total.next_input())
    forced = system.logits(torch.cat(inputs, dim=1), system.prefix_of(squares()))
    torch.testing.assert_close(forced, torch.cat([*generation.logits.values()], dim=1), atol=1e-4, rtol=0)


def test_one_pass_gives_all_sizes_and_decodes_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    system, image = tiny(), torch.rand(3, 13, 21)
    decoded: list[int] = []
    decode = system.tokenizer.decode
    monkeypatch.setattr(system.tokenizer, "decode", lambda codes: decoded.append(codes.shape[-1]) or decode(codes))
    whole = system.restore(image, 4, sizes=[4, 1, 2], batch=100)
    assert whole.image.shape == (3, 52, 84)
    assert {size: tuple(x.shape) for size, x in whole.smaller.items()} == {1: (3, 13, 21), 2: (3, 26, 42)}
    assert decoded == [2, 4, 8]
    decoded.clear()
    assert torch.equal(system.restore(image, 4, sizes=[2], batch=100).image, whole.smaller[2])
    assert decoded == [4]
    assert torch.equal(system.restore(image, 4).image, whole.image)
    with pytest.raises(UserError, match="sizes must be of 1, 2, 4 for this model at scale=4, got 3"):
        system.restore(image, 4, sizes=[3])


def test_odd_scales_and_sampling_and_uncertainty() -> None:
    system, image = tiny(), torch.rand(3, 13, 9)
    result = system.restore(image, 3, sizes=[0.75, 1.5, 3], uncertainty=True, select="sample", seed=3)
    assert [tuple(x.shape[1:]) for x in result.smaller.values()] == [(10, 7), (20, 14)]
    assert result.uncertainty_KHW.shape == (6, 39, 27)
    assert torch.equal(result.image, system.restore(image, 3, trained_scale=3, select="sample", seed=3).image)
    assert not torch.equal(result.image, system.restore(image, 3, select="sample", seed=4).image)
    for wrong in ({"prompt": "a dog"}, {"steps": 3}, {"uncertainty": True, "sizes": [0.75]}):
        with pytest.raises(UserError):
            system.restore(image, 3, **wrong)


def test_an_image_survives_being_cut_up_at_every_size() -> None:
    image = torch.rand(3, 61, 83)
    sides = (8, 16, 32)

    def run(tiles: torch.Tensor, numbers: list[int]) -> list[torch.Tensor]:
        return [resize_area(tiles, (side, side)) for side in sides]

    sizes = [(15, 21), (30, 42), (61, 83)]
    results = restore_to_sizes(image, (61, 83), 32, 8, 3, run, list(zip(sizes, sides, strict=True)), step=4)
    assert [tuple(x.shape[1:]) for x in results] == sizes
    torch.testing.assert_close(results[2], image)
    for result, factor in ((results[0], 4), (results[1], 2)):
        cells = torch.nn.functional.avg_pool2d(image[None, :, :60, :80], factor)[0]
        torch.testing.assert_close(result[:, : cells.shape[1], : cells.shape[2]], cells)
    alone = restore_tiled(image, (61, 83), 32, 8, 3, lambda tiles, _: tiles)
    torch.testing.assert_close(alone, image)


def test_the_published_sizes_have_the_published_number_of_parameters() -> None:
    sizes: dict[str, Any] = {"width": 1024, "depth": 16, "num_heads": 16, "vocabulary": 4096, "hidden_width": 4096}
    rows = sum(side**2 for side in VAR_SIDES)
    own = {"num_classes": 1001, "num_levels": 10, "positions": "rows", "position_size": rows}
    with torch.device("meta"):
        var = VARTransformer(TransformerConfig(**sizes, **own))
    assert sum(p.numel() for p in var.parameters()) == 310_283_520


def published_var() -> dict[str, torch.Tensor]:
    sizes: dict[str, Any] = {"width": 32, "depth": 2, "num_heads": 2, "latent_width": 8, "vocabulary": 32}
    own = {"num_classes": 5, "num_levels": 10, "positions": "rows", "position_size": 680, "hidden_width": 128}
    var = VARTransformer(TransformerConfig(**sizes, **own))
    generator = torch_generator(1, "var")
    with torch.no_grad():
        for parameter in var.parameters():
            parameter.normal_(generator=generator)
    return to_published_varsr(var.state_dict(), VAR_SIDES)


def test_the_start_from_var(tmp_path: Path) -> None:
    var = published_var()
    torch.save(var, tmp_path / "var.pth")
    system = HVAR(**HVAR_SIZES, weights={"transformer": str(tmp_path / "var.pth")})
    ours = system.transformer
    assert torch.equal(ours.head.weight, var["head.weight"])
    assert torch.equal(ours.condition.embedding.weight, var["class_emb.weight"][4:])
    assert torch.equal(ours.prefix_embed.weight, var["word_embed.weight"])
    assert torch.equal(ours.positions.table, enlarged_grid(var["pos_1LC"][:, 424:], 8))
    assert torch.equal(ours.level_embed.weight, var["lvl_embed.weight"][:6])
    longer = replace(ours.config, num_levels=11)
    with torch.device("meta"):
        eleven = VARTransformer(longer)
    levels = start_from_var(eleven, var, "var.pth")["level_embed.weight"]
    assert torch.equal(levels[10], var["lvl_embed.weight"][9]) and len(levels) == 11
    with pytest.raises(UserError, match="is no VAR"):
        start_from_var(ours, {"head.weight": torch.zeros(2, 2)}, "x")


def test_preference_in_closed_form() -> None:
    assert preference_loss(torch.zeros(1), torch.zeros(1), 0.2).item() == pytest.approx(math.log(2))
    loss = preference_loss(torch.tensor([-1.0]), torch.tensor([-4.0]), 0.5)
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-1.5))))
    logits = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.randint(5, (2, 7), generator=torch.Generator().manual_seed(1))
    mean, total = (log_likelihood(CodeHead(1, 5), logits, labels, r) for r in ("mean", "sum"))
    wanted = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(mean, wanted.mean(1))
    torch.testing.assert_close(total, wanted.sum(1))
    (gradient,) = torch.autograd.grad(preference_loss(mean, torch.tensor([-9.0, -9.0]), 0.2).sum(), logits)
    slope = -0.2 * torch.sigmoid(-0.2 * (mean.detach() + 9)) / 7
    one_hot = torch.nn.functional.one_hot(labels, 5)
    torch.testing.assert_close(gradient, slope[:, None, None] * (one_hot - logits.detach().softmax(-1)))
    with pytest.raises(UserError, match="mean or sum"):
        log_likelihood(BitHead(1, 2), logits, labels, "median")


def test_the_transformers_task_adds_preference_to_cross_entropy() -> None:
    system = tiny()
    with_preference, alone = HVARTask(system, preference=2.0), HVARTask(system, preference=0.0)
    found, plain = with_preference(batch(), 1), alone(batch(), 1)
    assert "preference" not in plain
    torch.testing.assert_close(found["cross_entropy"], plain["loss"])
    torch.testing.assert_close(found["loss"], plain["loss"] + 2 * found["preference"])
    found["loss"].backward()
    assert all(p.grad is not None for p in system.transformer.parameters())
    assert all(p.grad is None for p in system.tokenizer.parameters())


def test_the_same_image_twice_has_no_preference() -> None:
    same = batch()
    same["lq"] = same["hq"]
    found = HVARTask(tiny())(same, 1)
    assert found["margin"].item() == pytest.approx(0, abs=1e-6) and found["equal_tokens"] == 1
    assert found["preference"].item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("part", ["vocabulary", "phi", "decoder", "encoder"])
def test_switches_of_the_tokenizers_task_train_their_part_alone(part: str) -> None:
    system = tiny()
    task = HVARTokenizerTask(system, {"perceptual": 0.1}, "ms_ssim", skip=0.0, trained=[part]).train()
    task(batch(), 1)["loss"].backward()
    moved = {name for name, p in system.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    prefixes = {
        "vocabulary": ("tokenizer.quantizer.codebook.",),
        "phi": ("tokenizer.quantizer.phi.",),
        "decoder": ("tokenizer.decoder.", "tokenizer.post_quant_conv."),
        "encoder": ("tokenizer.encoder.", "tokenizer.quant_conv."),
    }[part]
    assert moved and all(name.startswith(prefixes) for name in moved)


def test_skipped_samples_are_decoded_from_their_features() -> None:
    system = tiny()
    task = HVARTokenizerTask(system, {"perceptual": 0.0}, skip=1.0).train()
    found = task(batch(), 1)
    with torch.no_grad():
        images = system.tokenizer.reduced(batch()["hq"] * 2 - 1, system.schedule)
        wanted = [(system.tokenizer.decode(system.tokenizer.features(x)) - x).square().mean() for x in images]
    torch.testing.assert_close(found["mse"], torch.stack(wanted).mean())
    assert task.eval()(batch(), 1)["mse"] != found["mse"]
    assert 0 < found["usage_5"] <= 1 and "perplexity_0" in found


def test_unknown_parts_and_shares_are_refused() -> None:
    with pytest.raises(UserError, match="trained parts"):
        HVARTokenizerTask(tiny(), perceptual="ms_ssim", trained=["head"])
    with pytest.raises(UserError, match="skip must be from 0 to 1"):
        HVARTokenizerTask(tiny(), perceptual="ms_ssim", skip=2)


def test_low_resolution_images_are_enlarged_linearly(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    system, image = tiny(), torch.rand(3, 8, 8)
    restore = system.restore_squares
    monkeypatch.setattr(system, "restore_squares", lambda lq, *rest: seen.append(lq) or restore(lq, *rest))
    system.restore(image, 4)
    whole = torch.nn.functional.interpolate(image[None], size=(32, 32), mode="bilinear")
    torch.testing.assert_close(seen[0], whole, atol=1e-6, rtol=0)
