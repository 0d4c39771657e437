"""Training the teacher: drop path, scores per scale, and what weight decay leaves alone."""

import pytest
import torch

from varestorer.systems.varestorer import VARestorer
from varestorer.training.task import Batch
from varestorer.training.tasks.teacher import PrefixTask, TeacherTask
from varestorer.transformer.model import branch_factors, dropped_paths
from varestorer.utils.errors import UserError
from varestorer.utils.seeds import torch_generator

UNDECAYED = {"condition.null_features", "condition.pool.query", "start", "level_embed.weight"}


def batch_of(*keys: int) -> Batch:
    hq = torch.stack([torch.rand(3, 32, 32, generator=torch_generator(0, key)) for key in keys])
    text = [torch.randn(2, 16, generator=torch_generator(1, key)) for key in keys]
    return {"hq": hq, "lq": hq, "name": [str(k) for k in keys], "key": torch.tensor(keys), "text": text}


def logits_of(system: VARestorer, batch: Batch) -> torch.Tensor:
    return system.teacher_logits(system.encode(batch["hq"]), system.null_text(len(batch["key"])))


def test_rates_grow_linearly_and_factors_have_mean_one() -> None:
    uniform = torch.rand(20_000, 3, 3, generator=torch_generator(0))
    factors = branch_factors(uniform, 0.4)
    assert torch.equal(factors[:, 0], torch.ones(20_000, 3))
    assert torch.allclose((factors == 0).float().mean(dim=(0, 2)), torch.tensor([0.0, 0.2, 0.4]), atol=0.01)
    assert torch.allclose(factors.mean(dim=(0, 2)), torch.ones(3), atol=0.02)
    assert torch.equal(branch_factors(uniform, 1.0)[:, 2], torch.zeros(20_000, 3))


@torch.no_grad()
def test_a_block_whose_branches_are_dropped_is_the_identity(tiny_system: VARestorer) -> None:
    batch = batch_of(0, 1)
    whole = logits_of(tiny_system, batch)
    with dropped_paths(tiny_system.transformer, branch_factors(torch.rand(2, 2, 3), 1.0)):
        dropped = logits_of(tiny_system, batch)
    assert torch.equal(logits_of(tiny_system, batch), whole)  # off again
    last = tiny_system.transformer.blocks[-1]
    del tiny_system.transformer.blocks[-1]
    assert torch.allclose(logits_of(tiny_system, batch), dropped, atol=1e-6)
    assert not torch.allclose(whole, dropped, atol=1e-3)
    tiny_system.transformer.blocks.append(last)
    with dropped_paths(tiny_system.transformer, torch.ones(2, 2, 3)):
        assert torch.equal(logits_of(tiny_system, batch), whole)


@torch.no_grad()
def test_what_is_dropped_belongs_to_sample_and_step(tiny_system: VARestorer) -> None:
    task = TeacherTask(tiny_system, drop_path=0.9)
    alone = [task(batch_of(key), 3)["cross_entropy"] for key in (4, 5)]
    assert torch.allclose(task(batch_of(4, 5), 3)["cross_entropy"], torch.stack(alone).mean(), atol=1e-5)
    of_steps = {round(task(batch_of(4), step)["cross_entropy"].item(), 6) for step in range(1, 6)}
    assert len(of_steps) > 1
    assert torch.equal(task(batch_of(4), 3)["cross_entropy"], alone[0])  # a resume meets the same


@pytest.mark.parametrize("drop_path", [0.0, 0.9])
def test_activation_checkpointing_changes_no_gradient(tiny_system: VARestorer, drop_path: float) -> None:
    """The blocks are computed again without the adapters and with the same branches left out."""
    gradients = []
    for checkpoint in (False, True):
        task = TeacherTask(tiny_system, drop_path=drop_path, checkpoint_activations=checkpoint)
        tiny_system.zero_grad()
        task(batch_of(4, 5), 3)["loss"].backward()
        gradients.append(tiny_system.transformer.word_embed.weight.grad.clone())  # type: ignore[union-attr]
    assert torch.allclose(*gradients, atol=1e-7)


@torch.no_grad()
def test_nothing_is_dropped_or_flipped_on_held_out_pictures(tiny_system: VARestorer) -> None:
    noisy = TeacherTask(tiny_system, flip_strength=1.0, condition_drop=1.0, drop_path=1.0).eval()
    plain = TeacherTask(tiny_system, flip_strength=0.0, condition_drop=0.0)
    batch = batch_of(0, 1)
    scores, expected = noisy(batch, 0), plain(batch, 1)
    assert scores.keys() == expected.keys()
    assert all(torch.equal(scores[name], expected[name]) for name in scores)
    assert not torch.equal(noisy.train()(batch, 1)["loss"], expected["loss"])


@torch.no_grad()
def test_scores_of_scales_add_up(tiny_system: VARestorer) -> None:
    scores = TeacherTask(tiny_system).eval()(batch_of(0, 1), 0)
    tokens = torch.tensor([1.0, 4.0, 16.0]) / 21
    for name in ("cross_entropy", "accuracy"):
        of_scales = torch.stack([scores[f"{name}_{k}"] for k in range(3)])
        assert (of_scales * tokens).sum().item() == pytest.approx(scores[name].item(), abs=1e-5)
    weights = tokens * torch.tensor([4.0, 2.0, 1.0])  # sqrt(A_K / A_k)
    of_scales = torch.stack([scores[f"cross_entropy_{k}"] for k in range(3)])
    assert (of_scales * weights / weights.sum()).sum().item() == pytest.approx(scores["loss"].item(), abs=1e-5)


def test_the_prefix_is_seen_by_all_on_held_out_pictures(tiny_system: VARestorer) -> None:
    config = tiny_system.config
    config["student"] |= {"conditioning": "prefix"}
    system = VARestorer(**config).eval()
    system.load_state_dict(tiny_system.state_dict())
    dropping, showing = (PrefixTask(system, prefix_drop=share, flip_strength=0.0) for share in (1.0, 0.0))
    with torch.no_grad():
        assert dropping(batch_of(0), 1)["loss"] != showing(batch_of(0), 1)["loss"]
        assert dropping.eval()(batch_of(0), 0)["loss"] == showing.eval()(batch_of(0), 0)["loss"]


def test_weight_decay_leaves_biases_embeddings_and_gains_alone(tiny_system: VARestorer) -> None:
    task = TeacherTask(tiny_system)
    left = {n for n, p in task.trainable_parameters().items() if task.no_decay(n, p) and p.ndim > 1}
    of_blocks = {f"blocks.{b}.{name}" for b in range(2) for name in ("modulation", "self_attention.log_scale")}
    assert left == {f"transformer.{name}" for name in UNDECAYED | of_blocks}
    decayed = {n for n, p in task.trainable_parameters().items() if not task.no_decay(n, p)}
    assert {"transformer.condition.modulation.weight", "transformer.head_modulation.weight"} <= decayed
    assert all(name.endswith("weight") for name in decayed)


def test_probabilities_are_checked(tiny_system: VARestorer) -> None:
    with pytest.raises(UserError, match=r"drop_path must be from 0 to 1, got 1\.5"):
        TeacherTask(tiny_system, drop_path=1.5)
