"""Self attention with normalised queries and keys, cross attention to text, and the key-value cache (spec B).

Shapes: `B` batch, `L` tokens, `T` text tokens, `C` width, `N` heads, `D` head dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from varestorer.transformer.layout import TokenLayout
from varestorer.transformer.rope import rotate

MAX_LOG_SCALE = math.log(100.0)


class LayerCache:
    """Keys and values of one layer for all tokens seen so far, in memory allocated once.

    Args:
        num_tokens: tokens of a whole generation.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, k_BNLD: Tensor, v_BNLD: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys (normalised and rotated) and values; return those of all tokens so far."""
        if self.keys is None or self.values is None:
            shape = (*k_BNLD.shape[:2], self.num_tokens, k_BNLD.shape[3])
            self.keys, self.values = k_BNLD.new_empty(shape), v_BNLD.new_empty(shape)
        end = self.length + k_BNLD.shape[2]
        self.keys[:, :, self.length : end] = k_BNLD
        self.values[:, :, self.length : end] = v_BNLD
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class SelfAttention(nn.Module):
    """Attention on L2-normalised queries and keys with a learned scale per head, rotary positions after it."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0)))
        self.proj = nn.Linear(width, width)

    def forward(
        self, x_BLC: Tensor, layout: TokenLayout, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = self.qkv(x_BLC) + bias
        q, k, v = rearrange(qkv, "b l (three n d) -> three b n l d", three=3, n=self.num_heads)
        q = F.normalize(q.float(), dim=-1) * self.log_scale.float().clamp(max=MAX_LOG_SCALE).exp()
        k = F.normalize(k.float(), dim=-1)
        q = rotate(q, layout.cos_LD, layout.sin_LD).to(v.dtype)
        k = rotate(k, layout.cos_LD, layout.sin_LD).to(v.dtype)
        if cache is not None:
            k, v = cache.append(k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return self.proj(rearrange(out, "b n l d -> b l (n d)"))


class CrossAttention(nn.Module):
    """Image tokens look at the text; no normalisation, no positions.

    Attributes:
        use_v_bias: whether the value bias is added now; switched by `adapters.use_adapters`.
        adapted_v_bias: whether it is added while adapters are on; the released student leaves it out (spec C).
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.use_v_bias = True
        self.adapted_v_bias = True
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x_BLC: Tensor, memory_BTC: Tensor, key_mask: Tensor | None) -> Tensor:
        q = rearrange(self.q(x_BLC), "b l (n d) -> b n l d", n=self.num_heads)
        k, v = self.kv(memory_BTC).chunk(2, dim=-1)
        if self.use_v_bias:
            v = v + self.v_bias
        k = rearrange(k, "b t (n d) -> b n t d", n=self.num_heads)
        v = rearrange(v, "b t (n d) -> b n t d", n=self.num_heads)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=key_mask)
        return self.proj(rearrange(out, "b n l d -> b l (n d)"))
