"""One block: modulated self attention, cross attention where there is text, modulated feed-forward (VAR, Infinity).

Self attention has normalized queries and keys, and rotary positions after that; its keys and values can be cached.

Shapes: `B` batch, `L` tokens, `T` text tokens, `C` width, `N` heads, `D` head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from varestorer.transformer.conditions import Context, distinct_rows
from varestorer.transformer.layout import BlockCausal, TokenLayout
from varestorer.utils.device import has_amx, has_bf16_products

MAX_LOG_SCALE = math.log(100.0)
SHORTEST = 1e-12
"""Queries and keys shorter than this are not made longer (normalization)."""
MOST_PRODUCTS = 2**20
"""Scores of one head, L x L_keys, up to which plain products may train: the backward pass keeps them all."""
QUERIES_AT_ONCE = 256
"""Of plain products: more scores at a time leave the processor's cache (at 3,545 tokens and 12 heads 1.4 times the
kernel's speed with 256 queries, 0.75 with 1,024)."""
PRODUCTS_ARE_FASTER = has_bf16_products() and not has_amx()
"""In bfloat16, on this processor: see `prefers_products`."""

ALL = slice(None)
"""All tokens of a sequence."""
EPS = 1e-6


def attend(
    q_BNLD: Tensor,
    k_BNLD: Tensor,
    v_BNLD: Tensor,
    mask: Tensor | BlockCausal | None,
    scale: float | None = None,
    asked: slice = ALL,
) -> Tensor:
    """Scaled dot product attention by torch's fused kernels, or by plain products where these are faster.

    Args:
        q_BNLD: queries of all tokens.
        k_BNLD: keys.
        v_BNLD: values.
        mask: bool, True where a query sees a key, in a form that broadcasts to (B, N, L, L_keys); None: all see all.
        scale: of the products; None for 1 / sqrt(D).
        asked: consecutive tokens whose result is wanted.
    Returns:
        (B, L, N * D) of the tokens asked, heads side by side.
    """
    if isinstance(mask, BlockCausal):
        calls = mask.calls(asked, k_BNLD.shape[2])
        parts = [attend(q_BNLD[:, :, q], k_BNLD[:, :, :k], v_BNLD[:, :, :k], part, scale) for q, k, part in calls]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    q_BNLD = q_BNLD[:, :, asked]
    if mask is not None:
        mask = mask[..., asked, :]
    fused = F.scaled_dot_product_attention
    out = (_by_products if prefers_products(q_BNLD, k_BNLD) else fused)(
        q_BNLD, k_BNLD, v_BNLD, attn_mask=mask, scale=scale
    )
    return rearrange(out, "b n l d -> b l (n d)")


def prefers_products(q_BNLD: Tensor, k_BNLD: Tensor) -> bool:
    """Whether plain products are faster than torch's fused kernel: in bfloat16 with AVX512_BF16 alone, without AMX.

    There the kernel's own products are slow, those of oneDNN are not: 2.0 times the speed forward and 2.7 times with
    the backward pass, at 8 x 3 heads, 485 tokens of 64 channels, on an AMD EPYC. The scores are rounded to bfloat16.
    """
    is_small = q_BNLD.shape[2] * k_BNLD.shape[2] <= MOST_PRODUCTS
    fits = is_small or not torch.is_grad_enabled()
    return PRODUCTS_ARE_FASTER and fits and q_BNLD.device.type == "cpu" and q_BNLD.dtype == torch.bfloat16


def _by_products(
    q_BNLD: Tensor, k_BNLD: Tensor, v_BNLD: Tensor, attn_mask: Tensor | None, scale: float | None
) -> Tensor:
    factor = q_BNLD.shape[-1] ** -0.5 if scale is None else scale
    parts = []
    for start in range(0, q_BNLD.shape[2], QUERIES_AT_ONCE):
        rows = slice(start, start + QUERIES_AT_ONCE)
        scores = (q_BNLD[:, :, rows] * factor) @ k_BNLD.transpose(-1, -2)
        if attn_mask is not None:
            seen = attn_mask if attn_mask.shape[-2] == 1 else attn_mask[..., rows, :]
            scores = scores.masked_fill(~seen, -math.inf)
        parts.append(torch.softmax(scores, dim=-1) @ v_BNLD)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class LayerCache:
    """Keys and values of one layer for all tokens seen so far, in memory allocated once for a whole generation."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, k_BNLD: Tensor, v_BNLD: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys (normalized and rotated) and values; return those of all tokens so far."""
        if self.keys is None or self.values is None:
            shape = (*k_BNLD.shape[:2], self.num_tokens, k_BNLD.shape[3])
            self.keys, self.values = k_BNLD.new_empty(shape), v_BNLD.new_empty(shape)
        end = self.length + k_BNLD.shape[2]
        self.keys[:, :, self.length : end] = k_BNLD
        self.values[:, :, self.length : end] = v_BNLD
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


