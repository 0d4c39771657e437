"""From logits over a codebook to codes: top-k, then top-p, then a draw or the likeliest.

Shapes: `...` tokens, `V` codes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Logits (..., V) below the k-th largest become -inf; those equal to it stay. 0 keeps all."""
    if not 0 < top_k < logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], float("-inf"))


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """The unlikeliest codes (..., V) that have at most 1 - p together become -inf, but never the likeliest.

    Args:
        logits: may hold -inf.
        top_p: p; outside (0, 1) all are kept.
    """
    if not 0.0 < top_p < 1.0:
        return logits
    rising, order = logits.sort(dim=-1)
    is_dropped = rising.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    is_dropped[..., -1] = False
    return logits.masked_fill(torch.empty_like(is_dropped).scatter_(-1, order, is_dropped), float("-inf"))


def select_codes(logits: Tensor, uniform: Tensor | None = None, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Code of each token, (...) int64: a draw from the filtered logits, or the likeliest (of equal ones the first).

    Args:
        logits: (..., V), float32.
        uniform: one number in [0, 1) a token, (...); None takes the likeliest.
        top_k: see `keep_top_k`; 1 takes the likeliest.
        top_p: see `keep_top_p`.
    """
    if uniform is None or top_k == 1:
        return logits.argmax(dim=-1)
    logits = keep_top_p(keep_top_k(logits, top_k), top_p)
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, uniform[..., None] * cumulative[..., -1:], right=True)
    drawn = drawn.clamp(max=logits.shape[-1] - 1)
    # one draw in millions meets the rounding of the sums and points at a dropped code
    is_kept = logits.gather(-1, drawn) > float("-inf")
    return torch.where(is_kept[..., 0], drawn[..., 0], logits.argmax(dim=-1))
