"""The system: restoring any size, the ways of restoring, the tasks' gradients."""

import copy
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from varestorer.conditioning.restorer import new_restorer
from varestorer.systems.base import REDUCE
from varestorer.systems.official import restore_official
from varestorer.systems.varestorer import VARestorer
from varestorer.tokenizer.quantizer import to_tokens
from varestorer.training.checkpoint import save_initial
from varestorer.training.tasks.distillation import DistillationTask
from varestorer.training.tasks.teacher import TeacherTask
from varestorer.training.tasks.tokenizer import TokenizerTask
from varestorer.transformer.heads import gumbel, keyed_noise
from varestorer.transformer.layout import long_layout
from varestorer.utils.errors import UserError
from varestorer.utils.files import write_json
from varestorer.utils.images import is_gray, pad_reflect, resize, to_levels, to_uint8
from varestorer.utils.seeds import torch_generator
from varestorer.weights.bundle import adapter_tensors, put_adapters, save_adapters, student_of
from varestorer.weights.runs import sealed_folder, write_tensors


def image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def batch(system: VARestorer) -> dict:
    return {"hq": image(32, 32)[None], "lq": image(32, 32, 1)[None], "name": ["a"], "key": torch.tensor([5])}


@pytest.mark.parametrize(("height", "width"), [(8, 8), (3, 5), (1, 1), (17, 9), (8, 40)])
def test_any_size_is_restored_at_its_own_aspect(tiny_system: VARestorer, height: int, width: int) -> None:
    restored = tiny_system.restore(image(height, width), 4).image
    assert restored.shape == (3, 4 * height, 4 * width)
    assert 0 <= restored.min() and restored.max() <= 1


def test_sampling_is_seeded_and_argmax_needs_no_seed(tiny_system: VARestorer) -> None:
    def restored(**options: object) -> torch.Tensor:
        return tiny_system.restore(image(20, 11), 4, **options).image

    assert torch.equal(restored(select="sample", seed=1), restored(select="sample", seed=1))
    assert not torch.equal(restored(select="sample", seed=1), restored(select="sample", seed=2))
    assert torch.equal(restored(seed=1), restored(seed=2))


def test_unknown_ways_of_restoring_are_refused(tiny_system: VARestorer) -> None:
    with pytest.raises(UserError, match="argmax or sample"):
        tiny_system.restore(image(8, 8), select="best")
    with pytest.raises(UserError, match="steps must be one, multi or 1 to 3"):
        tiny_system.restore(image(8, 8), steps="9")


def test_one_more_step_keeps_the_coarse_scales_of_the_student(tiny_system: VARestorer) -> None:
    squares = torch.stack([image(32, 32), image(32, 32, 3)])
    one, two = tiny_system.restore_batch(squares), tiny_system.restore_batch(squares, steps=2)
    same = [torch.equal(a, b) for a, b in zip(one.indices, two.indices, strict=True)]
    assert same[:2] == [True, True]
    assert torch.equal(tiny_system.restore_batch(squares, steps=1).images_B3HW, one.images_B3HW)


def test_multi_step_takes_coarse_scales_from_the_degraded_image(tiny_system: VARestorer) -> None:
    squares = image(32, 32)[None]
    with torch.no_grad():
        pyramid = tiny_system.encode(squares)
    restored = tiny_system.restore_batch(squares, steps="multi")
    assert torch.equal(restored.indices[0], pyramid.indices[0])  # side 1 <= 4 / 4
    assert restored.logits is None


def test_uncertainty_is_a_map_between_zero_and_one_for_each_scale(tiny_system: VARestorer) -> None:
    logits = tiny_system.restore_batch(image(32, 32)[None]).logits
    assert logits is not None
    uncertainty = tiny_system.uncertainty(logits)
    assert uncertainty.shape == (1, 3, 32, 32)
    assert 0 < uncertainty.min() and uncertainty.max() <= 1
    assert uncertainty[:, 0].std() < 1e-6 < uncertainty[:, 2].std()  # the first scale has one token
    assert tiny_system.uncertainty(torch.zeros_like(logits)).allclose(torch.ones(1, 3, 32, 32))


