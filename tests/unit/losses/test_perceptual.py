"""Perceptual and pixel losses: closed forms, gradients, precision."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from varestorer.losses.perceptual import (
    MS_SSIM_WEIGHTS,
    DISTSLoss,
    LPIPSLoss,
    MSSSIMLoss,
    ms_ssim,
    num_scales,
    perceptual_loss,
)
from varestorer.losses.pixel import l1_loss, mse_loss
from varestorer.training.tasks.distillation import DistillationTask
from varestorer.utils.images import load_image
from varestorer.utils.iqa import Metric, MetricUnavailableError, create_metric, weight_files
from varestorer.utils.iqa_weights import missing_weights


def pair(size: int = 48, noise: float = 0.2) -> tuple[Tensor, Tensor]:
    """A prediction and its target in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    target = torch.nn.functional.avg_pool2d(torch.randn(2, 3, 4 * size, 4 * size, generator=generator), 4)
    target = target.clamp(-1, 1)
    return (target + noise * torch.randn(target.shape, generator=generator)).clamp(-1, 1), target


LOSSES = {"ms_ssim": MSSSIMLoss(), "mse": mse_loss, "l1": l1_loss}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_zero_for_equal_images_and_grows_with_noise(name: str) -> None:
    loss = LOSSES[name]
    values = [loss(*pair(noise=noise)).item() for noise in (0.0, 0.05, 0.2, 0.5)]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values == sorted(values) and values[1] > 1e-4


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_and_lead_downhill(name: str) -> None:
    loss = LOSSES[name]
    pred, target = pair()
    for start in (pred, torch.zeros_like(pred)):
        start = start.clone().requires_grad_()
        before = loss(start, target)
        (gradient,) = torch.autograd.grad(before, start)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0
        step = 1e-2 / gradient.abs().max()
        assert loss((start - step * gradient).detach(), target) < before


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_the_mean_over_the_batch(name: str) -> None:
    pred, target = pair()
    singles = [LOSSES[name](pred[i : i + 1], target[i : i + 1]) for i in range(2)]
    assert torch.allclose(LOSSES[name](pred, target), torch.stack(singles).mean(), atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_must_agree(name: str) -> None:
    pred, target = pair()
    with pytest.raises(ValueError, match=r"target's shape \(1, 3, 48, 48\), got \(2, 3, 48, 48\)"):
        LOSSES[name](pred, target[:1])


def test_pixel_losses_follow_their_formulas() -> None:
    pred, target = torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.0])
    assert mse_loss(pred, target).item() == pytest.approx((0.25 + 1) / 2)
    assert l1_loss(pred, target).item() == pytest.approx(0.75)


def test_one_scale_equals_scikit_image() -> None:
    from skimage.metrics import structural_similarity

    pred, target = [(image + 1) / 2 for image in pair(64)]
    for i in range(2):
        wanted = structural_similarity(
            *(np.moveaxis(image[i].double().numpy(), 0, -1) for image in (pred, target)),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
            channel_axis=-1,
        )
        ours = ms_ssim(pred[i : i + 1], target[i : i + 1], max_scales=1)
        assert ours.item() == pytest.approx(wanted, abs=1e-4)


def test_flat_images_leave_the_luminance_of_the_coarsest_scale() -> None:
    a, b, c1 = 0.8, 0.5, 1e-4
    weights = MS_SSIM_WEIGHTS[:3]
    wanted = ((2 * a * b + c1) / (a * a + b * b + c1)) ** (weights[-1] / sum(weights))
    ours = ms_ssim(torch.full((1, 3, 48, 48), a), torch.full((1, 3, 48, 48), b))
    assert ours.item() == pytest.approx(wanted, abs=1e-3)


def test_number_of_scales_keeps_the_window_inside() -> None:
    assert [num_scales(side) for side in (8, 21, 22, 48, 88, 175, 176, 512)] == [1, 1, 2, 3, 4, 4, 5, 5]
    for side in (8, 23, 48):
        assert MSSSIMLoss()(*pair(side)).isfinite()


def test_autocast_does_not_change_ms_ssim() -> None:
    pred, target = pair()
    wanted = MSSSIMLoss()(pred, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(MSSSIMLoss()(pred, target), wanted)


def test_without_weights_lpips_and_dists_say_which_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MetricUnavailableError, match="alexnet-owt-7be5be79.pth in .*checkpoints"):
        LPIPSLoss()
    with pytest.raises(ValueError, match="net must be one of alex, vgg"):
        LPIPSLoss("squeeze")
    with pytest.raises(MetricUnavailableError, match="vgg16-397923af.pth in .*checkpoints"):
        DISTSLoss()


