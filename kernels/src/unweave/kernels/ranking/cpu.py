"""Ranking by inner products, a block of queries at a time, on any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 1 << 22
"""Elements of a block of products."""

GPU_BLOCK = 1 << 25
"""Elements of a block of products on a GPU."""

RUN = 64
"""Keys whose best product is taken together."""


def logsumexp_topk(queries: Tensor, keys: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp (N,) and the indices (N, k) of the best keys, best first."""
    lse = queries.new_empty(len(queries))
    found = queries.new_empty(len(queries), k, dtype=torch.int64)
    for part in blocks(queries, keys):
        scores = queries[part] @ keys.T
        if k:
            found[part] = best(scores if scale > 0 else -scores, k)
        lse[part] = scores.mul_(scale).logsumexp(1)
    return lse, found


def lse_backward(
    grad: Tensor, queries: Tensor, keys: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `queries` and `keys` from that of the log-sum-exp (N,)."""
    of_queries, of_keys = torch.empty_like(queries), torch.zeros_like(keys)
    for part in blocks(queries, keys):
        p = (queries[part] @ keys.T).mul_(scale).sub_(lse[part, None]).exp_()
        p.mul_((grad[part] * scale)[:, None])
        of_queries[part] = p @ keys
        of_keys += p.T @ queries[part]
    return of_queries, of_keys


def best(scores: Tensor, k: int) -> Tensor:
    """Return where each row (M,) has its `k` largest elements, largest first.

    They lie in the `k` runs with the largest maxima, so only those are searched.
    """
    runs = scores.shape[1] // RUN
    if runs <= 2 * k:
        return scores.topk(k, dim=1).indices
    whole = scores[:, : runs * RUN].view(len(scores), runs, RUN)
    chosen = whole.amax(2).topk(k, dim=1, sorted=False).indices
    places = torch.arange(scores.shape[1], device=scores.device)
    candidates = (chosen[:, :, None] * RUN + places[:RUN]).flatten(1)
    rest = places[runs * RUN :].expand(len(scores), -1)
    candidates = torch.cat([candidates, rest], 1)
    within = scores.gather(1, candidates).topk(k, dim=1).indices
    return candidates.gather(1, within)


def blocks(queries: Tensor, keys: Tensor) -> Iterator[slice]:
    """Yield slices of queries whose products fill a block."""
    elements = BLOCK if queries.device.type == "cpu" else GPU_BLOCK
    rows = max(1, elements // max(1, len(keys)))
    for first in range(0, len(queries), rows):
        yield slice(first, first + rows)
