"""A small Gaussian diffusion: cosine schedule, noise prediction, learned variance (Improved DDPM, arXiv 2102.09672).

VARSR's refiner is trained and sampled by it. Tables are float64, and float32 where they meet tensors.
Shapes: `...` rows (tokens), `Z` numbers of a row, `n` steps of a chain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from varestorer.utils.errors import UserError

NUM_STEPS = 1000
HALF_LEVEL = 1 / 255  # data in [-1, 1] of 8 bits: half the distance of two levels
LEAST_PROBABILITY = 1e-12


def cosine_alphas(num_steps: int = NUM_STEPS) -> Tensor:
    """Product of 1 - beta up to each step, (num_steps,) float64; no beta is larger than 0.999."""

    def signal(share: float) -> float:
        return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - signal((i + 1) / num_steps) / signal(i / num_steps), 0.999) for i in range(num_steps)]
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), dim=0)


def kept_timesteps(num_kept: int, num_steps: int = NUM_STEPS) -> tuple[int, ...]:
    """The timesteps of a shorter chain, from 0 to the last one, as evenly as integers allow; 0 alone for one.

    The position is a running sum and each is rounded to the nearest, halves to even: i * stride instead of the sum
    would give other steps for many lengths, 21 among them.

    Raises:
        UserError: fewer than one step, or more than there are.
    """
    if not 1 <= num_kept <= num_steps:
        raise UserError(f"the refiner takes 1 to {num_steps} steps, got {num_kept}")
    stride = (num_steps - 1) / max(num_kept - 1, 1)
    position, kept = 0.0, []
    for _ in range(num_kept):
        kept.append(round(position))
        position += stride
    return tuple(kept)


@dataclass(frozen=True)
class DiffusionLoss:
    """Loss of each row.

    Attributes:
        mse: squared error of the predicted noise.
        vlb: variational bound in bits per number; its gradient reaches the variance alone.
    """

    mse: Tensor
    vlb: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum."""
        return self.mse + self.vlb


