"""Attention with maps, defined: plain torch, any device and dtype, differentiable everywhere.

Everything is materialised, so use it to check and not to work. Shapes: `q` (B, H, Q, d), `k`
(B, H, K, d), `v` (B, H, K, e); `mask` boolean, true where a query may look, or added to the
scores, broadcastable to (B, H, Q, K).
"""

from __future__ import annotations

import torch
from torch import Tensor


def scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return the logits (B, H, Q, K), -inf where masked."""
    logits = q @ k.transpose(-1, -2) * scale
    if mask is None:
        return logits
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, -torch.inf)
    return logits + mask


def log_sum_exp(logits: Tensor) -> Tensor:
    """Return the logarithm of each row's sum (B, H, Q), -inf where every key is masked."""
    if logits.shape[-1] == 0:
        return logits.new_full(logits.shape[:-1], -torch.inf)
    return torch.logsumexp(logits, -1)


def probabilities(logits: Tensor, everywhere: bool = False) -> Tensor:
    """Return the softmax over keys, in which rows that may look nowhere are zero.

    With `everywhere` there is no such row: nothing was masked.
    """
    if everywhere and logits.shape[-1]:
        return logits.softmax(-1)
    nowhere = (logits == -torch.inf).all(-1, keepdim=True)
    return logits.masked_fill(nowhere, 0.0).softmax(-1).masked_fill(nowhere, 0.0)


def without_columns(logits: Tensor, drop_columns: Tensor) -> Tensor:
    """Mask, for each query, the keys in `drop_columns` (B, H, Q, n); negative ones count for none.

    `drop_columns` is broadcastable in all but its last dimension.
    """
    dropped = torch.zeros_like(logits, dtype=torch.bool)
    columns = drop_columns.expand(*logits.shape[:-1], -1)
    for column in columns.unbind(-1):
        hit = torch.arange(logits.shape[-1], device=logits.device) == column[..., None]
        dropped |= hit
    return logits.masked_fill(dropped, -torch.inf)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    drop_columns: Tensor | None,
    scale: float,
) -> Tensor:
    """Return softmax(q k^T scale + mask) v, (B, H, Q, e)."""
    logits = scores(q, k, mask, scale)
    if drop_columns is not None:
        logits = without_columns(logits, drop_columns)
    return probabilities(logits) @ v


def attention_with_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    columns: Tensor,
    weights: Tensor | None,
    scale: float,
    reduce_heads: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (B, H, Q, e), the maps and the log-sum-exp (B, H, Q).

    Maps are the probabilities of the keys `columns` (B, C), summed to groups by `weights` (C, G),
    if any, and over heads: (B, Q, C or G), or with heads kept (B, H, Q, C or G).
    """
    logits = scores(q, k, mask, scale)
    p = probabilities(logits, everywhere=mask is None)
    index = columns[:, None, None].expand(*p.shape[:-1], -1)
    maps = p.gather(-1, index)
    if weights is not None:
        maps = maps @ weights
    if reduce_heads == "mean":
        maps = maps.mean(1)
    elif reduce_heads == "sum":
        maps = maps.sum(1)
    return p @ v, maps, log_sum_exp(logits)
