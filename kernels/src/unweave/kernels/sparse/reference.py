"""Sparse codes, defined: plain torch, any device and dtype, differentiable everywhere.

A sparse code is n entries grouped by row: `indices` (n,) are their features, and those of row b
are the entries crow[b] to crow[b + 1] of (B + 1,). NaN counts as larger than everything.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding


def topk(x: Tensor, k: int) -> Tensor:
    """Return the indices (B, k) of the largest elements of each row of (B, F), largest first.

    Of equal elements the one with the lower index comes first.
    """
    return x.sort(dim=1, descending=True, stable=True).indices[:, :k]


def batch_topk(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return `indices` (count,) and `crow` of the largest elements of all rows of (B, F).

    Of equal elements the first by row and then by feature are taken.
    """
    largest = x.flatten().sort(descending=True, stable=True).indices[:count]
    chosen = torch.zeros_like(x, dtype=torch.bool)
    chosen.view(-1)[largest] = True
    return _grouped(chosen)


def above(x: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Return `indices` and `crow` of the elements of (B, F) that are larger than `threshold`."""
    return _grouped(~(x <= threshold))


def decode(
    values: Tensor,
    indices: Tensor,
    crow: Tensor,
    dictionary: Tensor,
    sparse_grad: bool = False,
) -> Tensor:
    """Return, for each row, its `values` (n,) times their rows of `dictionary` (F, d): (B, d)."""
    out = dictionary.new_zeros(len(crow) - 1, dictionary.shape[1])
    terms = values[:, None] * embedding(indices, dictionary, sparse=sparse_grad)
    return out.index_add(0, rows(crow, len(indices)), terms)


def encode(x: Tensor, weight: Tensor, indices: Tensor, crow: Tensor) -> Tensor:
    """Return the products (n,) of the rows of `x` (B, d) with their rows of `weight` (F, d)."""
    return (x[rows(crow, len(indices))] * weight[indices]).sum(1)


def rows(crow: Tensor, entries: int) -> Tensor:
    """Return the row of each entry, (n,)."""
    every = torch.arange(len(crow) - 1, device=crow.device)
    return every.repeat_interleave(crow.diff(), output_size=entries)


def _grouped(chosen: Tensor) -> tuple[Tensor, Tensor]:
    counts = chosen.sum(1)
    return chosen.nonzero()[:, 1], torch.cat([counts.new_zeros(1), counts.cumsum(0)])
