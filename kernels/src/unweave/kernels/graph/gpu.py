"""Graph products on a GPU: one thread a result, so that no order of threads shows.

Arguments are those of `reference`. Half precision is read as it is and added up in float32. Indices
are checked first, since a kernel would read whatever lies there: that waits for the GPU.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from unweave.kernels.cuda import Module
from unweave.kernels.graph import reference

MODULE = Module(Path(__file__).with_name("kernels.cu"))


def weighted_spmm(crow: Tensor, col: Tensor, weight: Tensor, dense: Tensor) -> Tensor:
    """Return, for each row, the sum (N, d) over its edges of `weight` (E,) times `dense[col]`."""
    reference.require_offsets(crow, len(col))
    reference.require_below("col", col, len(dense))
    return sums(crow, col, weight, dense)


def edge_dot(u: Tensor, v: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """Return the dot products (E,) of `u[row]` and `v[col]`."""
    reference.require_below("row", row, len(u))
    reference.require_below("col", col, len(v))
    return dots(u, v, row, col)


def sums(crow: Tensor, col: Tensor, weight: Tensor, dense: Tensor) -> Tensor:
    """Return `weighted_spmm` of a graph that was checked."""
    out = dense.new_empty(len(crow) - 1, dense.shape[1])
    tensors = *(x.contiguous() for x in (crow, col, weight, dense)), out
    dtypes = dense.dtype, crow.dtype, col.dtype
    MODULE.launch("weighted_spmm", dtypes, out.numel(), *tensors, dense.shape[1])
    return out


def dots(u: Tensor, v: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """Return `edge_dot` of edges that were checked."""
    out = u.new_empty(len(row))
    tensors = *(x.contiguous() for x in (u, v, row, col)), out
    MODULE.launch("edge_dot", (u.dtype, row.dtype, col.dtype), len(row), *tensors, u.shape[1])
    return out


def sorted_edges(keys: Tensor, values: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `reference.sorted_edges` does, also where torch must be deterministic."""
    ordered, order = keys.long().sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(bins + 1, device=keys.device))
    return starts.to(values.dtype), values[order], order.to(values.dtype)
