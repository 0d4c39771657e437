"""What the transformer is conditioned on: text (Infinity), or one learned vector per class (VAR, VARSR, H-VAR).

A condition brings the start token, the modulation of the blocks and of the head, and, where it is text, a memory for
cross attention. It depends on no image token, so it can be prepared once and used for many.

Shapes: `B` batch, `T` text tokens (padded), `E` width of the text encoder, `C` width, `N` heads, `D` head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def distinct_rows(x: Tensor) -> Tensor:
    """A batch, or its first row alone where that stands for all (an expanded tensor)."""
    return x[:1] if x.stride(0) == 0 else x


@dataclass(frozen=True)
class TextFeatures:
    """Outputs of a text encoder for a batch of prompts.

    Attributes:
        features_BTE: padded with zeros to the longest prompt.
        lengths: tokens of each prompt.
    """

    features_BTE: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def from_list(cls, features: list[Tensor]) -> TextFeatures:
        """Pad a list of (T_b, E) features into one batch."""
        return cls(nn.utils.rnn.pad_sequence(features, batch_first=True), tuple(len(f) for f in features))

    def __add__(self, other: TextFeatures) -> TextFeatures:
        """The prompts of this batch, then those of the other."""
        return TextFeatures.from_list([*self.to_list(), *other.to_list()])

    def to_list(self) -> list[Tensor]:
        """The features of each prompt without padding."""
        return [f[:length] for f, length in zip(self.features_BTE, self.lengths, strict=True)]

    def key_mask(self) -> Tensor | None:
        """(B, 1, 1, T) bool, True at real tokens; None where nothing is padded."""
        num_tokens = self.features_BTE.shape[1]
        if all(length == num_tokens for length in self.lengths):
            return None
        lengths = torch.tensor(self.lengths).to(self.features_BTE.device, non_blocking=True)
        return (torch.arange(num_tokens, device=lengths.device) < lengths[:, None])[:, None, None]


@dataclass(frozen=True)
class ClassLabels:
    """Classes (B,) int64: of images (class to image), or of their quality (VARSR)."""

    labels_B: Tensor

    def __add__(self, other: ClassLabels) -> ClassLabels:
        """The labels of this batch, then those of the other."""
        return ClassLabels(torch.cat([self.labels_B, other.labels_B]))


ConditionInput = TextFeatures | ClassLabels


@dataclass(frozen=True)
class Context:
    """What the transformer needs of a condition; computed once per prompt or class.

    Attributes:
        cond_BC: pooled text or class embedding: the start token and the condition of the adaptive norms.
        modulation_B6C: shared part of the blocks' (gamma, gamma, scale, scale, shift, shift), (B, 1, 6, C); None where
            each block makes its own of `cond_BC`. Here and below one row for all where all prompts are one.
        memory_BTC: keys and values of cross attention are made from it; None without cross attention.
        key_mask: (B, 1, 1, T) bool or None, see `TextFeatures.key_mask`.
    """

    cond_BC: Tensor
    modulation_B6C: Tensor | None = None
    memory_BTC: Tensor | None = None
    key_mask: Tensor | None = None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight


class AttentivePool(nn.Module):
    """One learned query over the text tokens of each prompt."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.num_heads = max(1, text_width // 128)
        if width % self.num_heads:
            raise ValueError(f"width {width} must be a multiple of text_width // 128 = {self.num_heads} heads")
        self.query = nn.Parameter(torch.zeros(1, self.num_heads, width // self.num_heads))
        self.kv = nn.Linear(text_width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, text_BTE: Tensor, key_mask: Tensor | None) -> Tensor:
        k, v = self.kv(text_BTE).chunk(2, dim=-1)
        k = rearrange(k, "b t (n d) -> b n t d", n=self.num_heads)
        v = rearrange(v + self.v_bias, "b t (n d) -> b n t d", n=self.num_heads)
        q = rearrange(self.query, "one n d -> one n 1 d").expand(k.shape[0], -1, -1, -1).to(k.dtype)
        pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
        return self.proj(rearrange(pooled, "b n 1 d -> b (n d)"))


class TextCondition(nn.Module):
    """Norm, pool, cross-attention memory and shared modulation; holds the learned null text.

    Args:
        text_width: E.
        text_length: rows of the null text, and most tokens of a prompt.
        width: C.
    """

    def __init__(self, text_width: int, text_length: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.null_features = nn.Parameter(torch.zeros(text_length, text_width))
        self.norm = RMSNorm(text_width)
        self.pool = AttentivePool(text_width, width)
        self.memory = nn.Sequential(nn.Linear(text_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def null(self, text: TextFeatures) -> TextFeatures:
        """The learned null text, as long as the prompts it stands for (rows from the first on)."""
        return TextFeatures.from_list([self.null_features[:length] for length in text.lengths])

    def null_batch(self, batch_size: int) -> TextFeatures:
        """The whole null text for a batch without prompts."""
        return TextFeatures(self.null_features.expand(batch_size, -1, -1), (len(self.null_features),) * batch_size)

    def forward(self, text: TextFeatures) -> Context:
        key_mask = text.key_mask()
        normed = self.norm(distinct_rows(text.features_BTE) if key_mask is None else text.features_BTE)
        cond_BC = self.pool(normed, key_mask)
        modulation = rearrange(self.modulation(F.silu(cond_BC)), "b (six c) -> b 1 six c", six=6)
        return Context(cond_BC.expand(len(text.lengths), -1), modulation, self.memory(normed), key_mask)


class ClassCondition(nn.Module):
    """One learned vector per class; the last one stands for no class, or for the negative quality.

    Args:
        num_classes: rows, the null class included. One row makes a single learned condition (H-VAR).
        width: C.
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        # drawing an embedding's weights on the meta device would import sympy and torch's compiler: seconds
        self.embedding = nn.Embedding.from_pretrained(torch.zeros(num_classes, width), freeze=False)

    def null(self, classes: ClassLabels) -> ClassLabels:
        """The last class for every sample."""
        return ClassLabels(torch.full_like(classes.labels_B, self.embedding.num_embeddings - 1))

    def forward(self, classes: ClassLabels) -> Context:
        return Context(self.embedding(classes.labels_B))