@dataclass(frozen=True)
class SelfConstants:
    """What self attention makes of its own vectors.

    Attributes:
        bias_3C: of queries, keys (zero) and values.
        scales_N1: factors of the normalized queries (the learned one of each head), then of the keys (1): 2 N rows,
            float32.
    """

    bias_3C: Tensor
    scales_N1: Tensor


@dataclass(frozen=True)
class CrossMemory:
    """What cross attention makes of the text.

    Attributes:
        keys_BNTD: one row, or one for each sample.
        values_BNTD: likewise.
        key_mask: (B, 1, 1, T) bool or None, see `TextFeatures.key_mask`.
    """

    keys_BNTD: Tensor
    values_BNTD: Tensor
    key_mask: Tensor | None


class SelfAttention(nn.Module):
    """Attention on L2-normalized queries and keys with a learned scale per head, rotary positions after it."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0)))
        self.proj = nn.Linear(width, width)

    def constants(self) -> SelfConstants:
        """What does not depend on the tokens."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        scale = self.log_scale.float().clamp(max=MAX_LOG_SCALE).exp().view(-1, 1)
        return SelfConstants(bias, torch.cat([scale, torch.ones_like(scale)]))

    def forward(
        self,
        x_BLC: Tensor,
        constants: SelfConstants,
        layout: TokenLayout,
        mask: Tensor | BlockCausal | None = None,
        cache: LayerCache | None = None,
        asked: slice = ALL,
    ) -> Tensor:
        """What each of the tokens asked takes from those it sees."""
        num_turned = 2 * self.num_heads  # queries and keys, side by side
        heads = rearrange(self._qkv(x_BLC, constants.bias_3C), "b l (n d) -> b l n d", n=3 * self.num_heads)
        turned = heads[:, :, :num_turned].float()
        length = torch.linalg.vector_norm(turned, dim=-1, keepdim=True).clamp(min=SHORTEST)
        turned = layout.rotate(turned * (constants.scales_N1 / length)).to(heads.dtype)
        q, k = turned.transpose(1, 2).chunk(2, dim=1)
        v = heads[:, :, num_turned:].transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.proj(attend(q, k, v, mask, 1.0, asked))

    def _qkv(self, x_BLC: Tensor, bias_3C: Tensor) -> Tensor:
        """Queries, keys and values; the bias is a part of the product where the layer is a plain one."""
        if type(self.qkv) is nn.Linear:
            return F.linear(x_BLC, self.qkv.weight, bias_3C)
        qkv = self.qkv(x_BLC)
        return qkv + bias_3C.to(qkv.dtype)


