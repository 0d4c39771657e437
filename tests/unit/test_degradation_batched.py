"""Degrading a batch against degrading its pictures one by one on the CPU."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from varestorer.data import Degradation, embedded_photographs
from varestorer.data.degradation import batched, jpeg, operations
from varestorer.data.degradation.batched import degrade
from varestorer.data.degradation.pipeline import carry_out
from varestorer.data.degradation.plan import Noise, Resize

SIZES = [(40, 31), (17, 48), (48, 20), (1, 1), (9, 2)]
FRAME = (48, 48)
NOISELESS = Noise(True, 0.0, False, 0)


def pictures(seed=0):
    """Pictures of `SIZES`, and the frame that holds them in a background of nonsense."""
    source = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, *size, generator=source) for size in SIZES]
    frame = torch.rand(len(SIZES), 3, *FRAME, generator=source) * 7 - 3
    for place, image in zip(frame, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return images, frame


def photographs(side, count=6):
    return torch.stack([photo[:, 60 : 60 + side, 100 : 100 + side] for _, photo in embedded_photographs("train")])[
        :count
    ]


def cut(frame, sizes):
    return [image[:, :height, :width] for image, (height, width) in zip(frame, sizes, strict=True)]


def plans(count, side):
    return [Degradation().draw((side, side), np.random.default_rng(seed)) for seed in range(count)]


def without_noise(plan, **changes):
    return replace(plan, noise1=NOISELESS, noise2=NOISELESS, **changes)


def test_blur_is_that_of_single_pictures():
    images, frame = pictures()
    source = np.random.default_rng(0)
    kernels = [source.random((size, size), dtype=np.float32) / size**2 for size in (7, 21, 13, 21)] + [None]
    blurred = cut(batched.blur(frame, SIZES, kernels), SIZES)
    for image, kernel, out in zip(images, kernels, blurred, strict=True):
        expected = image if kernel is None else operations.blur(image, torch.from_numpy(kernel))
        assert torch.allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
def test_resize_is_that_of_single_pictures(mode):
    images, frame = pictures()
    sizes = [(13, 50), (17, 48), (47, 19), (3, 2), (1, 60)]
    out, new = batched.resample(frame, SIZES, [Resize(size, mode) for size in sizes])
    assert new == sizes and out.shape[-2:] == (47, 60)
    for image, size, result in zip(images, sizes, cut(out, sizes), strict=True):
        assert torch.allclose(result, operations.resample(image, size, mode), atol=5e-6)


def test_methods_of_resizing_can_differ_in_a_batch():
    images, frame = pictures()
    resizes = [Resize((20 + n, 22), mode) for n, mode in enumerate(["area", "bicubic", "bilinear", "area", "bicubic"])]
    out, sizes = batched.resample(frame, SIZES, resizes)
    for image, resize, result in zip(images, resizes, cut(out, sizes), strict=True):
        assert torch.allclose(result, operations.resample(image, *resize), atol=5e-6)


@pytest.mark.parametrize("use_grey", [False, True])
@pytest.mark.parametrize("is_gaussian", [False, True])
def test_noise_has_the_same_moments_at_every_level(is_gaussian, use_grey):
    levels = torch.linspace(0.2, 0.8, 4).repeat_interleave(64)[None, None].expand(3, 256, 256)
    strength = 9.0 if is_gaussian else 0.4
    noise = Noise(is_gaussian, strength, use_grey, 5)
    frame = torch.stack([levels, levels])
    ours = batched.add_noise(frame, [(256, 256)] * 2, [noise, noise._replace(seed=6)]) - frame
    add = operations.add_gaussian_noise if is_gaussian else operations.add_poisson_noise
    theirs = add(levels.contiguous(), strength, use_grey, np.random.default_rng(0)) - levels
    for column in range(0, 256, 64):
        a, b = ours[0][..., column : column + 64], theirs[..., column : column + 64]
        assert a.std() == pytest.approx(float(b.std()), rel=0.04)
        assert abs(a.mean() - b.mean()) < 5 * a.std() / math.sqrt(64 * 256)
        skew = [float(((z - z.mean()) ** 3).mean() / z.std() ** 3) for z in (a, b)]
        assert skew[0] == pytest.approx(skew[1], abs=0.15)
    assert torch.equal(ours[0, 0], ours[0, 1]) == use_grey
    assert abs(torch.corrcoef(torch.stack([ours[0].flatten(), ours[1].flatten()]))[0, 1]) < 0.02


def test_noise_of_a_picture_does_not_depend_on_its_batch():
    images, frame = pictures()
    noises = [Noise(n % 2 == 0, 2.0, n > 2, 100 + n) for n in range(len(SIZES))]
    together = cut(batched.add_noise(frame, SIZES, noises), SIZES)
    for image, noise, out in zip(images, noises, together, strict=True):
        size = (image.shape[1], image.shape[2])
        assert torch.equal(batched.add_noise(image[None], [size], [noise])[0], out)


@pytest.mark.parametrize("quality", [10, 30, 60, 80, 95, 100])
def test_jpeg_is_the_real_one_within_a_fraction_of_a_level(quality):
    sizes = [(96, 96), (77, 96), (96, 50), (33, 35)]
    frame = photographs(96, 4)
    images = cut(frame, sizes)
    out = cut(jpeg.compress(frame, sizes, [quality] * 4), sizes)
    for image, result in zip(images, out, strict=True):
        real = operations.compress_jpeg(image, quality)
        error = 255 * (result - real).abs()
        assert error.mean() < 0.25 and error.max() <= 24
        assert error.mean() < 0.25 * 255 * (real - image).abs().mean()
        assert torch.allclose(255 * result, (255 * result).round(), atol=1e-4)


def test_jpeg_is_closer_to_the_real_one_than_a_differentiable_imitation():
    enhance = pytest.importorskip("kornia.enhance")
    image = (photographs(96, 1) * 255).round() / 255
    real = operations.compress_jpeg(image[0], 75)
    imitation = enhance.jpeg_codec_differentiable(image, torch.tensor([75.0]))[0]
    ours = jpeg.compress(image, [(96, 96)], [75])[0]
    assert (ours - real).abs().mean() < 0.2 * (imitation - real).abs().mean()


def test_qualities_differ_within_a_batch():
    frame = photographs(64, 2)
    sizes = [(64, 64)] * 2
    both = jpeg.compress(frame, sizes, [30, 90])
    assert torch.equal(both[0], jpeg.compress(frame[:1], sizes[:1], [30])[0])
    left = batched.compress(frame, sizes, [None, 90])
    assert torch.equal(left[0], frame[0]) and torch.equal(left[1], both[1])


def test_without_noise_and_jpeg_all_steps_together_give_the_same_values():
    """The decisions, their order and the geometry: what is left is rounding to 8 bit."""
    side = 64
    hq = photographs(side)
    drawn = enumerate(plans(6, side))
    quiet = [without_noise(plan, jpeg1=100, jpeg2=100, is_jpeg_last=n % 2 == 0) for n, plan in drawn]
    ours, theirs = degrade(hq, quiet), torch.stack([carry_out(p, image) for p, image in zip(quiet, hq, strict=True)])
    error = 255 * (ours - theirs).abs()
    assert error.mean() < 0.6 and error.max() <= 8


def test_whole_degradations_have_the_same_moments():
    side, count = 48, 60
    hq = photographs(side, 1).expand(count, -1, -1, -1)
    drawn = plans(count, side)
    ours = degrade(hq, drawn)
    theirs = torch.stack([carry_out(plan, hq[0]) for plan in drawn])
    assert ours.shape == hq.shape and ours.dtype == torch.float32
    assert torch.allclose(255 * ours, (255 * ours).round(), atol=1e-4)
    errors = [(lq - hq).square().mean((1, 2, 3)).sqrt() for lq in (ours, theirs)]
    assert torch.corrcoef(torch.stack(errors))[0, 1] > 0.95  # sample by sample as strong
    for statistic in (torch.mean, torch.std):
        assert statistic(ours) == pytest.approx(float(statistic(theirs)), rel=0.01)
        assert statistic(errors[0]) == pytest.approx(float(statistic(errors[1])), rel=0.05)
    detail = [lq.diff(dim=-1).abs().mean((1, 2, 3)) for lq in (ours, theirs)]
    assert detail[0].mean() == pytest.approx(float(detail[1].mean()), rel=0.04)


def test_a_sample_depends_on_its_plan_and_hardly_on_its_batch():
    hq, drawn = photographs(64), plans(6, 64)
    together = degrade(hq, drawn)
    assert torch.equal(together, degrade(hq, drawn))
    for row in range(6):
        alone = degrade(hq[row : row + 1], drawn[row : row + 1])[0]
        assert 255 * (alone - together[row]).abs().mean() < 0.1


def test_large_batches_are_done_in_parts(monkeypatch):
    side = 32
    hq, drawn = photographs(side)[:5], [without_noise(plan) for plan in plans(5, side)]
    sizes = []
    whole, part = degrade(hq, drawn), batched._degrade
    monkeypatch.setattr(batched, "_degrade", lambda x, of_part: sizes.append(len(of_part)) or part(x, of_part))
    monkeypatch.setattr(batched, "CHUNK_PIXELS", 2 * side**2)
    assert (255 * (degrade(hq, drawn) - whole)).abs().mean() < 0.05
    monkeypatch.setattr(batched, "CHUNK_PIXELS", 1)
    degrade(hq, drawn)
    assert sizes == [2, 2, 1] + 5 * [1]


def test_training_in_low_precision_does_not_reach_it():
    hq, drawn = photographs(48, 2), plans(2, 48)
    expected = degrade(hq, drawn)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(degrade(hq, drawn), expected)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_values():
    side = 128
    hq = photographs(side)
    quiet = [without_noise(plan) for plan in plans(6, side)]
    error = 255 * (degrade(hq.cuda(), quiet).cpu() - degrade(hq, quiet)).abs()
    assert error.mean() < 0.2
    drawn = plans(6, side)
    strength = [(lq.cpu() - hq).square().mean().sqrt() for lq in (degrade(hq.cuda(), drawn), degrade(hq, drawn))]
    assert float(strength[0]) == pytest.approx(float(strength[1]), rel=0.03)
