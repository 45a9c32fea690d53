"""Attention with maps on a GPU: torch's fused attention, and maps from its log-sum-exp.

Shapes and arguments are those of `reference`. Nothing of the size B H Q K is kept. The backward
pass is that of `cpu`, blocks of torch products on any device. CuPy is needed by nothing here, but
maps of few columns are made by a kernel of ours if it is installed.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unweave.kernels import cuda
from unweave.kernels.attention import cpu
from unweave.kernels.attention.cpu import accumulator, added_to_scores

MODULE = cuda.Module(Path(__file__).with_name("kernels.cu"))

FEW = 32
"""The most columns whose products are taken one by one: more are better as products of matrices."""

ALIGNED = 16
"""Bytes at whose multiples torch's fused attention wants rows to start, and elements for masks."""


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    drop_columns: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp; with `drop_columns`, one batch element at a time."""
    if drop_columns is None:
        return attention(q, k, v, mask, scale)
    batch, heads, queries = q.shape[:3]
    out = q.new_empty(batch, heads, queries, v.shape[3])
    lse = q.new_empty(batch, heads, queries, dtype=accumulator(q.dtype))
    zero = q.new_zeros(1, 1, 1, 1)
    added = zero if mask is None else added_to_scores(mask, q.dtype)
    added, dropped = (x.expand(batch, heads, -1, -1) for x in (added, drop_columns))
    for at in cpu.singles(batch):
        own = added[at].where(~cpu.is_dropped(dropped[at], k.shape[2]), -torch.inf)
        out[at], lse[at] = attention(q[at], k[at], v[at], own, scale)
    return out, lse


def attention_with_maps(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `cpu.attention_with_maps` does of the same arguments."""
    return cpu.with_maps(attention, maps_from_lse, *arguments)


def maps_alone(q: Tensor, k: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `cpu.maps_alone` does of the same arguments."""
    return cpu.swapped(cpu.with_maps(attention, maps_from_lse, q, k, k, *arguments))


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, Q, e) and the log-sum-exp (B, H, Q), -inf for rows without keys."""
    empty = 0 in (*q.shape, *k.shape, *v.shape)
    if empty or q.dtype == torch.float64 or not fused_agrees(q.device, q.dtype, mask is not None):
        return cpu.blocked_attention(q, k, v, mask, scale)
    added = None if mask is None else added_to_scores(mask, q.dtype)
    return cpu.nothing_from_nowhere(*fused_attention(q, k, v, added, scale), added)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp of torch's memory-efficient attention.

    Rows whose keys are all masked hold anything.
    """
    bias = None if added is None else aligned_mask(added, (*q.shape[:3], k.shape[2]))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        *(aligned(x) for x in (q, k, v)), bias, True, 0.0, False, scale=scale
    )
    return out[..., : v.shape[3]].contiguous(), lse[..., : q.shape[2]].contiguous()


def aligned(x: Tensor) -> Tensor:
    """Return `x`, if its rows start at multiples of `ALIGNED` bytes; else a copy, with zeros."""
    missing = -x.shape[-1] % (ALIGNED // x.itemsize)
    if missing:
        return torch.nn.functional.pad(x, (0, missing))
    starts = x.data_ptr(), *(stride * x.itemsize for stride in x.stride()[:-1])
    if x.stride(-1) == 1 and not any(start % ALIGNED for start in starts):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def aligned_mask(added: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a mask expanded to `shape` whose rows start at multiples of `ALIGNED` elements."""
    wide = added.expand(*added.shape[:3], shape[3])
    padded = added.new_zeros(*wide.shape[:3], -(-shape[3] // ALIGNED) * ALIGNED)
    padded[..., : shape[3]] = wide
    return padded[..., : shape[3]].expand(shape)


@cache
def fused_agrees(device: torch.device, dtype: torch.dtype, masked: bool) -> bool:
    """Whether torch's fused attention returns here what we take it to return.

    Tried once, on a small problem: it is not a public function, and a log-sum-exp in another base
    or layout would make maps wrong without an error.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator) for n in (5, 7, 7))
    mask = torch.randn(2, 1, 5, 7, generator=generator).to(device, dtype)
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    added = mask if masked else None
    try:
        found = fused_attention(q, k, v, added, 0.5)
    except RuntimeError:
        return False
    right = cpu.blocked_attention(q, k, v, added, 0.5)
    return all(
        x.shape == y.shape and torch.allclose(x.float(), y.float(), rtol=0.02, atol=0.02)
        for x, y in zip(found, right, strict=True)
    )


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
    if columns.shape[1] > FEW or not cuda.available():
        return cpu.maps_from_lse(q, k, lse, mask, columns, weights, scale, reduce_heads)
    keep = reduce_heads == "none"
    maps = column_maps(q, k, lse, cpu.added_columns(mask, columns, lse.dtype), columns, scale, keep)
    if reduce_heads == "mean":
        maps /= q.shape[1]
    maps = maps if keep else maps[:, 0]
    return maps if weights is None else maps @ weights.to(maps)


def column_maps(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    added: Tensor | None,
    columns: Tensor,
    scale: float,
    keep_heads: bool,
) -> Tensor:
    """Return the probabilities of `columns`, (B, H, Q, C), or summed over heads (B, 1, Q, C)."""
    batch, heads, queries, features = q.shape
    count = columns.shape[1]
    outer, inner = (heads, 1) if keep_heads else (1, heads)
    maps = lse.new_empty(batch, outer, queries, count)
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    if added is not None:
        added = added.expand(batch, heads, queries, count)
    strides = itertools.chain(
        q.stride()[:3],
        k.stride()[:3],
        lse.stride(),
        (0, 0, 0, 0) if added is None else added.stride(),
    )
    sizes = outer, inner, queries, count, features
    tensors = q, k, lse, added, columns.contiguous(), maps
    MODULE.launch("column_maps", [q.dtype], maps.numel(), *tensors, scale, *sizes, *strides)
    return maps