class CrossAttention(nn.Module):
    """Image tokens look at the text; no normalization, no positions.

    Attributes:
        use_v_bias: whether the value bias is added now; switched by `adapters.use_adapters`.
        adapted_v_bias: whether it is added while adapters are on; the released student leaves it out.
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

    def memory(self, memory_BTC: Tensor, key_mask: Tensor | None) -> CrossMemory:
        """Keys and values of the text."""
        k, v = self.kv(memory_BTC).chunk(2, dim=-1)
        if self.use_v_bias:
            v = (v + self.v_bias).to(k.dtype)
        k, v = (rearrange(x, "b t (n d) -> b n t d", n=self.num_heads) for x in (k, v))
        return CrossMemory(k, v, key_mask)

    def forward(self, x_BLC: Tensor, memory: CrossMemory) -> Tensor:
        q = rearrange(self.q(x_BLC), "b l (n d) -> b n l d", n=self.num_heads)
        k, v = (x.expand(q.shape[0], -1, -1, -1) for x in (memory.keys_BNTD, memory.values_BNTD))
        return self.proj(attend(q.to(v.dtype), k, v, memory.key_mask))


@dataclass(frozen=True)
class BlockContext:
    """What a block makes of the condition and of its own vectors: all that does not depend on the tokens.

    Attributes:
        gammas_B1C: factors of self attention and of the feed-forward; here and below one row, or one for each sample.
        gains_B1C: 1 + scale of the adaptive norms before both.
        shifts_B1C: of these norms.
        self_constants: of self attention.
        memory: of cross attention; None without.
    """

    gammas_B1C: tuple[Tensor, Tensor]
    gains_B1C: tuple[Tensor, Tensor]
    shifts_B1C: tuple[Tensor, Tensor]
    self_constants: SelfConstants
    memory: CrossMemory | None


def modulate(x_BLC: Tensor, gain_B1C: Tensor, shift_B1C: Tensor) -> Tensor:
    """Layer norm without weights of its own, then times gain = 1 + scale, plus shift (AdaLN), all float32."""
    if len(gain_B1C) == 1:  # one condition for all: a layer norm with weights, in one pass
        return F.layer_norm(x_BLC, x_BLC.shape[-1:], gain_B1C.flatten(), shift_B1C.flatten(), EPS)
    return torch.addcmul(shift_B1C, F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=EPS), gain_B1C)


def add_branch(x_BLC: Tensor, branch_BLC: Tensor, gamma_B1C: Tensor | None, factor_B: Tensor | None) -> Tensor:
    """x + gamma * branch, and the branch of each sample times its factor; None for 1."""
    if factor_B is not None:
        branch_BLC = branch_BLC * factor_B[:, None, None]
    return x_BLC + branch_BLC if gamma_B1C is None else torch.addcmul(x_BLC, gamma_B1C, branch_BLC)


def ffn_width(width: int) -> int:
    """Four times the width, rounded to a multiple of 256 (halves to even), at least 256."""
    return max(1, round(4 * width / 256)) * 256


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BLC), approximate="tanh"))


class Float32LayerNorm(nn.LayerNorm):
    """Layer norm in float32, whatever precision its weights are kept in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class Block(nn.Module):
    """A transformer block.

    Args:
        width: C.
        num_heads: of self and cross attention.
        hidden: width of the feed-forward's hidden layer.
        has_text: cross attention to text, and a modulation that is a learned part plus one shared by all blocks
            (Infinity). Else there is none, and each block makes its modulation of the condition itself (VAR).
    """

    def __init__(self, width: int, num_heads: int, hidden: int, has_text: bool) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(1, 1, 6, width)) if has_text else nn.Linear(width, 6 * width)
        self.self_attention = SelfAttention(width, num_heads)
        self.cross_norm = Float32LayerNorm(width, eps=EPS) if has_text else None
        self.cross_attention = CrossAttention(width, num_heads) if has_text else None
        self.ffn = FeedForward(width, hidden)

    def prepare(self, context: Context) -> BlockContext:
        """What does not depend on the tokens."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self._modulation(context).float().unbind(dim=2)
        memory = None
        if self.cross_attention is not None and context.memory_BTC is not None:
            memory = self.cross_attention.memory(context.memory_BTC, context.key_mask)
        constants = self.self_attention.constants()
        return BlockContext((gamma1, gamma2), (1 + scale1, 1 + scale2), (shift1, shift2), constants, memory)

    def _modulation(self, context: Context) -> Tensor:
        """(B, 1, 6, C): gamma, gamma, scale, scale, shift, shift."""
        if isinstance(self.modulation, nn.Linear):
            own = self.modulation(F.silu(distinct_rows(context.cond_BC)))
            return rearrange(own, "b (six c) -> b 1 six c", six=6)
        if context.modulation_B6C is None:
            raise TypeError("blocks with a shared modulation need the context of a text")
        return self.modulation + context.modulation_B6C

    def forward(
        self,
        x_BLC: Tensor,
        context: Context | BlockContext,
        layout: TokenLayout,
        mask: Tensor | BlockCausal | None = None,
        cache: LayerCache | None = None,
        factors_B3: Tensor | None = None,
        asked: slice = ALL,
    ) -> Tensor:
        """Tokens after the block.

        Args:
            x_BLC: tokens before it.
            context: of the condition; prepared, if more than one pass is to use it.
            layout: level and position of each token.
            mask: see `VARTransformer.forward`.
            cache: keys and values of self attention.
            factors_B3: of its branches (self attention, cross attention, feed-forward), see `drop_path`; None leaves
                them.
            asked: tokens that go on; the others are only seen by them.
        """
        prepared = context if isinstance(context, BlockContext) else self.prepare(context)
        factors = (None,) * 3 if factors_B3 is None else factors_B3.unbind(dim=1)
        gamma, gain, shift = prepared.gammas_B1C, prepared.gains_B1C, prepared.shifts_B1C
        normed = modulate(x_BLC, gain[0], shift[0])
        branch = self.self_attention(normed, prepared.self_constants, layout, mask, cache, asked)
        x_BLC = add_branch(x_BLC[:, asked], branch, gamma[0], factors[0])
        if self.cross_attention is not None and self.cross_norm is not None:
            branch = self.cross_attention(self.cross_norm(x_BLC), prepared.memory)
            x_BLC = add_branch(x_BLC, branch, None, factors[1])
        return add_branch(x_BLC, self.ffn(modulate(x_BLC, gain[1], shift[1])), gamma[1], factors[2])
