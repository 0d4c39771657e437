"""VARSR's refiner: a small diffusion model for what the codes of the last scale leave over.

Each token is a row of its own: the network never looks at its neighbors; what it needs to know of them is in its
condition. Shapes: `...` rows (tokens), `Z` width of a code, `C` width of the condition, `n` steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varestorer.transformer.diffusion import NUM_STEPS, DiffusionLoss, chain
from varestorer.transformer.heads import Noise
from varestorer.utils.errors import UserError
from varestorer.utils.seeds import normal_per_sample, uniform_per_sample

EPS = 1e-6
NUM_TIME_FEATURES = 256
DATA_SCALE = 0.6
"""Residuals are divided by it, so that most lie in [-1, 1]."""
NUM_SAMPLING_STEPS = 10
REPEATS = 4
"""How often a token is noised in a training step."""
UNGUIDED = (0.0, 1.0)
"""Scales without guidance: nothing to add, and, as released, exactly 1."""


@dataclass(frozen=True)
class TrainingDraws:
    """What a training step draws, for the whole list of tokens repeated one time after the other.

    Attributes:
        t: timesteps, (repeats * B * l,) int64.
        noise: normal, (repeats * B * l, Z).
    """

    t: Tensor
    noise: Tensor

    @classmethod
    def keyed(
        cls,
        shape: tuple[int, int],
        seed: int,
        keys: Sequence[int] | Tensor,
        stream: str,
        device: torch.device | str,
        repeats: int = REPEATS,
    ) -> TrainingDraws:
        """Draws in which those of a sample depend on (seed, stream, its key) alone.

        Args:
            shape: (l, Z) of one sample's tokens.
            seed: of the run.
            keys: one a sample.
            stream: name.
            device: where the draws are needed.
            repeats: how often each token is used.
        """
        tokens, width = shape
        uniform_Brl = uniform_per_sample((repeats, tokens), seed, keys, f"{stream}/t", device)
        noise_BrlZ = normal_per_sample((repeats, tokens, width), seed, keys, f"{stream}/noise", device)
        t_Brl = (uniform_Brl * NUM_STEPS).long()
        return cls(t_Brl.transpose(0, 1).flatten(), noise_BrlZ.transpose(0, 1).flatten(0, 2))


@dataclass(frozen=True)
class Refined:
    """Result of a sampling.

    Attributes:
        residual: (..., Z) float32, to be added to the codes of the last scale.
        is_finite_n: whether each step's network output was finite, bool; asked of the device by `check` alone, so
            that the steps need no answer from it.
    """

    residual: Tensor
    is_finite_n: Tensor

    def check(self) -> Tensor:
        """The residual; UserError, with the first such step, if one gave NaN or infinity."""
        if not self.is_finite_n.is_meta and not bool(self.is_finite_n.all()):
            step, num_steps = int(self.is_finite_n.logical_not().nonzero()[0]), len(self.is_finite_n)
            t = int(chain(num_steps).timesteps[num_steps - 1 - step])
            raise UserError(
                f"refiner step {step + 1} of {num_steps} (timestep {t}) gave NaN or infinity: check the weights, or "
                "compute in float32"
            )
        return self.residual


class RefinerBlock(nn.Module):
    """x + gate * MLP(norm(x) * (1 + scale) + shift), with shift, scale and gate from time and condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, activated: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(activated).chunk(3, dim=-1)
        h = torch.addcmul(shift, self.norm(x), 1 + scale)
        return torch.addcmul(x, gate, self.fc2(F.silu(self.fc1(h))))


