"""From logits to bits.

Shapes: `B` batch, `l` tokens, `Z` bits per token; logits end in the pair [bit is 0, bit is 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from varestorer.tokenizer.schedule import Scale
from varestorer.utils.seeds import uniform_per_sample

# Uniform noise in [0, 1) for the logits of a scale: (scale number, shape) -> tensor.
Noise = Callable[[int, tuple[int, ...]], Tensor]


def keyed_noise(seed: int, keys: Sequence[int] | Tensor, stream: str, device: torch.device | str) -> Noise:
    """Noise in which sample b depends on (seed, stream, keys[b], scale) alone, whatever stands beside it."""

    def noise(scale_number: int, shape: tuple[int, ...]) -> Tensor:
        return uniform_per_sample(tuple(shape[1:]), seed, keys, f"{stream}/{scale_number}", device)

    return noise


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel noise of uniform noise, with the released student's guards against log 0."""
    return -torch.log(-torch.log(uniform + 1e-20) + 1e-20)


def drop_unlikely(logits_BlZ2: Tensor, top_p: float) -> Tensor:
    """Nucleus filter of a two-way choice: the less likely bit goes when its probability is at most 1 - top_p."""
    if not 0.0 < top_p < 1.0:
        return logits_BlZ2
    probability = logits_BlZ2.softmax(dim=-1)
    dropped = (probability <= 1 - top_p) & (probability < probability.amax(dim=-1, keepdim=True))
    return logits_BlZ2.masked_fill(dropped, float("-inf"))


def select_bits(logits_BlZ2: Tensor, uniform: Tensor | None = None, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Bits (B, l, Z) bool: a sample by the Gumbel-max rule, or the likelier bit.

    Args:
        logits_BlZ2: temperature already applied.
        uniform: noise of the logits' shape; None takes the likelier bit.
        top_k: 1 takes the likelier bit; 0 or more than 1 changes nothing, as there are two choices.
        top_p: see `drop_unlikely`; 0 is off.
    """
    if uniform is not None and top_k != 1:
        logits_BlZ2 = drop_unlikely(logits_BlZ2, top_p) + gumbel(uniform)
    return logits_BlZ2[..., 1] > logits_BlZ2[..., 0]


def straight_through_bits(logits_BLZ2: Tensor, uniform: Tensor | None, tau: float) -> Tensor:
    """Hard bits (B, L, Z) in {0, 1}, float, with the gradient of the Gumbel-softmax at temperature tau."""
    noisy = logits_BLZ2 if uniform is None else logits_BLZ2 + gumbel(uniform)
    soft = F.softmax(noisy / tau, dim=-1)[..., 1]
    hard = (noisy[..., 1] > noisy[..., 0]).to(soft.dtype)
    return hard + soft - soft.detach()


def bits_to_map(bits_BlZ: Tensor, scale: Scale) -> Tensor:
    """Bits of one scale's tokens as a map (B, Z, h, w)."""
    return rearrange(bits_BlZ, "b (h w) z -> b z h w", h=scale[0], w=scale[1])


def bit_entropy(logits_BLZ2: Tensor) -> Tensor:
    """Mean entropy of each token's bits, in bits (0 decided, 1 a coin toss): (B, L)."""
    log_p = logits_BLZ2.float().log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1) / math.log(2)
    return entropy.mean(dim=-1)