def test_uncertainty_is_one_where_the_head_says_nothing_and_zero_where_it_is_sure(tiny_system: VARestorer) -> None:
    photo = image(20, 50)
    assert tiny_system.restore(photo, 2).uncertainty_KHW is None
    for factor, low, high in ((0.0, 1.0, 1.0), (1e4, 0.0, 0.02)):
        silent = copy.deepcopy(tiny_system)
        silent.transformer.head.weight.data.mul_(factor)
        silent.transformer.head.bias.data.mul_(factor)
        uncertainty = silent.restore(photo, 2, uncertainty=True).uncertainty_KHW
        assert uncertainty is not None
        assert uncertainty.shape == (3, 40, 100)
        assert low - 1e-4 <= uncertainty.min() and uncertainty.mean() <= high + 1e-4
    with pytest.raises(UserError, match="uncertainty is the one-step student's"):
        tiny_system.restore(photo, 2, uncertainty=True, steps="multi")


@pytest.mark.parametrize("options", [{}, {"color": "adain"}, {"select": "sample"}, {"steps": 2}, {"tile": 16}])
def test_gray_stays_gray_and_color_does_not(tiny_system: VARestorer, options: dict) -> None:
    gray = image(20, 13)[:1].expand(3, -1, -1)
    restored = tiny_system.restore(gray, 2, uncertainty=True, **options)
    assert is_gray(restored.image) and restored.image.std() > 0
    assert restored.uncertainty_KHW is not None and restored.uncertainty_KHW.std() > 0
    assert not is_gray(tiny_system.restore(image(20, 13), 2, **options).image)


@pytest.mark.parametrize("scale", [0.5, 1, 1.5, 3])
def test_less_than_the_trained_scale_is_made_at_it_and_reduced(tiny_system: VARestorer, scale: float) -> None:
    photo = image(12, 8)
    whole = tiny_system.restore(photo, 4).image
    wanted = resize(whole, (round(12 * scale), round(8 * scale)), REDUCE)
    assert torch.equal(tiny_system.restore(photo, scale).image, wanted)
    plain = tiny_system.restore(photo, scale, trained_scale=scale).image
    assert plain.shape == wanted.shape and not torch.equal(plain, wanted)


