"""What the transformer predicts of a token: its bits, or its entry of a codebook.

A head is the last linear layer and all that follows from what a symbol is: selection, entropy, losses, gradients.

Shapes: `B` batch, `L` tokens (`l` of one scale), `Z` bits per token, `V` vocabulary. Tokens are bits (B, L, Z) or
entries (B, L). Logits are (B, L, Z, 2), which end in the pair [bit is 0, bit is 1], or (B, L, V).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from varestorer.utils.seeds import uniform_per_sample
from varestorer.utils.watch import watch

# Noise, uniform in [0, 1) where tokens are drawn: (number of the scale or of the draw, shape) -> tensor.
Noise = Callable[[int, tuple[int, ...]], Tensor]


def keyed_noise(
    seed: int,
    keys: Sequence[int] | Tensor,
    stream: str,
    device: torch.device | str,
    per_sample: Callable[..., Tensor] = uniform_per_sample,
) -> Noise:
    """Noise in which sample b depends on (seed, stream, keys[b], number) alone, whatever stands beside it."""

    def noise(number: int, shape: tuple[int, ...]) -> Tensor:
        return per_sample(tuple(shape[1:]), seed, keys, f"{stream}/{number}", device)

    return noise


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel noise of uniform noise, with the released student's guards against log 0."""
    return -torch.log(-torch.log(uniform + 1e-20) + 1e-20)


class Head(nn.Linear, ABC):
    """Last layer of the transformer, with the meaning of its outputs."""

    @abstractmethod
    def symbol_shape(self) -> tuple[int, ...]:
        """Shape of one token's logits, and of the noise of `straight_through`."""

    @abstractmethod
    def draw_shape(self) -> tuple[int, ...]:
        """Shape of the noise that `select` draws one token with."""

    @abstractmethod
    def logits(self, x_BLC: Tensor) -> Tensor:
        """Logits of normalized tokens."""

    @abstractmethod
    def select(self, logits: Tensor, uniform: Tensor | None = None, top_k: int = 0, top_p: float = 0.0) -> Tensor:
        """Tokens: a sample, or the likeliest symbols.

        Args:
            logits: temperature already applied.
            uniform: noise in [0, 1), of `draw_shape` for each token; None takes the likeliest.
            top_k: leaves the k likeliest symbols; 1 takes the likeliest; 0 is off.
            top_p: leaves the smallest set of symbols whose probability exceeds it; 0 is off.
        """

    @abstractmethod
    def entropy(self, logits: Tensor) -> Tensor:
        """Entropy of each token from 0 (decided) to 1 (any symbol is as likely), (B, L)."""

    @abstractmethod
    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of each token in nats, mean over its bits where it has several: (B, L)."""

    @abstractmethod
    def accuracy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Share of each token's symbols whose likeliest value is the right one, (B, L)."""

    @abstractmethod
    def kl(self, p_logits: Tensor, q_logits: Tensor) -> Tensor:
        """KL(p || q) of every symbol in nats: (B, L, Z) or (B, L, 1)."""

    @abstractmethod
    def straight_through(self, logits: Tensor, uniform: Tensor | None, tau: float) -> Tensor:
        """Hard symbols as floats, with the gradient of the Gumbel-softmax at temperature tau.

        Returns:
            bits (B, L, Z), or one-hot entries (B, L, V).
        """

    @abstractmethod
    def leaning(self, labels: Tensor, margin: float) -> Tensor:
        """Logits that lean to these tokens by a margin; added to others, they make a prior of the tokens."""


