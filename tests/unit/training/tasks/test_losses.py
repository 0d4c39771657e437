"""What the stages minimize: the paper's weights, and from whom to whom gradients go."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from varestorer.conditioning.restorer import new_restorer
from varestorer.systems.varestorer import VARestorer
from varestorer.tokenizer import TokenPyramid
from varestorer.training.task import Batch
from varestorer.training.tasks.distillation import DistillationTask, DistillationWeights
from varestorer.training.tasks.restorer import RestorerTask
from varestorer.training.tasks.teacher import TeacherTask, prompts_of
from varestorer.utils.seeds import torch_generator


def batch_of(*keys: int) -> Batch:
    hq = torch.stack([torch.rand(3, 32, 32, generator=torch_generator(0, key)) for key in keys])
    lq = F.avg_pool2d(hq, 4).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    return {"hq": hq, "lq": lq, "name": [str(k) for k in keys], "key": torch.tensor(keys)}


def test_distillation_minimizes_the_papers_sum(tiny_system: VARestorer) -> None:
    """L = 0.1 L_KL + 0.25 L_perc + 0.5 L_MSE, L_KL = sum over scales of KL(teacher || student)."""
    losses = DistillationTask(tiny_system, perceptual="ms_ssim").eval()(batch_of(0, 1), 1)
    parts = {name: losses[name].item() for name in ("kl", "perceptual", "mse")}
    expected = 0.1 * parts["kl"] + 0.25 * parts["perceptual"] + 0.5 * parts["mse"]
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-5)
    system, text = tiny_system, tiny_system.null_text(2)
    with torch.no_grad():
        teacher = system.teacher_logits(system.encode(batch_of(0, 1)["hq"]), text).log_softmax(dim=-1)
        student = system.student_logits(system.condition(batch_of(0, 1)["lq"]), text).log_softmax(dim=-1)
    kl_BLZ = (teacher.exp() * (teacher - student)).sum(dim=-1)
    of_scales = [kl_BLZ[:, tokens].mean() for tokens in (slice(0, 1), slice(1, 5), slice(5, 21))]
    assert parts["kl"] == pytest.approx(torch.stack(of_scales).sum().item(), rel=1e-4)


@pytest.mark.parametrize("experiment", ["dmd_div2k", "dmd_lsdir", "ablation_25k"])
def test_the_papers_experiments_keep_its_weights(compose: Callable[..., DictConfig], experiment: str) -> None:
    config = compose("train", f"+experiment={experiment}", "data.root=x")
    weights = DistillationWeights(**config.stages.student.task.get("weights", {}))
    assert weights == DistillationWeights(kl=0.1, perceptual=0.25, mse=0.5)
    assert config.model.student.lora_rank == 32 and config.optimizer.betas == [0.9, 0.95]


@pytest.mark.parametrize("part", ["mse", "perceptual", "kl"])
def test_every_part_of_distillation_reaches_the_adapters(tiny_system: VARestorer, part: str) -> None:
    weights = {"kl": 0.0, "perceptual": 0.0, "mse": 0.0, part: 1.0}
    task = DistillationTask(tiny_system, weights, perceptual="ms_ssim")
    task(batch_of(0, 1), 1)["loss"].backward()
    lengths = {name: 0.0 if p.grad is None else p.grad.norm().item() for name, p in task.trainable_parameters().items()}
    assert any(length > 1e-7 for length in lengths.values())


@torch.no_grad()
def test_a_scale_flips_as_many_bits_as_its_strength_says(tiny_system: VARestorer) -> None:
    """Strength and places of the flips are drawn apart: the first of a scale's numbers is not a bit's as well."""
    seen: list[TokenPyramid] = []
    task = TeacherTask(tiny_system, flip_strength=1.0)
    teacher_logits = tiny_system.teacher_logits
    tiny_system.teacher_logits = lambda pyramid, text: seen.append(pyramid) or teacher_logits(pyramid, text)  # type: ignore[assignment, func-returns-value]
    task(batch_of(*range(40)), 1)
    shares, first = [], []
    for labels, used in zip(seen[0].indices, seen[0].predicted, strict=True):
        flipped = (labels != used).flatten(1).float()
        shares.append(flipped.mean(dim=1))
        first.append(flipped[:, 0])
    assert torch.stack(shares[1:]).mean().item() == pytest.approx(0.5, abs=0.1)
    assert (shares[2] > 0.9).any() and (shares[2] < 0.1).any()
    assert 0.2 < torch.stack(first).mean().item() < 0.8


@torch.no_grad()
def test_the_teacher_learns_the_bits_that_were_not_flipped(tiny_system: VARestorer) -> None:
    kept: dict[str, Tensor] = {}
    task = TeacherTask(tiny_system, flip_strength=1.0, reweight_by_scale=False)
    teacher_logits = tiny_system.teacher_logits

    def watched(pyramid: TokenPyramid, text: object) -> Tensor:
        kept["logits"], kept["labels"] = teacher_logits(pyramid, text), pyramid.labels()  # type: ignore[arg-type]
        assert any(not torch.equal(a, b) for a, b in zip(pyramid.indices, pyramid.predicted, strict=True))
        return kept["logits"]

    tiny_system.teacher_logits = watched  # type: ignore[assignment]
    loss = task(batch_of(0, 1), 1)["loss"]
    assert loss.item() == pytest.approx(
        tiny_system.transformer.head.cross_entropy(kept["logits"], kept["labels"]).mean().item(), rel=1e-5
    )
    assert torch.equal(kept["labels"][:, 0], tiny_system.encode(batch_of(0, 1)["hq"]).labels()[:, 0])


@torch.no_grad()
def test_the_restorers_loss_is_of_images_from_minus_one_to_one(tiny_system: VARestorer) -> None:
    tiny_system.restorer = new_restorer(16, 1, 1)
    batch, weights = batch_of(0, 1), {"l1": 2.0, "mse": 3.0}
    losses = RestorerTask(tiny_system, weights)(batch, 1)
    error = tiny_system.restorer(batch["lq"]) - batch["hq"]  # of images in [0, 1], half as large
    assert losses["l1"].item() == pytest.approx(2 * error.abs().mean().item(), rel=1e-5)
    assert losses["mse"].item() == pytest.approx(4 * error.square().mean().item(), rel=1e-5)
    assert losses["loss"].item() == pytest.approx(2 * losses["l1"].item() + 3 * losses["mse"].item(), rel=1e-5)


@torch.no_grad()
def test_a_dropped_prompt_is_null_text_of_its_length(tiny_system: VARestorer) -> None:
    texts = [torch.randn(length, 16, generator=torch_generator(length)) for length in (2, 3, 1)]
    batch = batch_of(0, 1, 2) | {"text": [texts[0], None, texts[2]]}
    null = tiny_system.transformer.condition.null_features
    dropped, kept = (prompts_of(batch, tiny_system, share, 0).to_list() for share in (1.0, 0.0))
    assert [len(text) for text in dropped] == [2, len(null), 1]
    assert all(torch.equal(text, null[: len(text)]) for text in dropped)
    assert torch.equal(kept[0], texts[0]) and torch.equal(kept[1], null) and torch.equal(kept[2], texts[2])


@torch.no_grad()
def test_no_prompt_is_dropped_on_held_out_pictures(tiny_system: VARestorer) -> None:
    batch = batch_of(0, 1) | {"text": [torch.randn(2, 16, generator=torch_generator(n)) for n in (0, 1)]}
    never, always = (DistillationTask(tiny_system, perceptual="ms_ssim", condition_drop=c).eval() for c in (0.0, 1.0))
    assert never(batch, 0)["loss"] == always(batch, 0)["loss"]
    assert never.train()(batch, 1)["kl"] != always.train()(batch, 1)["kl"]