def loss_and_metric(name: str) -> tuple[LPIPSLoss | DISTSLoss, Metric]:
    """Ours and pyiqa's, or a skip."""
    if missing := missing_weights(name):
        pytest.skip(f"weights of {name} not here: {'; '.join(missing)}")
    return perceptual_loss(name), create_metric(name)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["lpips", "lpips-vgg", "dists"])
def test_our_networks_are_frozen_differentiable_and_equal_to_those_of_pyiqa(name: str) -> None:
    loss, metric = loss_and_metric(name)
    assert not any(p.requires_grad for p in loss.train().parameters())
    pred, target = pair()
    theirs = ((pred + 1) / 2).requires_grad_()
    wanted = metric.model.net(theirs, (target + 1) / 2).mean()
    wanted.backward()
    pred.requires_grad_()
    value = loss(pred, target)
    value.backward()
    assert value.item() > 0.01 and value.item() == pytest.approx(wanted.item(), abs=1e-6)
    assert torch.allclose(pred.grad, theirs.grad / 2, atol=1e-3 * pred.grad.abs().max().item())
    assert torch.equal(loss(pred, target), value) and loss(target, target).item() == pytest.approx(0, abs=1e-5)
    for flat in (-1.0, 0.0):
        image = torch.full_like(target, flat).requires_grad_()
        loss(image, target).backward()
        assert image.grad.isfinite().all()


@pytest.mark.parametrize("name", ["lpips", "dists"])
def test_losses_of_benchmark_pictures_are_the_figures_of_pyiqa(name: str, shared: Path) -> None:
    loss, metric = loss_and_metric(name)
    folder = shared / "benchmarks/realsr"
    for file in sorted((folder / "hr").glob("*.png"))[:1]:
        paths = (folder / "osediff" / file.name, file)
        image, reference = (load_image(path)[None, :, 128:320, 128:320] for path in paths)
        ours = loss(*(x.float() / 127.5 - 1 for x in (image, reference)))
        assert ours.item() == pytest.approx(metric(image / 255, reference / 255).item(), abs=5e-5)


def test_missing_weights_are_fetched_when_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr("varestorer.utils.iqa._is_offline", lambda: False)
    monkeypatch.setattr("varestorer.utils.iqa.network_reachable", lambda: True)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, *rest, progress: asked.append((url, *rest)))
    backbone, own = weight_files("dists")
    assert asked[0] == ("https://download.pytorch.org/models/vgg16-397923af.pth", str(backbone), "397923af")
    assert asked[1][0].endswith("/resolve/main/DISTS_weights-f5e65c96.pth") and asked[1][1:] == (str(own), "f5e65c96")
    for path in (backbone, own):
        path.write_bytes(b"half a file")
    with pytest.raises(MetricUnavailableError, match="vgg16-397923af.pth cannot be read .*: delete it"):
        DISTSLoss()


def test_a_step_of_training_needs_no_pyiqa(tiny_system, monkeypatch: pytest.MonkeyPatch) -> None:
    loss_and_metric("lpips")
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    task = DistillationTask(tiny_system, perceptual="lpips", condition_drop=0.0)
    pred, target = pair(tiny_system.tile)
    batch = {"hq": (target + 1) / 2, "lq": (pred + 1) / 2, "key": torch.arange(2), "name": ["a", "b"]}
    losses = task(batch, 1)
    losses["loss"].backward()
    assert losses["perceptual"].item() > 0 and any(p.grad is not None for p in task.parameters())


def test_names_of_losses_may_be_added_and_look_at_a_share_of_the_batch() -> None:
    pred, target = pair()
    whole, first = MSSSIMLoss()(pred, target), MSSSIMLoss()(pred[:1], target[:1])
    assert whole != first
    assert perceptual_loss("ms_ssim+ms_ssim")(pred, target) == 2 * whole
    assert perceptual_loss("ms_ssim+ms_ssim/2")(pred, target) == whole + first
    assert perceptual_loss("ms_ssim/4")(pred, target) == first  # rounded up
    for wrong in ("psnr", "ms_ssim+psnr", "ms_ssim/0", "ms_ssim/half"):
        with pytest.raises(ValueError, match="must be of .*, got '" + wrong.replace("+", ".")):
            perceptual_loss(wrong)