class BitHead(Head):
    """Each token is Z independent bits (Infinity, section 3.3: infinite-vocabulary classifier)."""

    def __init__(self, width: int, num_bits: int) -> None:
        super().__init__(width, 2 * num_bits)
        self.num_bits = num_bits

    def symbol_shape(self) -> tuple[int, ...]:
        return (self.num_bits, 2)

    def draw_shape(self) -> tuple[int, ...]:
        return (self.num_bits, 2)

    def logits(self, x_BLC: Tensor) -> Tensor:
        return rearrange(self(x_BLC), "b l (z two) -> b l z two", two=2)

    @watch("select")
    def select(self, logits: Tensor, uniform: Tensor | None = None, top_k: int = 0, top_p: float = 0.0) -> Tensor:
        if uniform is not None and top_k != 1:  # of two choices, more than one is all
            logits = _drop_unlikely_bit(logits, top_p) + gumbel(uniform)
        return logits[..., 1] > logits[..., 0]

    def entropy(self, logits: Tensor) -> Tensor:
        log_p = logits.float().log_softmax(dim=-1)
        entropy = -(log_p.exp() * log_p).sum(dim=-1) / math.log(2)
        return entropy.mean(dim=-1)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits.float()
        # -log p(bit) = softplus(wrong - right)
        margin = (logits[..., 1] - logits[..., 0]) * (labels.float() * 2 - 1)
        return F.softplus(-margin).mean(dim=-1)

    def accuracy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (self.select(logits) == labels.bool()).float().mean(dim=-1)

    def kl(self, p_logits: Tensor, q_logits: Tensor) -> Tensor:
        # With the margins m = logit of 1 - logit of 0 and p_1 = sigmoid(m_p), log p_0 = -softplus(m_p) and
        # log p_1 = m_p + log p_0, so KL = p_1 (m_p - m_q) + softplus(m_q) - softplus(m_p): half the numbers of two
        # log-softmaxes.
        p_margin, q_margin = p_logits[..., 1] - p_logits[..., 0], q_logits[..., 1] - q_logits[..., 0]
        return torch.sigmoid(p_margin) * (p_margin - q_margin) + F.softplus(q_margin) - F.softplus(p_margin)

    def straight_through(self, logits: Tensor, uniform: Tensor | None, tau: float) -> Tensor:
        noisy = logits if uniform is None else logits + gumbel(uniform)
        soft = F.softmax(noisy / tau, dim=-1)[..., 1]
        hard = (noisy[..., 1] > noisy[..., 0]).to(soft.dtype)
        return hard + soft - soft.detach()

    def leaning(self, labels: Tensor, margin: float) -> Tensor:
        halves_BLZ = (labels.float() - 0.5) * margin
        return torch.stack([-halves_BLZ, halves_BLZ], dim=-1)


class CodeHead(Head):
    """Each token is one entry of a codebook (VAR, section 3.2)."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__(width, vocabulary)
        self.vocabulary = vocabulary

    def symbol_shape(self) -> tuple[int, ...]:
        return (self.vocabulary,)

    def draw_shape(self) -> tuple[int, ...]:
        return ()

    def logits(self, x_BLC: Tensor) -> Tensor:
        return self(x_BLC)

    @watch("select")
    def select(self, logits: Tensor, uniform: Tensor | None = None, top_k: int = 0, top_p: float = 0.0) -> Tensor:
        if uniform is None or top_k == 1:
            return logits.argmax(dim=-1)
        logits = keep_top_p(keep_top_k(logits, top_k), top_p)
        cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
        drawn = torch.searchsorted(cumulative, uniform[..., None] * cumulative[..., -1:], right=True)
        drawn = drawn.clamp(max=logits.shape[-1] - 1)
        # one draw in millions meets the rounding of the sums and points at a dropped code
        is_kept = logits.gather(-1, drawn) > float("-inf")
        return torch.where(is_kept[..., 0], drawn[..., 0], logits.argmax(dim=-1))

    def entropy(self, logits: Tensor) -> Tensor:
        log_p = logits.float().log_softmax(dim=-1)
        return -(log_p.exp() * log_p).sum(dim=-1) / math.log(self.vocabulary)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)

    def accuracy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (self.select(logits) == labels).float()

    def kl(self, p_logits: Tensor, q_logits: Tensor) -> Tensor:
        p, q = p_logits.log_softmax(dim=-1), q_logits.log_softmax(dim=-1)
        return (p.exp() * (p - q)).sum(dim=-1, keepdim=True)

    def straight_through(self, logits: Tensor, uniform: Tensor | None, tau: float) -> Tensor:
        noisy = logits if uniform is None else logits + gumbel(uniform)
        soft = F.softmax(noisy / tau, dim=-1)
        hard = F.one_hot(noisy.argmax(dim=-1), self.vocabulary).to(soft.dtype)
        return hard + soft - soft.detach()

    def leaning(self, labels: Tensor, margin: float) -> Tensor:
        return F.one_hot(labels, self.vocabulary) * margin


def _drop_unlikely_bit(logits_BlZ2: Tensor, top_p: float) -> Tensor:
    """Nucleus filter of a two-way choice: the less likely bit goes when its probability is at most 1 - top_p."""
    if not 0.0 < top_p < 1.0:
        return logits_BlZ2
    probability = logits_BlZ2.softmax(dim=-1)
    dropped = (probability <= 1 - top_p) & (probability < probability.amax(dim=-1, keepdim=True))
    return logits_BlZ2.masked_fill(dropped, float("-inf"))


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Logits (..., V) below the k-th largest become -inf; those equal to it stay. 0 keeps all."""
    if not 0 < top_k < logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], float("-inf"))


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """The unlikeliest codes (..., V) that have at most 1 - p together become -inf, but never the likeliest.

    Logits may hold -inf; for p outside (0, 1) all are kept.
    """
    if not 0.0 < top_p < 1.0:
        return logits
    rising, order = logits.sort(dim=-1)
    is_dropped = rising.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    is_dropped[..., -1] = False
    return logits.masked_fill(torch.empty_like(is_dropped).scatter_(-1, order, is_dropped), float("-inf"))
