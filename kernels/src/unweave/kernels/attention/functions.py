"""Attention that drops keys, and attention that also says where it looked.

Queries `q` are (..., H, Q, d), keys `k` (..., H, K, d) and values `v` (..., H, K, e): batch
dimensions, heads, tokens, features. All have one floating dtype and device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from unweave.kernels.attention import ops

ReduceHeads = Literal["mean", "sum", "none"]
Columns = Sequence[int] | Tensor


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    drop_columns: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return softmax(q k^T scale + mask) v, (..., H, Q, e), without the keys that are dropped.

    `mask` is boolean, true where a query may look, or is added to the scores; it is broadcastable
    to (..., H, Q, K). `drop_columns`, int64 (..., H, Q, n) and broadcastable in all but n, removes
    these keys from a query's softmax, as T2I-Zero does; -1 stands for none. A query with no key
    left gets zeros. `scale` None is 1 / sqrt(d). Time O(Q K (d + e)); memory beyond the inputs
    O(Q e) a head, with `drop_columns` O(Q K) for one head at a time. Differentiable in `q`, `k` and
    `v`. Raises `ValueError` naming the argument that does not fit.

    >>> q, k, v = (torch.ones(1, 1, 2, 4) for _ in range(3))
    >>> v[..., 1, :] = 3
    >>> masked_attention(q, k, v, drop_columns=torch.tensor([[0], [-1]]))[0, 0, :, 0]
    tensor([3., 2.])
    """
    batch, (q, k, v) = _flat(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    mask = _flat_mask(mask, batch, q, k)
    drop_columns = _flat_drops(drop_columns, batch, q, k)
    out = ops.masked_attention(q, k, v, mask, drop_columns, scale)
    return out.reshape(*batch, *out.shape[1:])


@overload
def attention_with_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    columns: Columns | None = ...,
    groups: Sequence[Sequence[int]] | None = ...,
    reduce_heads: ReduceHeads = ...,
    mask: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def attention_with_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    columns: Columns | None = ...,
    groups: Sequence[Sequence[int]] | None = ...,
    reduce_heads: ReduceHeads = ...,
    mask: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...


def attention_with_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    columns: Columns | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    reduce_heads: ReduceHeads = "mean",
    mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, ...]:
    """Return the attention output and how much each query looks at the chosen keys.

    The output (..., H, Q, e) is that of `masked_attention`. The maps are softmax probabilities of
    `columns`, ints (C,) or an int64 tensor (..., C) with columns for each batch element, or their
    sums over the token groups `groups`; all keys when neither is given. Over heads they are
    averaged, summed, or kept: (..., Q, C) or (..., H, Q, C). With `return_lse` the log-sum-exp of
    the scores (..., H, Q) follows, in float32 for half types, -inf for a query without keys.

    Maps come from exp(q . k_s scale - lse) over the wanted columns, so the output is computed by
    fused attention. Time O(Q K (d + e) + Q C d) a head, memory beyond the inputs O(Q C) for all
    heads together. Differentiable in `q`, `k`, `v` from all three results; the backward pass holds
    a block of scores at a time. Raises `ValueError` naming the argument that does not fit.

    >>> q, k, v = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4), torch.rand(1, 2, 5, 4)
    >>> out, maps = attention_with_maps(q, k, v, groups=[[0, 1], [4]])
    >>> maps[0, 0]
    tensor([0.4000, 0.2000])
    """
    batch, (q, k, v) = _flat(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    mask = _flat_mask(mask, batch, q, k)
    index, weights = _chosen(columns, groups, batch, q, k)
    _check_reduce(reduce_heads)
    results = ops.attention_with_maps(q, k, v, mask, index, weights, scale, reduce_heads)
    out, maps, lse = (x.reshape(*batch, *x.shape[1:]) for x in results)
    return (out, maps, lse) if return_lse else (out, maps)


def attention_maps(
    q: Tensor,
    k: Tensor,
    *,
    columns: Columns | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    reduce_heads: ReduceHeads = "mean",
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return only the maps of `attention_with_maps`, for losses on where a query looks.

    When `k` needs no gradient, as with text that is frozen, the backward pass costs O(Q C d) a
    head: it makes no row of scores again.

    >>> q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4)
    >>> attention_maps(q, k, columns=[4]).shape
    torch.Size([1, 3, 1])
    """
    batch, (q, k) = _flat(q, k)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    flat_mask = _flat_mask(mask, batch, q, k)
    index, weights = _chosen(columns, groups, batch, q, k)
    _check_reduce(reduce_heads)
    maps = ops.attention_maps(q, k, flat_mask, index, weights, scale, reduce_heads)
    return maps.reshape(*batch, *maps.shape[1:])


def self_attention_rows(
    q: Tensor,
    k: Tensor,
    rows: Columns,
    *,
    reduce_heads: ReduceHeads = "mean",
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the softmax probabilities of all keys for the queries `rows` alone.

    `rows` are ints (R,) or an int64 tensor (..., R); the result is (..., R, K), or with heads
    kept (..., H, R, K). Time O(R K d) a head, memory O(R K). Differentiable.

    >>> q = k = torch.zeros(1, 2, 4, 8)
    >>> self_attention_rows(q, k, [3])
    tensor([[[0.2500, 0.2500, 0.2500, 0.2500]]])
    """
    batch, (q, k) = _flat(q, k)
    index = _indices(rows, "rows", batch, q.shape[2], q.device)
    wide = index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    flat_mask = _flat_mask(mask, batch, q, k)
    if flat_mask is not None and flat_mask.shape[2] > 1:
        shape = (q.shape[0], flat_mask.shape[1], index.shape[1], flat_mask.shape[3])
        flat_mask = flat_mask.expand(q.shape[0], -1, -1, -1).gather(
            2, index[:, None, :, None].expand(shape)
        )
    maps = attention_maps(
        q.gather(2, wide), k, reduce_heads=reduce_heads, mask=flat_mask, scale=scale
    )
    return maps.reshape(*batch, *maps.shape[1:])


def attention_product(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    *,
    transpose: bool = False,
    reduce_heads: ReduceHeads = "mean",
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return P x, or P^T x with `transpose`, for the probabilities P that are never stored.

    `x` is (..., K, e), with `transpose` (..., Q, e), for all heads alike; the result is (..., Q, e)
    or (..., K, e), or with heads kept (..., H, Q, e). This is the step of an affinity iteration,
    such as a Markov chain over self-attention. Time O(Q K (d + e)) a head, memory O((Q + K) e).
    `transpose` is not differentiable.

    >>> q = k = torch.zeros(1, 2, 4, 8)
    >>> attention_product(q, k, torch.eye(4)[None])[0, 0]
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    _check_reduce(reduce_heads)
    batch, (q, k) = _flat(q, k)
    tokens = q.shape[2] if transpose else k.shape[2]
    if x.dim() < 2 or x.shape[-2] != tokens:
        raise ValueError(f"`x` must be (..., {tokens}, e), got {tuple(x.shape)}")
    x = x.expand(*batch, *x.shape[-2:]).reshape(-1, 1, *x.shape[-2:])
    x = x.expand(q.shape[0], q.shape[1], -1, -1)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    flat_mask = _flat_mask(mask, batch, q, k)
    if transpose:
        product = ops.transposed_product(q, k, x, flat_mask, scale)
    else:
        product = ops.masked_attention(q, k, x, flat_mask, None, scale)
    if reduce_heads == "mean":
        product = product.mean(1)
    elif reduce_heads == "sum":
        product = product.sum(1)
    return product.reshape(*batch, *product.shape[1:])


def _flat(*tensors: Tensor) -> tuple[torch.Size, tuple[Tensor, ...]]:
    """Return the batch dimensions, and the tensors as (B, H, tokens, features)."""
    q, k, *rest = tensors
    for name, tensor in zip("qkv", tensors, strict=False):
        if not isinstance(tensor, Tensor) or tensor.dim() < 3 or not tensor.is_floating_point():
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"`{name}` must be a floating tensor (..., H, tokens, d), got {shape}")
        if (tensor.dtype, tensor.device) != (q.dtype, q.device):
            raise ValueError(
                f"`q` and `{name}` must have one dtype and device, got {q.dtype} on {q.device} and "
                f"{tensor.dtype} on {tensor.device}"
            )
        if tensor.shape[:-2] != q.shape[:-2]:
            raise ValueError(
                f"`q` and `{name}` must have the same batch dimensions and heads, got "
                f"{tuple(q.shape)} and {tuple(tensor.shape)}"
            )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"`q` and `k` must have the same features, got {q.shape[-1]} and {k.shape[-1]}"
        )
    if rest and rest[0].shape[-2] != k.shape[-2]:
        raise ValueError(
            f"`k` and `v` must have the same tokens, got {k.shape[-2]} and {rest[0].shape[-2]}"
        )
    batch = q.shape[:-3]
    count = batch.numel()
    return batch, tuple(tensor.reshape(count, *tensor.shape[-3:]) for tensor in tensors)


