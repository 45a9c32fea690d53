"""Rank all keys for all queries, and normalise over them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from unweave.kernels.backends import resolve
from unweave.kernels.ranking import ops, reference

FAST = ("cpu", "cuda")
"""Devices with a fast form."""


class Ranking(NamedTuple):
    """What `streaming_logsumexp_topk` returns."""

    lse: Tensor
    """log sum_j exp(q . k_j scale), (N,)."""

    values: Tensor
    """The largest q . k_j scale, (N, k), largest first."""

    indices: Tensor
    """Their keys, int64 (N, k)."""


def streaming_logsumexp_topk(
    queries: Tensor, keys: Tensor, k: int, *, scale: float = 1.0
) -> Ranking:
    """Return the log-sum-exp and the `k` best keys of each query, a block of products at a time.

    `queries` are (N, d), `keys` (M, d) in float32 or float64. The log-sum-exp is the denominator of
    InfoNCE over all keys, the best keys are a full ranking cut at `k`, which may be 0. `lse` and
    `values` are differentiable in both arguments; ties are ranked in any order. Time O(N M d),
    memory O(N k + M d) and a block of products. Raises `ValueError` naming what does not fit.

    >>> import torch
    >>> streaming_logsumexp_topk(torch.eye(2), torch.tensor([[0.0, 1.0], [2.0, 0.0]]), 1).indices
    tensor([[1],
            [0]])
    """
    if queries.dim() != 2 or keys.dim() != 2 or queries.shape[1] != keys.shape[1] or not len(keys):
        raise ValueError(
            "`queries` must be (N, d) and `keys` (M, d) with M > 0, got "
            f"{tuple(queries.shape)} and {tuple(keys.shape)}"
        )
    if (queries.dtype, queries.device) != (keys.dtype, keys.device) or queries.itemsize < 4:
        raise ValueError(
            "`queries` and `keys` must both be float32 or float64 on one device, got "
            f"{queries.dtype} on {queries.device} and {keys.dtype} on {keys.device}"
        )
    if not 0 <= k <= len(keys):
        raise ValueError(f"`k` must be from 0 to the number of keys {len(keys)}, got {k}")
    if resolve(queries.device, FAST) == "reference":
        lse, indices = reference.logsumexp_topk(queries, keys, k, scale)
    else:
        lse, indices = ops.logsumexp_topk(queries, keys, k, scale)
    values = (queries[:, None] * keys[indices]).sum(-1) * scale
    return Ranking(lse, values, indices)
