"""Attention with maps on a CPU: torch's fused attention, and maps from its log-sum-exp.

Shapes and arguments are those of `reference`. Nothing of the size B H Q K is kept: scores exist for
`BLOCK` elements at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BLOCK = 1 << 21
"""Elements of a block of scores."""

GPU_BLOCK = 1 << 25
"""Elements of a block of scores on a GPU."""


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    drop_columns: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp; with `drop_columns`, one head at a time."""
    if drop_columns is None:
        return attention(q, k, v, mask, scale)
    batch, heads, queries = q.shape[:3]
    out = q.new_empty(batch, heads, queries, v.shape[3])
    lse = q.new_empty(batch, heads, queries, dtype=accumulator(q.dtype))
    added = None if mask is None else added_to_scores(mask, q.dtype).expand(batch, heads, -1, -1)
    dropped = drop_columns.expand(batch, heads, -1, -1)
    for at in itertools.product(singles(batch), singles(heads)):
        start = q.new_zeros(1, 1, 1, 1) if added is None else added[at]
        own = start.where(~is_dropped(dropped[at], k.shape[2]), -torch.inf)
        out[at], lse[at] = attention(q[at], k[at], v[at], own, scale)
    return out, lse


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
    """Return the output, the maps and the log-sum-exp, all in float32 or float64 but the output."""
    maps = (mask, columns, weights, scale, reduce_heads)
    return with_maps(attention, maps_from_lse, q, k, v, *maps)


