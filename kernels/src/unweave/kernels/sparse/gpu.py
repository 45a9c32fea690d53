"""Sparse codes on a GPU: selected by torch, decoded, encoded and scattered as products of a graph.

Arguments are those of `reference`, and not checked. In the graph a row has an edge to each of its
features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unweave.kernels.graph import gpu
from unweave.kernels.sparse.reference import rows

BLOCK = 1 << 26
"""Elements of a block of rows from which the largest are chosen."""


def topk(x: Tensor, k: int) -> Tensor:
    """Return the indices (B, k) of the largest elements, largest first, equal ones by index."""
    found = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    step = max(1, BLOCK // max(1, x.shape[1]))
    for first in range(0, len(x), step) if k else ():
        part = x[first : first + step]
        columns = largest(part, k).nonzero()[:, 1].view(len(part), k)
        order = part.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
        found[first : first + step] = columns.gather(1, order)
    return found


def batch_topk(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return `indices` (count,) and `crow` of the largest elements of all rows."""
    return grouped(largest(x.reshape(1, x.numel()), count).view(x.shape))


def above(x: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Return `indices` and `crow` of the elements of (B, F) that are larger than `threshold`."""
    return grouped(~(x <= threshold))


def grouped(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return `indices` and `crow` of the elements of (B, F) that are true."""
    counts = chosen.sum(1)
    return chosen.nonzero()[:, 1].clone(), torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def largest(x: Tensor, k: int) -> Tensor:
    """Return whether each element of (B, F) is one of the `k` largest of its row.

    Of those equal to the least of them, which torch takes in any order, the first.
    """
    if not k:
        return torch.zeros_like(x, dtype=torch.bool)
    least = x.topk(k, dim=1).values[:, -1:]
    larger = (x > least) | (x.isnan() & ~least.isnan())
    equal = (x == least) | (x.isnan() & least.isnan())
    missing = k - larger.sum(1, keepdim=True)
    return larger | (equal & (equal.cumsum(1) <= missing))


def decode(values: Tensor, indices: Tensor, crow: Tensor, dictionary: Tensor) -> Tensor:
    """Return the sums (B, d) of entries times their rows of the dictionary."""
    return gpu.sums(crow, indices, values, dictionary)


def encode(x: Tensor, weight: Tensor, indices: Tensor, crow: Tensor) -> Tensor:
    """Return the products (n,) of rows of `x` (B, d) and `weight` (F, d)."""
    return gpu.dots(x, weight, rows(crow, len(indices)), indices)


def scatter(values: Tensor, indices: Tensor, crow: Tensor, x: Tensor, features: int) -> Tensor:
    """Return, for each feature, the sum (F, d) of its entries times their rows of `x` (B, d)."""
    starts, ends, order = gpu.sorted_edges(indices, rows(crow, len(indices)), features)
    return gpu.sums(starts, ends, values[order], x)
