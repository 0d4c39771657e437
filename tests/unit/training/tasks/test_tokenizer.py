"""Training the tokenizer: code usage, the discriminator beside it, and its scores on held-out pictures."""

import math

import pytest
import torch

from varestorer.systems.varestorer import VARestorer
from varestorer.training.scores import ImageScores
from varestorer.training.task import Batch
from varestorer.training.tasks.tokenizer import TokenizerTask, bit_usage
from varestorer.utils.seeds import torch_generator

ADVERSARIAL = {"weight": 0.5, "start_step": 2, "channels": 8, "layers": 2}


def batch_of(count: int = 2) -> Batch:
    hq = torch.rand(count, 3, 32, 32, generator=torch_generator(0))
    return {"hq": hq, "lq": hq, "name": [str(n) for n in range(count)], "key": torch.arange(count)}


def test_bit_usage_is_the_entropy_of_each_bits_mean() -> None:
    coarse = torch.tensor([[True, True], [True, False]])[:, :, None, None]  # (B=2, Z=2, 1, 1)
    fine = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]]).bool().view(1, 2, 2, 2).expand(2, -1, -1, -1)
    usage_KZ = bit_usage([coarse, fine])
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert usage_KZ.flatten().tolist() == pytest.approx([0.0, 1.0, quarter, 0.0], abs=1e-4)


def test_usage_is_reported_of_each_scale_and_each_bit(tiny_system: VARestorer) -> None:
    task = TokenizerTask(tiny_system, log_each_bit=True)
    losses = task(batch_of(), 1)
    scales, bits = ([losses[f"{name}_{n}"] for n in range(count)] for name, count in (("usage", 3), ("bit", 8)))
    assert torch.stack(scales).mean() == pytest.approx(losses["bit_usage"].item(), abs=1e-6)
    assert torch.stack(bits).mean() == pytest.approx(losses["bit_usage"].item(), abs=1e-6)
    assert "bit_0" not in TokenizerTask(tiny_system)(batch_of(), 1)


def test_the_discriminator_trains_beside_the_tokenizer_and_is_not_averaged(tiny_system: VARestorer) -> None:
    task = TokenizerTask(tiny_system, adversarial=ADVERSARIAL)
    names, averaged = task.trainable_parameters().keys(), task.averaged_parameters().keys()
    assert averaged == {f"tokenizer.{name}" for name, _ in tiny_system.tokenizer.named_parameters()}
    assert names - averaged == {f"adversary.{name}" for name, _ in task.adversary.named_parameters()}  # type: ignore[union-attr]
    assert not any(name.startswith(("tokenizer", "adversary")) for name in task.frozen_state())
    losses = task(batch_of(), 2)
    losses["loss"].backward()
    assert all(p.grad is not None for p in task.trainable_parameters().values())


def test_the_tokenizer_listens_to_the_discriminator_from_its_start_on(tiny_system: VARestorer) -> None:
    without, task = TokenizerTask(tiny_system), TokenizerTask(tiny_system, adversarial=ADVERSARIAL)

    def gradient(of: TokenizerTask, step: int) -> torch.Tensor:
        tiny_system.zero_grad()
        losses = of(batch_of(), step)
        losses["loss"].backward()
        return tiny_system.tokenizer.encoder.conv_in.weight.grad.clone()  # type: ignore[union-attr]

    tiny_system.tokenizer.requires_grad_(True)
    plain = gradient(without, 1)
    assert torch.allclose(gradient(task, 1), plain, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(gradient(task, 2), plain, rtol=1e-2)


def test_held_out_pictures_are_scored_as_they_would_be_saved(tiny_system: VARestorer) -> None:
    task = TokenizerTask(tiny_system, adversarial=ADVERSARIAL, continuous_steps=5).eval()
    with torch.no_grad():
        losses, batch = task(batch_of(), 0), batch_of()
        scores = ImageScores(["psnr", "ssim"])(task.compared(batch, task.restored(batch)))
        image = (tiny_system.decode(tiny_system.encode(batch_of()["hq"]).codes) * 255).round() / 255
    error = ((batch_of()["hq"] * 255).round() / 255 - image).square().mean(dim=(1, 2, 3))
    assert scores["psnr"].item() == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3)
    assert 0 < scores["ssim"] < 1
    assert "adversarial" not in losses
    through_bits = TokenizerTask(tiny_system).eval()
    assert torch.equal(losses["mse"], through_bits(batch_of(), 9)["mse"])  # not continuous in eval mode