def _flat_mask(mask: Tensor | None, batch: torch.Size, q: Tensor, k: Tensor) -> Tensor | None:
    """Return the mask as four dimensions that broadcast to (B, H, Q, K), unexpanded if it can."""
    if mask is None:
        return None
    size = (*batch, *q.shape[1:3], k.shape[2])
    if not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(f"`mask` must be boolean or floating, got {mask.dtype}")
    return _flat_batch(mask, "mask", batch, size)


def _flat_drops(drops: Tensor | None, batch: torch.Size, q: Tensor, k: Tensor) -> Tensor | None:
    if drops is None:
        return None
    if drops.dtype != torch.int64 or drops.dim() == 0:
        raise ValueError(f"`drop_columns` must be int64 (..., H, Q, n), got {drops.dtype}")
    _check_range(drops, "drop_columns", -1, k.shape[2] - 1)
    return _flat_batch(drops, "drop_columns", batch, (*batch, *q.shape[1:3], drops.shape[-1]))


def _flat_batch(x: Tensor, name: str, batch: torch.Size, size: tuple[int, ...]) -> Tensor:
    """Return `x` in four dimensions, with a batch of one where all elements share it."""
    try:
        x.expand(size)
    except RuntimeError:
        raise ValueError(
            f"`{name}` must be broadcastable to {size}, got {tuple(x.shape)}"
        ) from None
    x = x.reshape(*(1,) * (len(size) - x.dim()), *x.shape)
    if x.shape[:-3].numel() == 1:
        return x.reshape(1, *x.shape[-3:])
    return x.expand(*batch, *x.shape[-3:]).reshape(batch.numel(), *x.shape[-3:])