class TimeEmbedding(nn.Module):
    """Timesteps as vectors: cosines and sines, Linear, SiLU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(NUM_TIME_FEATURES, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(time_features(t))))


def time_features(t: Tensor) -> Tensor:
    """128 cosines, then 128 sines of t at frequencies from 1 down to almost 1/10000: (..., 256) float32."""
    half = NUM_TIME_FEATURES // 2
    numbers = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[..., None].float() * torch.exp(-math.log(10000.0) * numbers / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Refiner(nn.Module):
    """Predicts noise and variance of a noisy residual, given time and condition.

    Args:
        channels: Z.
        cond_width: C.
        width: of the network; the published one has 1024.
        depth: blocks; the published one has 6.
    """

    def __init__(self, channels: int, cond_width: int, width: int = 1024, depth: int = 6) -> None:
        super().__init__()
        self.channels = channels
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(cond_width, width)
        self.word_embed = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(RefinerBlock(width) for _ in range(depth))
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, 2 * channels)

    @property
    def layers(self) -> list[nn.Module]:
        """All that is called, one by one: time and condition once, the rest in every step."""
        ends = [self.time_embed, self.cond_embed, self.word_embed, self.head_modulation, self.head]
        return [*ends, *self.blocks]

    @property
    def _blocks(self) -> Iterable[RefinerBlock]:
        return cast(Iterable[RefinerBlock], self.blocks)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights for training from scratch; blocks and output begin as zero (the gates of DiT)."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight, generator=generator)
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.LayerNorm):
                nn.init.ones_(layer.weight)
                nn.init.zeros_(layer.bias)
        for layer in (self.time_embed.fc1, self.time_embed.fc2):
            nn.init.normal_(layer.weight, std=0.02, generator=generator)
        for layer in (*(block.modulation for block in self._blocks), self.head_modulation, self.head):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Predicted noise and position of the variance, (..., 2 Z) float32.

        Given noisy residuals over `DATA_SCALE` (..., Z), timesteps in [0, 1000) (...), and conditions (..., C).
        """
        return self._predict(x, self.time_embed(t), self.cond_embed(z))

    def _predict(self, x: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        activated = F.silu(time + cond)
        h = self.word_embed(x)
        for block in self._blocks:
            h = block(h, activated)
        shift, scale = self.head_modulation(activated).chunk(2, dim=-1)
        normed = F.layer_norm(h, h.shape[-1:], eps=EPS)
        return self.head(torch.addcmul(shift, normed, 1 + scale)).float()

    def loss(self, z_BlC: Tensor, residual_BlZ: Tensor, draws: TrainingDraws) -> DiffusionLoss:
        """Losses of all rows of `draws`; their mean is the training loss.

        Args:
            z_BlC: conditions; the gradient goes on into them.
            residual_BlZ: what the codes of the last scale leave over; no gradient is taken through it.
            draws: for the tokens, repeated.
        """
        repeats = len(draws.t) // residual_BlZ.shape[:2].numel()
        x0 = (residual_BlZ.detach().float() / DATA_SCALE).flatten(0, 1).repeat(repeats, 1)
        cond = self.cond_embed(z_BlC).flatten(0, 1).repeat(repeats, 1)
        x = chain().noised(x0, draws.t, draws.noise)
        output = self._predict(x, self.time_embed(draws.t), cond)
        return chain().loss(output, x0, x, draws.t, draws.noise)

    def sample(
        self,
        z: Tensor,
        noise: Noise,
        negative: Tensor | None = None,
        guidance: float = 0.0,
        num_steps: int = NUM_SAMPLING_STEPS,
        temperature: float = 1.0,
    ) -> Refined:
        """Residuals drawn for these conditions; call `Refined.check` for them.

        Args:
            z: conditions (..., C), usually (B, l, C).
            noise: asked for the shape (..., Z): once for the start and once for each step but the last.
            negative: conditions to be led away from; the same shape.
            guidance: w of eps = (1 + w) eps(z) - w eps(negative). 0 is without guidance, and so is 1, as released.
            num_steps: n, 1 to 1000.
            temperature: factor of the steps' noise.
        Raises:
            UserError: another number of steps.
        """
        steps = chain(num_steps)
        if guidance in UNGUIDED:
            negative = None
        cond = self.cond_embed(torch.stack([z, negative] if negative is not None else [z]))
        times = self.time_embed(_timesteps(num_steps, z.device))
        shape = (*z.shape[:-1], self.channels)
        x, is_finite = noise(0, shape), []
        for draw, i in enumerate(reversed(range(num_steps)), start=1):
            output = self._predict(x.expand(len(cond), *shape), times[i], cond)
            is_finite.append(output.isfinite().all())
            output = output[0] if negative is None else guided(output[0], output[1], guidance)
            x = steps.step(output, x, i, noise(draw, shape) if i > 0 else None, temperature)
        return Refined(x * DATA_SCALE, torch.stack(is_finite))


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept must serve training too
def _timesteps(num_steps: int, device: torch.device) -> Tensor:
    """Those of a chain, on the device for good: a CUDA graph cannot copy them there."""
    return chain(num_steps).timesteps.to(device)


def guided(positive: Tensor, negative: Tensor, guidance: float) -> Tensor:
    """The noise is guided, the variance is the positive one's."""
    (eps, position), (unwanted, _) = positive.chunk(2, dim=-1), negative.chunk(2, dim=-1)
    return torch.cat([(1 + guidance) * eps - guidance * unwanted, position], dim=-1)