@pytest.mark.parametrize(("reduce", "scale"), [(2, 1), (2, 2), (4, 1), (3, 1.5)])
def test_an_image_may_be_reduced_first_and_sizes_count_from_its_own(
    tiny_system: VARestorer, reduce: int, scale: float
) -> None:
    photo = image(13, 9)
    result = tiny_system.restore(photo, scale, reduce=reduce, uncertainty=True)
    rows, columns = -(-13 // reduce), -(-9 // reduce)
    small = pad_reflect(photo, 0, rows * reduce - 13, 0, columns * reduce - 9)
    small = small.unfold(1, reduce, reduce).unfold(2, reduce, reduce).mean(dim=(-2, -1))
    wanted = tiny_system.restore(small, scale * reduce, uncertainty=True)
    size = round(13 * scale), round(9 * scale)
    assert result.image.shape[1:] == size and result.uncertainty_KHW is not None
    assert torch.allclose(result.image, wanted.image[:, : size[0], : size[1]], atol=1e-4)
    assert wanted.uncertainty_KHW is not None and result.uncertainty_KHW.shape[1:] == size


@pytest.mark.parametrize("options", [{"reduce": 0}, {"reduce": 1.5}, {"reduce": 2, "sizes": [4]}])
def test_what_an_image_cannot_be_reduced_by_is_refused(tiny_system: VARestorer, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="reduce must be 1, 2, 3 and so on, and 1 with sizes"):
        tiny_system.restore(image(8, 8), **options)


def test_each_kind_of_picture_comes_back_as_it_came(tiny_system: VARestorer, tmp_path: Path) -> None:
    levels = (image(6, 9) * 255).round().byte().permute(1, 2, 0).numpy()
    pil = Image.fromarray(levels)
    pil.save(tmp_path / "a.png")
    wanted = to_levels(tiny_system.restore(torch.from_numpy(levels).permute(2, 0, 1) / 255).image)
    array, from_pil, from_path = (one.image for one in tiny_system.restore([levels, pil, tmp_path / "a.png"]))
    assert isinstance(array, np.ndarray) and np.array_equal(array, wanted)
    assert isinstance(from_pil, Image.Image) and np.array_equal(np.asarray(from_pil), wanted)
    assert isinstance(from_path, Image.Image) and np.array_equal(np.asarray(from_path), wanted)
    with pytest.raises(ValueError, match="wanted one RGB picture"):
        tiny_system.restore(levels.astype(np.float32))


def test_a_pil_image_keeps_transparency_and_gray_and_is_turned_once(tiny_system: VARestorer) -> None:
    clear = tiny_system.restore(Image.new("RGBA", (4, 3), (10, 20, 30, 77))).image
    assert clear.mode == "RGBA" and clear.size == (16, 12) and clear.getpixel((5, 5))[3] == 77
    turned = Image.new("L", (4, 3), 90)
    turned.getexif()[0x0112] = 6
    result = tiny_system.restore(turned).image
    assert result.mode == "L" and result.size == (12, 16) and turned.size == (4, 3)


def test_progress_counts_squares(tiny_system: VARestorer) -> None:
    seen: list[tuple[int, int]] = []
    tiny_system.restore(image(20, 11), 4, batch=4, progress=lambda *now: seen.append(now))
    total = seen[0][1]
    assert total > 4 and seen == [*((done, total) for done in range(0, total, 4)), (total, total)]


def test_gray_is_the_mean_of_what_the_channels_would_be(tiny_system: VARestorer) -> None:
    gray = torch.zeros(3, 32, 32)
    channels = tiny_system.restore_batch(gray[None]).images_B3HW[0]
    assert torch.allclose(tiny_system.restore(gray, 1, trained_scale=1).image[0], channels.mean(0), atol=1e-6)


def test_another_range_or_scale_is_refused_by_every_door(tiny_system: VARestorer) -> None:
    levels = (image(8, 8) * 255).to(torch.uint8)
    doors = (tiny_system.restore, tiny_system.reconstruct, partial(restore_official, tiny_system))
    for given in (levels, levels.float(), image(8, 8) * 2 - 1, image(8, 8).numpy(), image(8, 8)[None]):
        for door in doors:
            with pytest.raises(ValueError, match=r"^wanted one RGB picture: .* got "):
                door(given)
    for scale in (-1, 0, float("nan"), float("inf"), "4", None, True, [2], torch.tensor(2.0)):
        for door in (tiny_system.restore, partial(restore_official, tiny_system)):
            with pytest.raises(ValueError, match=r"^scale must be a number above 0, such as 4 \(times larger\), got "):
                door(image(8, 8), scale)
    assert tiny_system.restore(image(8, 8).double(), np.float64(1.5)).image.shape == (3, 12, 12)


def test_squares_of_another_side(tiny_system: VARestorer) -> None:
    assert tiny_system.tile == 32
    assert tiny_system.tiles == (16, 32)
    small = tiny_system.at_tile(16)
    assert small.tile == 16
    assert small.restore_batch(image(16, 16)[None]).images_B3HW.shape == (1, 3, 16, 16)
    assert tiny_system.tile == 32  # the system itself stays as it is
    assert torch.equal(tiny_system.restore(image(9, 9), 3, tile=16).image, small.restore(image(9, 9), 3).image)
    with pytest.raises(UserError, match="tile must be one of 16, 32 pixels for this model, got 24"):
        tiny_system.restore(image(9, 9), tile=24)


def test_the_published_squares() -> None:
    with torch.device("meta"):
        system = VARestorer({"size": "0.25M"}, {}, {}, {})
    assert system.tiles == (256, 320, 384, 512, 640, 768, 1024)
    large = system.at_tile(1024)
    assert len(large.schedule) == 13
    layout = long_layout(large.schedule, large.transformer.config.position_rule, torch.device("cpu"))
    assert layout.levels_L.max() < system.transformer.config.num_levels


def test_the_colors_of_the_input(tiny_system: VARestorer) -> None:
    photo = image(16, 16) * 0.2 + torch.tensor([0.6, 0.2, 0.1])[:, None, None]
    away = (tiny_system.restore(photo, 2).image.mean((1, 2)) - photo.mean((1, 2))).abs().max()
    for color in ("adain", "wavelet"):
        kept = (tiny_system.restore(photo, 2, color=color).image.mean((1, 2)) - photo.mean((1, 2))).abs().max()
        assert kept < 0.25 * away


def test_bits_agree_across_batch_sizes_wherever_they_are_decided(tiny_system: VARestorer) -> None:
    """Sums in another order move logits a little: only decisions closer than 1e-4 may change with the batch."""
    squares = torch.stack([image(32, 32, seed) for seed in range(5)])

    def margins_and_bits(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        noise = keyed_noise(3, rows, "restore", "cpu")
        restored = tiny_system.restore_batch(squares[rows], noise)
        assert restored.logits is not None
        drawn = [noise(k, tuple(part.shape)) for k, part in enumerate(_scales(tiny_system, restored.logits))]
        noisy = restored.logits + gumbel(torch.cat(drawn, dim=1))
        bits = torch.cat([bits.flatten(2).transpose(1, 2) for bits in restored.indices], dim=1)
        return (noisy[..., 1] - noisy[..., 0]).abs(), bits, restored.images_B3HW

    margin, bits, images = margins_and_bits([0, 1, 2, 3, 4])
    for row in range(5):
        _, alone, picture = margins_and_bits([row])
        differing = alone[0] != bits[row]
        assert not differing[margin[row] > 1e-4].any()
        if not differing.any():
            assert (to_uint8(picture[0]).int() - to_uint8(images[row]).int()).abs().max() <= 1


def _scales(system: VARestorer, logits_BLZ2: torch.Tensor) -> list[torch.Tensor]:
    return [logits_BLZ2[:, tokens] for tokens in system.schedule.slices]


def test_a_tile_is_restored_alike_alone_and_among_others(tiny_system: VARestorer) -> None:
    squares = torch.stack([image(32, 32, seed) for seed in range(3)])
    together = tiny_system.restore_batch(squares, keyed_noise(0, [4, 5, 6], "x", "cpu"))
    alone = tiny_system.restore_batch(squares[1:2], keyed_noise(0, [5], "x", "cpu"))
    assert torch.allclose(together.images_B3HW[1], alone.images_B3HW[0], atol=1e-5)


def test_tasks_train_their_own_part_only(tiny_system: VARestorer) -> None:
    parts = {
        TokenizerTask: {"tokenizer"},
        TeacherTask: {"transformer"},
        DistillationTask: {"transformer"},
    }
    for make, expected in parts.items():
        task = make(tiny_system) if make is not DistillationTask else make(tiny_system, perceptual="ms_ssim")
        names = task.trainable_parameters()
        assert {name.split(".")[0] for name in names} == expected
        adapters = {name for name in names if ".lora_" in name}
        assert bool(adapters) is (make is DistillationTask)
        assert adapters in (set(), set(names))
        tiny_system.zero_grad()
        task(batch(tiny_system), 1)["loss"].backward()
        with_gradient = {name for name, p in task.named_parameters() if p.grad is not None and p.grad.any()}
        assert {name.removeprefix("system.") for name in with_gradient} <= set(names)
        unused = {name for name in names if f"system.{name}" not in with_gradient}
        # with the null text alone the softmax over its keys may leave some of the pool's weights idle
        assert not {name for name in unused if ".lora_" in name or name.startswith("tokenizer")}


def test_distillation_losses_of_the_teacher_itself(tiny_system: VARestorer) -> None:
    """Where student and teacher see the same tokens under the same mask, L_KL is zero; so it is not here."""
    task = DistillationTask(tiny_system, weights={"kl": 1.0, "perceptual": 0.0, "mse": 0.0}, perceptual="ms_ssim")
    losses = task(batch(tiny_system), 1)
    assert losses.keys() == {"loss", "kl"}
    assert losses["kl"] > 0
    assert losses["loss"] == losses["kl"]


def test_a_separate_teacher_equal_to_the_base_gives_the_same_loss(tiny_system: VARestorer, tmp_path: Path) -> None:
    save_initial(tmp_path, tiny_system.state_dict())
    checkpoint = tmp_path / "checkpoints" / "student" / "step_000001"
    with sealed_folder(checkpoint) as folder:
        write_json(folder / "state.json", {"stage": "student", "stage_index": 0})
        write_tensors(folder / "ema.safetensors", {})
    weights = {"kl": 1.0, "perceptual": 0.0, "mse": 0.0}
    shared = DistillationTask(tiny_system, weights, perceptual="ms_ssim")
    separate = DistillationTask(tiny_system, weights, perceptual="ms_ssim", teacher=str(tmp_path))
    assert separate.trainable_parameters().keys() == shared.trainable_parameters().keys()
    assert separate(batch(tiny_system), 1)["loss"] == shared(batch(tiny_system), 1)["loss"]
    with torch.no_grad():
        separate.teacher.head.weight.mul_(2.0)  # a constant would go unseen behind a normalization
    assert separate(batch(tiny_system), 1)["loss"] != shared(batch(tiny_system), 1)["loss"]


def test_image_losses_reach_the_adapters_through_the_bits(tiny_system: VARestorer) -> None:
    task = DistillationTask(tiny_system, weights={"kl": 0.0, "perceptual": 0.0, "mse": 1.0}, perceptual="ms_ssim")
    tiny_system.zero_grad()
    task(batch(tiny_system), 1)["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in task.trainable_parameters().values())


def test_randomness_of_a_step_belongs_to_the_sample(tiny_system: VARestorer) -> None:
    task = TeacherTask(tiny_system)
    one, other = batch(tiny_system), batch(tiny_system) | {"key": torch.tensor([6])}
    both = {name: torch.cat([one[name], other[name]]) for name in ("hq", "lq", "key")}
    with torch.no_grad():
        alone = [task(b, 1)["cross_entropy"] for b in (one, other)]
        assert torch.allclose(task(both, 9)["cross_entropy"], torch.stack(alone).mean(), atol=1e-6)
    assert not torch.equal(*alone)


def test_continuous_steps_skip_the_bits(tiny_system: VARestorer) -> None:
    task = TokenizerTask(tiny_system, continuous_steps=3)
    with torch.no_grad():
        assert task(batch(tiny_system), 3)["mse"] != task(batch(tiny_system), 4)["mse"]


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "torch transformers peft pyiqa wandb kornia spandrel matplotlib accelerate skimage sklearn".split()
    code = f"import sys, varestorer, varestorer.commands; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_whole_student_trains_against_a_copy_of_its_start(tiny_system: VARestorer) -> None:
    config = tiny_system.config
    system = VARestorer(**(config | {"student": {"lora_rank": 0}}), seed=1)
    task = DistillationTask(system, perceptual="ms_ssim", trained="all", teacher="start")
    assert {name.split(".")[0] for name in task.trainable_parameters()} == {"transformer"}
    assert len(task.trainable_parameters()) == len(list(system.transformer.parameters()))
    teacher = {name: tensor.clone() for name, tensor in task.teacher.state_dict().items()}  # type: ignore[union-attr]
    task(batch(system), 1)["loss"].backward()
    torch.optim.SGD(task.trainable_parameters().values(), lr=1.0).step()
    moved = [name for name, tensor in system.transformer.state_dict().items() if not torch.equal(tensor, teacher[name])]
    assert "head.weight" in moved
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in task.teacher.state_dict().items())  # type: ignore[union-attr]
    with pytest.raises(UserError, match="either adapters .* or all"):
        DistillationTask(system, perceptual="ms_ssim", trained="all")
    with pytest.raises(UserError, match="either adapters .* or all"):
        DistillationTask(tiny_system, perceptual="ms_ssim", trained="some")


def test_squares_of_mixed_sizes_take_turns(tiny_system: VARestorer) -> None:
    task = DistillationTask(tiny_system, perceptual="ms_ssim", tiles=[16, 32])
    sizes = set()
    for step in range(1, 9):
        with torch.no_grad():
            losses = task(batch(tiny_system), step)
            again = task(batch(tiny_system), step)
        assert torch.equal(losses["loss"], again["loss"])  # the step decides, not chance
        sizes.add(round(losses["mse"].item(), 6))
    assert len(sizes) == 2


def test_a_causal_student_does_not_look_at_finer_scales(tiny_system: VARestorer) -> None:
    config = tiny_system.config
    config["student"] |= {"attention": "causal", "long_input": False}
    causal = VARestorer(**config).eval()
    causal.load_state_dict(tiny_system.state_dict())
    squares = torch.stack([image(32, 32), image(32, 32, 1)])
    with torch.no_grad():
        condition = causal.condition(squares)
        changed = condition.tokens_BLZ.clone()
        changed[:, 4:] += 1.0  # the inputs of the last scale
        logits = causal.student_logits(condition, causal.null_text(2))
        other = causal.student_logits(replace(condition, tokens_BLZ=changed), causal.null_text(2))
    assert torch.equal(logits[:, :5], other[:, :5])
    assert not torch.allclose(logits[:, 5:], other[:, 5:], atol=1e-3)
    with pytest.raises(UserError, match=r"model\.student\.attention must be cross_scale or causal, got all"):
        VARestorer(**(config | {"student": {"attention": "all"}}))


def test_a_prompt_for_a_model_without_text_is_refused_before_an_encoder_is_fetched(tiny_system: VARestorer) -> None:
    with pytest.raises(UserError, match="trained without google/flan-t5-xl"):
        tiny_system.restore(image(8, 8), prompt="a dog")
    features = torch.rand(2, 16, generator=torch.Generator().manual_seed(3))
    assert not torch.equal(
        tiny_system.restore(image(8, 8), prompt=features).image, tiny_system.restore(image(8, 8)).image
    )


@torch.no_grad()
def test_a_student_that_keeps_bits_changes_only_those_it_is_sure_of(tiny_system: VARestorer) -> None:
    student = {**tiny_system.config["student"], "keep_bits": 3.0, "inputs": "own_scale", "long_input": False}
    keeping = VARestorer(**{**tiny_system.config, "student": student})
    keeping.load_state_dict(tiny_system.state_dict())
    squares = torch.rand(2, 3, keeping.tile, keeping.tile, generator=torch_generator(1))
    condition = keeping.condition(squares)
    logits = keeping.student_logits(condition, keeping.null_text(2))
    keeping.student_config = replace(keeping.student_config, keep_bits=0.0)
    own = keeping.student_logits(condition, keeping.null_text(2))
    margins = (logits - own)[..., 1] - (logits - own)[..., 0]
    assert torch.allclose(margins.abs(), torch.tensor(3.0), atol=1e-5)
    assert torch.equal(margins > 0, condition.pyramid.labels())

    keeping.student_config = replace(keeping.student_config, keep_bits=3.0)
    keeping.transformer.head.weight.zero_()
    keeping.transformer.head.bias.zero_()
    kept = keeping.restore_batch(squares)
    assert all(torch.equal(*pair) for pair in zip(kept.indices, condition.pyramid.indices, strict=True))
    assert torch.allclose(kept.images_B3HW, keeping.decode(condition.pyramid.codes), atol=1e-6)

    keeping.student_config = replace(keeping.student_config, keep_residual=True)  # what the tokenizer lost, as well
    assert torch.allclose(keeping.restore_batch(squares).images_B3HW, squares, atol=1e-5)
    assert torch.allclose(keeping.restore_batch(squares, steps=1).images_B3HW, squares, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("inputs", ["next_scale", "own_scale"])
@pytest.mark.parametrize("is_long", [False, True])
def test_the_student_starts_from_the_codes_its_config_names(
    tiny_system: VARestorer, inputs: str, is_long: bool
) -> None:
    config = tiny_system.config
    student = config["student"] | {"inputs": inputs, "long_input": is_long}
    condition = VARestorer(**(config | {"student": student})).condition(image(32, 32)[None])
    pyramid = condition.pyramid
    short = pyramid.inputs() if inputs == "next_scale" else pyramid.own_inputs()
    assert torch.equal(condition.tokens_BLZ[:, : short.shape[1]], short)
    assert torch.equal(condition.tokens_BLZ[:, short.shape[1] :], to_tokens(pyramid.codes)[:, : 16 * is_long])
    with pytest.raises(UserError, match=r"model\.student\.inputs must be next_scale or own_scale, got both"):
        VARestorer(**(config | {"student": {"inputs": "both"}}))


def test_tiles_overlap_by_a_quarter_unless_told_otherwise(tiny_system: VARestorer) -> None:
    picture = image(20, 11)
    restored = tiny_system.restore(picture, 4).image
    assert torch.equal(restored, tiny_system.restore(picture, 4, overlap=8).image)
    assert not torch.equal(restored, tiny_system.restore(picture, 4, overlap=4).image)


def test_a_model_that_gets_other_adapters_keeps_the_rest(tiny_system: VARestorer, tmp_path: Path) -> None:
    save_adapters(tiny_system, tmp_path / "adapters.safetensors")
    base = copy.deepcopy(tiny_system)
    base.restorer = new_restorer(16, 1, 1)
    with torch.no_grad():
        for tensor in adapter_tensors(base).values():
            tensor.mul_(2)
    given = put_adapters(base, tmp_path / "adapters.safetensors", student_of(tmp_path / "adapters.safetensors") or {})
    tiny_system.restorer = base.restorer
    square = image(32, 32)[None]
    found, wanted, before = (system.restore_batch(square).logits for system in (given, tiny_system, base))
    assert torch.equal(found, wanted) and not torch.allclose(before, wanted, atol=1e-3)


def test_uncertainty_is_enlarged_bilinearly(tiny_system: VARestorer) -> None:
    logits = torch.randn(1, 21, 8, 2, generator=torch_generator(0))
    p = logits.softmax(dim=-1)
    entropy = -(p * p.log2()).sum(dim=-1).mean(dim=-1)
    for k, (tokens, side) in enumerate(zip((slice(0, 1), slice(1, 5), slice(5, 21)), (1, 2, 4), strict=True)):
        small = entropy[:, tokens].view(1, 1, side, side)
        wanted = torch.nn.functional.interpolate(small, (32, 32), mode="bilinear", align_corners=False)
        assert torch.allclose(tiny_system.uncertainty(logits)[:, k], wanted[:, 0], atol=1e-5)


def test_an_image_with_its_residual_stays_in_range_and_its_gradient_passes(tiny_system: VARestorer) -> None:
    codes = torch.randn(1, 8, 4, 4, generator=torch_generator(0))
    residual = torch.full((1, 3, 32, 32), 5.0, requires_grad=True)
    made = tiny_system.student_image(codes, residual)
    assert made.max().item() == pytest.approx(1.0) and made.min().item() == pytest.approx(1.0)
    made.sum().backward()
    assert residual.grad is not None and torch.equal(residual.grad, torch.ones_like(residual))