def _check_range(index: Tensor, name: str, low: int, high: int) -> None:
    """Raise `ValueError` for values outside low..high; a graph being compiled is not looked at."""
    if torch.compiler.is_compiling() or not index.numel():
        return
    least, most = (int(value) for value in index.aminmax())
    if least < low or most > high:
        wrong = least if least < low else most
        raise ValueError(f"`{name}` must be from {low} to {high}, got {wrong}")


def _chosen(
    columns: Columns | None,
    groups: Sequence[Sequence[int]] | None,
    batch: torch.Size,
    q: Tensor,
    k: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Return key indices (B, C) and, for groups, weights (C, G) that sum them."""
    keys = k.shape[2]
    if columns is not None and groups is not None:
        raise ValueError("give `columns` or `groups`, not both")
    if groups is None:
        wanted: Columns = torch.arange(keys) if columns is None else columns
        return _indices(wanted, "columns", batch, keys, q.device), None
    members = sorted({int(key) for group in groups for key in group})
    index = _indices(members, "groups", batch, keys, q.device)
    weights = torch.tensor(
        [[float(key in set(group)) for group in groups] for key in members], dtype=q.dtype
    ).reshape(len(members), len(groups))
    return index, weights.to(q.device)


def _indices(
    values: Columns, name: str, batch: torch.Size, limit: int, device: torch.device
) -> Tensor:
    index = values if isinstance(values, Tensor) else torch.tensor(list(values), dtype=torch.int64)
    if index.dtype != torch.int64 or index.dim() not in (1, len(batch) + 1):
        raise ValueError(
            f"`{name}` must be ints, or an int64 tensor with the batch dimensions {tuple(batch)} "
            f"and one more, got {index.dtype} {tuple(index.shape)}"
        )
    if index.dim() > 1 and index.shape[:-1] != batch:
        raise ValueError(
            f"`{name}` must have the batch dimensions {tuple(batch)}, got {tuple(index.shape)}"
        )
    _check_range(index, name, 0, limit - 1)
    count = index.shape[-1]
    return index.to(device).expand(*batch, count).reshape(batch.numel(), count)


def _check_reduce(reduce_heads: str) -> None:
    if reduce_heads not in ("mean", "sum", "none"):
        raise ValueError(f'`reduce_heads` must be "mean", "sum" or "none", got {reduce_heads!r}')
