"""The refiner: its diffusion, its network, its draws; and drawing codes from filtered logits."""

import math

import pytest
import torch
from torch import Tensor

from varestorer.transformer.diffusion import (
    DiffusionChain,
    chain,
    cosine_alphas,
    gaussian_kl,
    kept_timesteps,
    level_log_likelihood,
)
from varestorer.transformer.heads import CodeHead, keep_top_k, keep_top_p, keyed_noise
from varestorer.transformer.refiner import Refiner, TrainingDraws
from varestorer.utils.errors import UserError
from varestorer.utils.seeds import normal_per_sample


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def refiner() -> Refiner:
    """One whose zero layers are not zero, so that everything has an effect."""
    network = Refiner(channels=4, cond_width=8, width=16, depth=2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return network


def test_the_chain_ends_in_noise_and_no_step_is_too_long() -> None:
    alphas = cosine_alphas()
    assert 0.9999 < alphas[0] < 1
    assert alphas[-1] < 1e-7
    assert (1 - alphas[1:] / alphas[:-1]).max() <= 0.999 + 1e-9
    assert alphas[499].item() == pytest.approx(math.cos(0.508 / 1.008 * math.pi / 2) ** 2, rel=1e-2)


def test_kept_steps_run_from_first_to_last_by_a_running_sum() -> None:
    assert kept_timesteps(10) == tuple(range(0, 1000, 111))
    assert kept_timesteps(1) == (0,)
    assert kept_timesteps(1000) == tuple(range(1000))
    assert kept_timesteps(21) != tuple(round(i * 999 / 20) for i in range(21))


@pytest.mark.parametrize("num_kept", [0, 1001])
def test_another_number_of_steps_is_refused(num_kept: int) -> None:
    with pytest.raises(UserError, match=f"1 to 1000 steps, got {num_kept}"):
        DiffusionChain(num_kept)


def test_a_step_with_the_true_noise_finds_the_mean_of_the_posterior() -> None:
    steps, i = DiffusionChain(10), 4
    x0, noise = rand(3, 4).clamp(-1, 1), rand(3, 4, seed=1)
    x = steps.noised(x0, torch.full((3,), i), noise)
    output = torch.cat([noise, torch.zeros(3, 4)], dim=-1)
    mean = steps.posterior_mean_coef1[i].float() * x0 + steps.posterior_mean_coef2[i].float() * x
    torch.testing.assert_close(steps.step(output, x, i, None), mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(steps.step(output, steps.noised(x0, torch.zeros(3).long(), noise), 0, None), x0)


def test_a_chain_of_one_step_gives_its_clean_data() -> None:
    assert DiffusionChain(1).step(torch.zeros(2, 8), torch.full((2, 4), 0.5), 0, None).isfinite().all()


def test_the_bound_trains_the_variance_alone() -> None:
    x0, noise, t = rand(6, 4) / 2, rand(6, 4, seed=1), torch.tensor([0, 1, 10, 100, 500, 999])
    output = rand(6, 8, seed=2).requires_grad_()
    losses = chain().loss(output, x0, chain().noised(x0, t, noise), t, noise)
    torch.testing.assert_close(losses.mse, (output[:, :4] - noise).square().mean(dim=-1))
    losses.vlb.sum().backward()
    assert output.grad[:, :4].abs().max() == 0
    assert (output.grad[:, 4:].abs().sum(dim=1) > 0).all()


def test_kl_and_level_probabilities_are_those_of_normal_distributions() -> None:
    mean, log_variance = torch.tensor([0.3]), torch.tensor([0.4])
    distribution = torch.distributions.Normal(mean, (log_variance / 2).exp())
    wanted = torch.distributions.kl_divergence(torch.distributions.Normal(0.0, 1.0), distribution)
    torch.testing.assert_close(gaussian_kl(torch.zeros(1), torch.zeros(1), mean, log_variance), wanted)
    levels = torch.arange(256) / 127.5 - 1
    likelihood = level_log_likelihood(levels, torch.tensor(0.1), torch.tensor(-1.0))
    assert likelihood.exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_positive_rows_alone_decide_unguided_samples(refiner: Refiner) -> None:
    z, negative = rand(2, 5, 8), rand(2, 5, 8, seed=3)
    noise = keyed_noise(0, [1, 2], "refiner", "cpu", normal_per_sample)
    plain = refiner.sample(z, noise).check()
    assert plain.shape == (2, 5, 4)
    assert torch.equal(refiner.sample(z, noise, negative, guidance=1.0).check(), plain)
    assert torch.equal(refiner.sample(z, noise, negative, guidance=0.0).check(), plain)
    assert not torch.allclose(refiner.sample(z, noise, negative, guidance=1.5).check(), plain, atol=1e-4)
    torch.testing.assert_close(refiner.sample(z, noise, z, guidance=1.5).check(), plain, atol=1e-5, rtol=0)


def test_a_sample_does_not_depend_on_what_stands_beside_it(refiner: Refiner) -> None:
    z, negative = rand(3, 5, 8), rand(3, 5, 8, seed=3)
    together = refiner.sample(z, keyed_noise(7, [4, 5, 6], "refiner", "cpu", normal_per_sample), negative, 2.0).check()
    alone = refiner.sample(z[1:2], keyed_noise(7, [5], "refiner", "cpu", normal_per_sample), negative[1:2], 2.0).check()
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)


def test_noise_is_asked_once_for_the_start_and_for_each_step_but_the_last(refiner: Refiner) -> None:
    asked = []

    def noise(draw: int, shape: tuple[int, ...]) -> Tensor:
        asked.append((draw, shape))
        return torch.zeros(shape)

    refiner.sample(rand(1, 2, 8), noise, num_steps=3)
    assert asked == [(draw, (1, 2, 4)) for draw in (0, 1, 2)]


def test_a_step_that_is_not_finite_is_named(refiner: Refiner) -> None:
    def noise(draw: int, shape: tuple[int, ...]) -> Tensor:
        return torch.full(shape, math.nan if draw == 2 else 0.1)

    refined = refiner.sample(rand(1, 2, 8), noise, num_steps=10)
    with pytest.raises(UserError, match=r"refiner step 3 of 10 \(timestep 777\) gave NaN or infinity"):
        refined.check()


def test_infinite_weights_are_not_hidden_by_the_clamp(refiner: Refiner) -> None:
    refiner.head.bias.data[0] = math.inf
    with pytest.raises(UserError, match="refiner step 1 of 10"):
        refiner.sample(rand(1, 2, 8), keyed_noise(0, [0], "refiner", "cpu", normal_per_sample)).check()


def test_the_loss_reaches_the_condition_and_not_the_residual(refiner: Refiner) -> None:
    z, residual = rand(2, 3, 8).requires_grad_(), rand(2, 3, 4, seed=1).requires_grad_()
    draws = TrainingDraws.keyed((3, 4), 0, [0, 1], "refiner", "cpu")
    refiner.loss(z, residual, draws).total.mean().backward()
    assert (z.grad.abs().sum(dim=-1) > 0).all()
    assert residual.grad is None
    assert all(parameter.grad is not None for parameter in refiner.parameters())


def test_training_rows_are_the_whole_list_of_tokens_repeated(refiner: Refiner) -> None:
    z, residual = rand(2, 3, 8), rand(2, 3, 4, seed=1)
    draws = TrainingDraws.keyed((3, 4), 0, [0, 1], "refiner", "cpu", repeats=2)
    assert draws.t.shape == (12,)
    assert draws.noise.shape == (12, 4)
    losses = refiner.loss(z, residual, draws).total
    last = TrainingDraws(draws.t[9:10], draws.noise[9:10])  # second time, second image, first token
    torch.testing.assert_close(refiner.loss(z[1:, :1], residual[1:, :1], last).total, losses[9:10])


def test_training_draws_belong_to_the_sample() -> None:
    pair, alone = (TrainingDraws.keyed((3, 4), 5, keys, "refiner", "cpu", repeats=2) for keys in ([8, 9], [9]))
    assert torch.equal(pair.t.view(2, 2, 3)[:, 1], alone.t.view(2, 3))
    assert torch.equal(pair.noise.view(2, 2, 3, 4)[:, 1], alone.noise.view(2, 3, 4))
    many = TrainingDraws.keyed((1000, 1), 0, range(4), "refiner", "cpu").t
    assert many.min() >= 0
    assert 990 < many.max() <= 999


def test_a_new_refiner_predicts_nothing_and_learns() -> None:
    network = Refiner(channels=4, cond_width=8, width=16, depth=2)
    network.init_weights(torch.Generator().manual_seed(2))
    assert network(rand(5, 4), torch.arange(5), rand(5, 8)).abs().max() == 0
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    z = rand(1, 64, 8)
    residual = 0.3 * z[..., :4]
    losses = []
    for step in range(60):
        draws = TrainingDraws.keyed((64, 4), 0, [step], "refiner", "cpu")
        mse = network.loss(z, residual, draws).mse.mean()
        optimizer.zero_grad()
        mse.backward()
        optimizer.step()
        losses.append(mse.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_the_network_computes_in_bfloat16_and_answers_in_float32(refiner: Refiner) -> None:
    x, t, z = rand(5, 4), torch.arange(5) * 100, rand(5, 8, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        blurred = refiner(x, t, z)
    assert blurred.dtype == torch.float32
    torch.testing.assert_close(blurred, refiner(x, t, z), atol=0.1, rtol=0.1)


def test_normal_noise_is_normal_and_keyed() -> None:
    noise = normal_per_sample((100, 100), 0, [3, 4], "a")
    assert abs(noise.mean().item()) < 0.03
    assert noise.std().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(noise[1:], normal_per_sample((100, 100), 0, torch.tensor([4]), "a"))
    assert not torch.equal(noise[1:], normal_per_sample((100, 100), 0, [4], "b"))


def test_top_k_keeps_ties_and_top_p_drops_what_meets_the_rest_exactly() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    assert keep_top_k(logits, 3).isfinite().tolist() == [True] * 4
    assert keep_top_k(logits, 2).isfinite().tolist() == [True, True, False, False]
    assert keep_top_k(logits, 0) is logits
    assert keep_top_k(logits, 9) is logits
    assert keep_top_p(logits, 0.75).isfinite().tolist() == [True, True, False, False]
    assert keep_top_p(logits, 0.01).isfinite().tolist() == [True, False, False, False]
    assert keep_top_p(logits, 1.0) is logits


def test_draws_follow_the_filtered_probabilities() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    uniform = torch.linspace(0, 1 - 2**-24, 1001)
    drawn = CodeHead(1, 4).select(logits.expand(1001, 4), uniform, top_k=3)
    assert drawn.dtype == torch.int64
    shares = drawn.bincount(minlength=4) / 1001
    torch.testing.assert_close(shares, torch.tensor([0, 0.4, 0.2, 0.3]) / 0.9, atol=2e-3, rtol=0)
    assert drawn.diff().min() >= 0


def test_without_noise_the_first_of_the_likeliest_is_taken() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [3.0, 2.0, 1.0]])
    assert CodeHead(1, 4).select(logits).tolist() == [1, 0]
    assert CodeHead(1, 4).select(logits, torch.tensor([0.99, 0.99]), top_k=1).tolist() == [1, 0]


def test_a_dropped_code_behind_the_last_kept_one_is_never_drawn() -> None:
    logits = torch.cat([rand(200, 300), torch.full((200, 4000), -1e4)], dim=-1)
    drawn = CodeHead(1, 4).select(logits, torch.full((200,), 1 - 2**-24), top_p=0.9)
    kept = keep_top_p(logits, 0.9).isfinite()
    assert kept.gather(-1, drawn[:, None]).all()