def maps_alone(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    columns: Tensor,
    weights: Tensor | None,
    scale: float,
    reduce_heads: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the maps, the expected key P k (B, H, Q, d) and the log-sum-exp."""
    maps = (mask, columns, weights, scale, reduce_heads)
    return swapped(with_maps(attention, maps_from_lse, q, k, k, *maps))


def with_maps(
    attend: Callable[..., tuple[Tensor, Tensor]],
    read: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    columns: Tensor,
    weights: Tensor | None,
    scale: float,
    reduce_heads: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, maps and log-sum-exp by the `attention` and `maps_from_lse` of a device."""
    out, lse = attend(q, k, v, mask, scale)
    maps = read(q, k, lse, mask, columns, weights, scale, reduce_heads)
    return out, maps.to(q.dtype), lse


def swapped(results: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the maps first: with keys as values the output is the expected key."""
    out, maps, lse = results
    return maps, out, lse


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, Q, e) and the log-sum-exp (B, H, Q), -inf for rows without keys."""
    empty = 0 in (*q.shape, *k.shape, *v.shape)
    if empty or v.shape[3] != q.shape[3]:
        return blocked_attention(q, k, v, mask, scale)
    added = None if mask is None else added_to_scores(mask, q.dtype)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=added, scale=scale
    )
    lse = lse.contiguous()
    hidden = lse == 0
    if hidden.any():
        # The fused form takes a query that is not finite for one whose keys are all masked.
        bad = hidden & ~q.isfinite().all(-1)
        out, lse = out.masked_fill(bad[..., None], torch.nan), lse.masked_fill(bad, torch.nan)
    return nothing_from_nowhere(out, lse, added)


def nothing_from_nowhere(out: Tensor, lse: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp with zeros and -inf for the rows whose keys are all masked."""
    if added is None:
        return out, lse
    nowhere = (added == -torch.inf).all(-1)
    return out.masked_fill(nowhere[..., None], 0.0), lse.masked_fill(nowhere, -torch.inf)


def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return what `attention` does, for sizes that the fused form does not take."""
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=accumulator(q.dtype))
    if k.shape[2] == 0:
        return out, lse
    for b, rows in blocks(q, k):
        logits = block_scores(q, k, mask, scale, b, rows)
        own = logits.logsumexp(-1)
        out[b, :, rows] = (exp_less(logits, own) @ v[b].to(logits)).to(out)
        lse[b, :, rows] = own
    return out, lse


def maps_from_lse(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    columns: Tensor,
    weights: Tensor | None,
    scale: float,
    reduce_heads: str,
) -> Tensor:
    """Return exp(q . k_s scale + mask - lse) for the keys `columns`, grouped, over heads."""
    batch, heads, queries = lse.shape
    chosen, added = _keys_of(k, columns).to(lse), added_columns(mask, columns, lse.dtype)
    width = columns.shape[1] if weights is None else weights.shape[1]
    keep = reduce_heads == "none"
    maps = lse.new_zeros(batch, heads if keep else 1, queries, width)
    step = max(1, block_size(q) // max(1, batch * queries * columns.shape[1]))
    for first in range(0, heads, step):
        part = slice(first, first + step)
        own = added if added is None or added.shape[1] == 1 else added[:, part]
        p = _probabilities_of(q[:, part], chosen[:, part], lse[:, part], own, scale)
        p = p if weights is None else p @ weights.to(p)
        if keep:
            maps[:, part] = p
        else:
            maps += p.sum(1, keepdim=True)
    if keep:
        return maps
    return maps[:, 0] / heads if reduce_heads == "mean" else maps[:, 0]


def backward(
    grad_out: Tensor | None,
    grad_columns: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    drop_columns: Tensor | None,
    columns: Tensor | None,
    lse: Tensor,
    scale: float,
    of_keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `q`, `k` and `v`, the latter two as zeros unless `of_keys`.

    `grad_columns` (B, H or 1, Q, C) is the gradient of the probabilities of `columns`. With g the
    gradient of all probabilities, that of a score is p (g - p . g + grad_lse).
    """
    dq, dk, dv = (torch.zeros_like(x, dtype=accumulator(x.dtype)) for x in (q, k, v))
    if 0 in (*q.shape, *k.shape):
        return dq.to(q), dk.to(k), dv.to(v)
    for b, rows in blocks(q, k):
        logits = block_scores(q, k, mask, scale, b, rows)
        p = exp_less(logits, lse[b, :, rows])
        if drop_columns is not None:
            p.masked_fill_(is_dropped(part_of(drop_columns, b, rows), k.shape[2]), 0.0)
        grad = torch.zeros_like(p)
        if grad_out is not None:
            own = grad_out[b, :, rows].to(p)
            torch.matmul(own, v[b].to(p).transpose(-1, -2), out=grad)
            if of_keys:
                dv[b] += p.transpose(-1, -2) @ own
        if grad_columns is not None and columns is not None:
            at = columns[b].expand(*p.shape[:2], -1)
            grad.scatter_add_(-1, at, grad_columns[b, :, rows].to(p).expand(*p.shape[:2], -1))
        total = (p * grad).sum(-1)
        if grad_lse is not None:
            total -= grad_lse[b, :, rows]
        grad.sub_(total[..., None]).mul_(p).mul_(scale)
        dq[b, :, rows] = grad @ k[b].to(p)
        if of_keys:
            dk[b] += grad.transpose(-1, -2) @ q[b, :, rows].to(p)
    return dq.to(q), dk.to(k), dv.to(v)


def maps_backward(
    grad_columns: Tensor,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    columns: Tensor,
    expected_key: Tensor,
    lse: Tensor,
    scale: float,
) -> Tensor:
    """Return the gradient of `q` from that of the probabilities of `columns` alone.

    It is scale sum_s g_s p_s (k_s - expected key), the keys that are not wanted being in the
    expected key P k (B, H, Q, d) of the forward pass, so no row of scores is made again.
    """
    chosen = _keys_of(k, columns).to(lse)
    p = _probabilities_of(q, chosen, lse, added_columns(mask, columns, lse.dtype), scale)
    moved = p * grad_columns.to(p)
    total = moved.sum(-1, keepdim=True)
    return ((moved @ chosen - total * expected_key.to(p)) * scale).to(q)


def transposed_product(
    q: Tensor, k: Tensor, x: Tensor, mask: Tensor | None, lse: Tensor, scale: float
) -> Tensor:
    """Return P^T x, (B, H, K, e), for `x` (B, H, Q, e) without storing P."""
    out = torch.zeros(*k.shape[:3], x.shape[3], dtype=lse.dtype, device=q.device)
    for b, rows in blocks(q, k):
        p = exp_less(block_scores(q, k, mask, scale, b, rows), lse[b, :, rows])
        out[b] += p.transpose(-1, -2) @ x[b, :, rows].to(p)
    return out.to(x)


def singles(count: int) -> list[slice]:
    """Return slices of one element each."""
    return [slice(index, index + 1) for index in range(count)]


def blocks(q: Tensor, k: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield batch elements and slices of queries whose scores fill a block."""
    rows = max(1, block_size(q) // max(1, q.shape[1] * k.shape[2]))
    for b in range(q.shape[0]):
        for first in range(0, q.shape[2], rows):
            yield b, slice(first, first + rows)


def block_size(q: Tensor) -> int:
    """Return how many scores a block has on the device of `q`."""
    return BLOCK if q.device.type == "cpu" else GPU_BLOCK


def block_scores(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, b: int, rows: slice
) -> Tensor:
    """Return the masked scores (H, rows, K) of some queries of batch element `b`."""
    kind = accumulator(q.dtype)
    logits = q[b, :, rows].to(kind) @ k[b].to(kind).transpose(-1, -2) * scale
    if mask is None:
        return logits
    return logits.add_(added_to_scores(part_of(mask, b, rows), kind))


def part_of(x: Tensor, b: int, rows: slice) -> Tensor:
    """Return the rows (H or 1, rows or 1, n) of batch element `b` of a tensor that broadcasts."""
    own = x[b if x.shape[0] > 1 else 0]
    return own if own.shape[1] == 1 else own[:, rows]


def added_to_scores(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a boolean or additive mask as one to add, in its own shape of four dimensions."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def is_dropped(columns: Tensor, keys: int) -> Tensor:
    """Return which keys are among `columns` (..., n), bool (..., keys); negative ones are none."""
    dropped = torch.zeros(*columns.shape[:-1], keys + 1, dtype=torch.bool, device=columns.device)
    dropped.scatter_(-1, columns.where(columns >= 0, keys), True)
    return dropped[..., :keys]


def _keys_of(k: Tensor, columns: Tensor) -> Tensor:
    """Return the keys (B, H, C, d) at `columns` (B, C)."""
    return k.gather(2, columns[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))


def added_columns(mask: Tensor | None, columns: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return what a mask adds at `columns` (B, C), its other dimensions as they are."""
    if mask is None or mask.shape[3] == 1:
        return None if mask is None else added_to_scores(mask, dtype)
    wide = mask.expand(columns.shape[0], -1, -1, -1)
    own = wide.gather(3, columns[:, None, None].expand(*wide.shape[:3], -1))
    return added_to_scores(own, dtype)


def _probabilities_of(
    q: Tensor, chosen: Tensor, lse: Tensor, added: Tensor | None, scale: float
) -> Tensor:
    """Return the probabilities of the keys `chosen` (B, H, C, d)."""
    logits = q.to(lse) @ chosen.transpose(-1, -2) * scale
    return exp_less(logits if added is None else logits + added, lse)


def exp_less(logits: Tensor, lse: Tensor) -> Tensor:
    """Return exp(logits - lse), zero in rows whose lse is -inf."""
    return (logits - lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]).exp_()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which sums of `dtype` are taken."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
