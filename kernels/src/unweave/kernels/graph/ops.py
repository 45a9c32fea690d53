"""The operators behind the public functions, known to autograd and to `torch.compile`.

Arguments are those of `reference`. Products with the graph and products along its edges are each
other's derivatives, so both are differentiable any number of times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unweave.kernels.backends import operator, resolve
from unweave.kernels.graph import cpu, gpu, reference

FAST = ("cpu", "cuda")
"""Devices with a fast form."""

NEEDS = {"cpu": "numba", "cuda": "cupy"}


def weighted_spmm(
    crow: Tensor,
    col: Tensor,
    weight: Tensor,
    dense: Tensor,
    transpose: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """Return the weighted sums (N, d); `transpose` is for the gradient of `dense`."""
    if not _by_definition(dense):
        out: Tensor = _weighted_spmm(crow, col, weight, dense, *(transpose or (None,) * 3))
        return out
    if not torch.compiler.is_compiling():
        reference.require_offsets(crow, len(col))
        reference.require_below("col", col, len(dense))
    return reference.weighted_spmm(crow, col, weight, dense)


def edge_dot(u: Tensor, v: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """Return the dot products (E,)."""
    if not _by_definition(u):
        out: Tensor = _edge_dot(u, v, row, col)
        return out
    if not torch.compiler.is_compiling():
        reference.require_below("row", row, len(u))
        reference.require_below("col", col, len(v))
    return reference.edge_dot(u, v, row, col)


def transpose_csr(crow: Tensor, col: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return offsets, ends and places of the edges of the transposed graph."""
    fast = not _by_definition(crow)
    if not torch.compiler.is_compiling():
        reference.require_offsets(crow, len(col))
        reference.require_below("col", col, columns)
    sort = _sorted_edges if fast else reference.sorted_edges
    transposed: tuple[Tensor, Tensor, Tensor] = sort(
        col, reference.rows(crow, col.shape[0]), columns
    )
    return transposed


def _by_definition(x: Tensor) -> bool:
    return resolve(x.device, FAST, NEEDS) == "reference"


def _spmm(
    crow: Tensor,
    col: Tensor,
    weight: Tensor,
    dense: Tensor,
    transposed_crow: Tensor | None,
    transposed_col: Tensor | None,
    order: Tensor | None,
) -> Tensor:
    return cpu.weighted_spmm(crow, col, weight, dense)


def _spmm_on_gpu(
    crow: Tensor,
    col: Tensor,
    weight: Tensor,
    dense: Tensor,
    transposed_crow: Tensor | None,
    transposed_col: Tensor | None,
    order: Tensor | None,
) -> Tensor:
    return gpu.weighted_spmm(crow, col, weight, dense)


def _empty_spmm(crow: Tensor, col: Tensor, weight: Tensor, dense: Tensor, *_: Any) -> Tensor:
    return dense.new_empty(crow.shape[0] - 1, dense.shape[1])


def _empty_dots(u: Tensor, v: Tensor, row: Tensor, col: Tensor) -> Tensor:
    return u.new_empty(row.shape[0])


def _empty_sorted(keys: Tensor, values: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    return values.new_empty(bins + 1), torch.empty_like(values), torch.empty_like(values)


def _keep(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _spmm_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    crow, col, weight, dense, *transpose = ctx.saved_tensors
    _, _, wants_weight, wants_dense, *_ = ctx.needs_input_grad
    of_weight = of_dense = None
    row = None
    if wants_weight or transpose[0] is None:
        row = reference.rows(crow, col.shape[0])
    if wants_weight:
        of_weight = _edge_dot(grad, dense, row, col)
    if wants_dense:
        if transpose[0] is None:
            transpose = _sorted_edges(col, row, dense.shape[0])
        of_dense = _from_sorted(transpose, weight, grad)
    return None, None, of_weight, of_dense, None, None, None


def _dot_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    u, v, row, col = ctx.saved_tensors
    of_u = of_v = None
    if ctx.needs_input_grad[0]:
        of_u = _from_sorted(_sorted_edges(row, _wide(col), u.shape[0]), grad, v)
    if ctx.needs_input_grad[1]:
        of_v = _from_sorted(_sorted_edges(col, _wide(row), v.shape[0]), grad, u)
    return of_u, of_v, None, None


def _from_sorted(edges: Any, weight: Tensor, dense: Tensor) -> Tensor:
    """Return the weighted sums over edges that were sorted, by weights that were not."""
    starts, ends, order = edges
    ordered = weight.index_select(0, order)
    out: Tensor = _weighted_spmm(starts, ends, ordered, dense, None, None, None)
    return out


def _wide(ends: Tensor) -> Tensor:
    """Return indices in a dtype that also holds the number of edges."""
    return ends if ends.shape[0] <= torch.iinfo(ends.dtype).max else ends.long()


_weighted_spmm = operator("weighted_spmm", _spmm, _empty_spmm)
_weighted_spmm.register_autograd(_spmm_gradients, setup_context=_keep)
_edge_dot = operator("edge_dot", cpu.edge_dot, _empty_dots)
_edge_dot.register_autograd(_dot_gradients, setup_context=_keep)
_sorted_edges = operator("sorted_edges", cpu.sorted_edges, _empty_sorted)
_weighted_spmm.register_kernel("cuda", _spmm_on_gpu)
_edge_dot.register_kernel("cuda", gpu.edge_dot)
_sorted_edges.register_kernel("cuda", gpu.sorted_edges)