class DiffusionChain:
    """Constants of a chain, and what is computed with them.

    Step numbers `i` count the kept steps, 0 the cleanest; `timesteps[i]` is what the network is told.

    Args:
        num_kept: n; all of the training's by default.
        num_steps: of the training.
    Raises:
        UserError: see `kept_timesteps`.
    """

    def __init__(self, num_kept: int = NUM_STEPS, num_steps: int = NUM_STEPS) -> None:
        self.timesteps = torch.tensor(kept_timesteps(num_kept, num_steps))
        kept, first = cosine_alphas(num_steps)[self.timesteps], torch.ones(1, dtype=torch.float64)
        self.betas = 1 - kept / torch.cat([first, kept[:-1]])
        # `kept` again, but with the rounding of the betas in it, as the published sampler has it
        self.alphas_cumprod = alphas = torch.cumprod(1 - self.betas, dim=0)
        before = torch.cat([first, alphas[:-1]])
        self.sqrt_recip_alphas_cumprod = (1 / alphas).sqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / alphas - 1).sqrt()
        variance = self.betas * (1 - before) / (1 - alphas)
        # the last step has none, whose logarithm nobody can take: it gets its neighbor's ("clipped")
        variance[0] = variance[1] if num_kept > 1 else self.betas[0]
        self.posterior_log_variance_clipped = variance.log()
        self.posterior_mean_coef1 = self.betas * before.sqrt() / (1 - alphas)
        self.posterior_mean_coef2 = (1 - before) * (1 - self.betas).sqrt() / (1 - alphas)

    def __len__(self) -> int:
        return len(self.timesteps)

    def noised(self, x0: Tensor, i: Tensor, noise: Tensor) -> Tensor:
        """q(x_i | x_0): data of these step numbers (one a row), float32."""
        signal, rest = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        return _at(signal, i) * x0 + _at(rest, i) * noise

    def loss(self, output: Tensor, x0: Tensor, x: Tensor, i: Tensor, noise: Tensor) -> DiffusionLoss:
        """Losses of the network's output, one a row (simple loss and L_vlb of Improved DDPM, eq. 16, unscaled).

        Args:
            output: (..., 2 Z), predicted noise and position of the variance, see `log_variance`.
            x0: clean data (..., Z); it may leave [-1, 1].
            x: what the network was shown, `noised(x0, i, noise)`.
            i: step numbers (...).
            noise: (..., Z).
        """
        predicted, position = output.float().chunk(2, dim=-1)
        mse = (predicted - noise).square().mean(dim=-1)
        true_log_variance = _at(self.posterior_log_variance_clipped, i)
        mean = self._mean(self._clean(x, i, predicted.detach()), x, i)
        log_variance = self.log_variance(position, i)
        divergence = gaussian_kl(self._mean(x0, x, i), true_log_variance, mean, log_variance)
        likelihood = level_log_likelihood(x0, mean, log_variance / 2)
        vlb = torch.where((i == 0)[..., None], -likelihood, divergence).mean(dim=-1) / math.log(2)
        return DiffusionLoss(mse, vlb)

    def step(self, output: Tensor, x: Tensor, i: int, noise: Tensor | None, temperature: float = 1.0) -> Tensor:
        """One ancestral step: x of step number i - 1 (the clean data after i = 0), (..., Z) float32.

        Args:
            output: (..., 2 Z) of the network for x.
            x: at step number i.
            i: one for all rows.
            noise: (..., Z) normal; not asked for at i = 0.
            temperature: factor of the noise.
        """
        predicted, position = output.float().chunk(2, dim=-1)
        mean = self._mean(self._clean(x, i, predicted).clamp(-1, 1), x, i)
        if i == 0 or noise is None:
            return mean
        return mean + (0.5 * self.log_variance(position, i)).exp() * temperature * noise

    def log_variance(self, position: Tensor, i: Tensor | int) -> Tensor:
        """Between that of the posterior (position -1) and log beta (1); positions may go beyond."""
        share = (position + 1) / 2
        return share * _at(self.betas.log(), i) + (1 - share) * _at(self.posterior_log_variance_clipped, i)

    def _clean(self, x: Tensor, i: Tensor | int, noise: Tensor) -> Tensor:
        """x_0 if this was the noise in x."""
        return _at(self.sqrt_recip_alphas_cumprod, i) * x - _at(self.sqrt_recipm1_alphas_cumprod, i) * noise

    def _mean(self, x0: Tensor, x: Tensor, i: Tensor | int) -> Tensor:
        """Mean of q(x_{i-1} | x_i, x_0)."""
        return _at(self.posterior_mean_coef1, i) * x0 + _at(self.posterior_mean_coef2, i) * x


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept must serve training too
def chain(num_kept: int = NUM_STEPS) -> DiffusionChain:
    """The chain of this many steps; its tables are made once."""
    return DiffusionChain(num_kept)


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL divergence of two normal distributions in nats, number by number."""
    ratio = (log_variance1 - log_variance2).exp()
    distance = (mean1 - mean2).square() * (-log_variance2).exp()
    return 0.5 * (log_variance2 - log_variance1 - 1 + ratio + distance)


def level_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability in nats of the 8-bit level around x under a normal distribution; end levels have the tails."""
    precision = (-log_scale).exp()
    upper = _normal_cdf(precision * (x - mean + HALF_LEVEL))
    lower = _normal_cdf(precision * (x - mean - HALF_LEVEL))
    inner = torch.where(x > 0.999, 1 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inner).clamp(min=LEAST_PROBABILITY).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The usual approximation by tanh, which the published refiner was trained with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _at(table: Tensor, i: Tensor | int) -> Any:
    """Entries of a table, float32, to be broadcast over the numbers of a row; a plain number for a plain number."""
    return table.float().to(i.device)[i][..., None] if isinstance(i, Tensor) else float(table[i])
