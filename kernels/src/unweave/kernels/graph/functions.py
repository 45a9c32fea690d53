"""Products of a weighted graph with a table, and dot products along its edges."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unweave.kernels.checks import require_one_kind
from unweave.kernels.graph import ops


class Transposed(NamedTuple):
    """A graph seen from its columns, from `transpose_csr`."""

    crow: Tensor
    """Where the edges of each column start, (M + 1,)."""

    col: Tensor
    """The rows that these edges come from, (E,)."""

    order: Tensor
    """Their places among the edges of the graph, (E,)."""


def weighted_spmm(
    crow: Tensor,
    col: Tensor,
    weight: Tensor,
    dense: Tensor,
    *,
    transpose: Transposed | None = None,
) -> Tensor:
    """Return the sum over the edges of each row of their weight times a row of `dense`.

    `crow` (N + 1,) and `col` (E,) are a graph in CSR form, int32 or int64 each; edges may repeat.
    `weight` is (E,), `dense` (M, d), the result (N, d), zero for rows without edges. float16 and
    bfloat16 are added up in float32. Differentiable any number of times in `weight` and `dense`.
    The gradient of `dense` is a product with the transposed graph, which is sorted in each backward
    pass unless `transpose`, that is `transpose_csr(crow, col, M)`, is given; it is not checked to
    be that. Each row is summed in one order for any number of threads. NaN and inf
    spread along edges only. Time O(E d), memory O(N d), in the backward pass O(E + M d): no E x d
    tensor but in the reference, which runs without Numba. Raises `ValueError` naming what does not
    fit.

    >>> crow, col = torch.tensor([0, 2, 2]), torch.tensor([0, 1])
    >>> weighted_spmm(crow, col, torch.tensor([0.5, 2.0]), torch.eye(2))
    tensor([[0.5000, 2.0000],
            [0.0000, 0.0000]])
    """
    _check_graph(crow, col)
    if weight.shape != col.shape or dense.dim() != 2:
        raise ValueError(
            f"`weight` must be {tuple(col.shape)}, as `col`, and `dense` (M, d), got "
            f"{tuple(weight.shape)} and {tuple(dense.shape)}"
        )
    require_one_kind("weight", weight, "dense", dense)
    _check_devices(dense, crow=crow, col=col)
    if transpose is not None:
        _check_transpose(transpose, col, dense)
    out = ops.weighted_spmm(crow, col, _wide(weight), _wide(dense), transpose)
    return out.to(dense.dtype)


def edge_dot(u: Tensor, v: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """Return the dot products of the rows of `u` and `v` at both ends of each edge.

    `u` is (N, d), `v` (M, d), `row` and `col` (E,) int32 or int64 in any order; the result is (E,).
    float16 and bfloat16 are added up in float32. Differentiable any number of times in `u` and
    `v`, whose gradients are summed in one order for any number of threads. NaN and
    inf reach the edges of their rows only. Time O(E d), memory O(E), in the backward pass
    O(E + N d + M d): no E x d tensor but in the reference, which runs without Numba. Raises
    `ValueError` naming what does not fit.

    >>> edge_dot(torch.eye(2), torch.ones(1, 2), torch.tensor([1, 0]), torch.tensor([0, 0]))
    tensor([1., 1.])
    """
    if u.dim() != 2 or v.dim() != 2 or u.shape[1] != v.shape[1]:
        raise ValueError(
            f"`u` must be (N, d) and `v` (M, d), got {tuple(u.shape)} and {tuple(v.shape)}"
        )
    require_one_kind("u", u, "v", v)
    _check_indices("row", row)
    _check_indices("col", col)
    if row.shape != col.shape:
        raise ValueError(
            f"`row` and `col` must have one length, got {row.shape[0]} and {col.shape[0]}"
        )
    _check_devices(u, row=row, col=col)
    return ops.edge_dot(_wide(u), _wide(v), row, col).to(u.dtype)


def transpose_csr(crow: Tensor, col: Tensor, columns: int) -> Transposed:
    """Return the graph (N, `columns`) seen from its columns.

    `crow` (N + 1,) and `col` (E,) are int32 or int64; the results are in the dtype of `crow`.
    Edges of one column keep their order: a stable counting sort, in time and memory
    O(E + N + columns). No gradient. Raises `ValueError` naming what does not fit.

    >>> transpose_csr(torch.tensor([0, 2, 3]), torch.tensor([1, 0, 1]), 2)
    Transposed(crow=tensor([0, 1, 3]), col=tensor([0, 0, 1]), order=tensor([1, 0, 2]))
    """
    _check_graph(crow, col)
    if columns < 0:
        raise ValueError(f"`columns` must not be negative, got {columns}")
    _check_devices(crow, col=col)
    return Transposed(*ops.transpose_csr(crow, col, columns))


def _wide(x: Tensor) -> Tensor:
    return x if x.itemsize >= 4 else x.float()


def _check_graph(crow: Tensor, col: Tensor) -> None:
    _check_indices("crow", crow)
    _check_indices("col", col)
    if not crow.shape[0]:
        raise ValueError("`crow` must be (N + 1,), got (0,)")


def _check_indices(name: str, indices: Tensor) -> None:
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"`{name}` must have one dimension and be int32 or int64, got "
            f"{tuple(indices.shape)} of {indices.dtype}"
        )


def _check_devices(table: Tensor, **indices: Tensor) -> None:
    for name, tensor in indices.items():
        if tensor.device != table.device:
            raise ValueError(
                f"`{name}` must be on {table.device} as the rest, got it on {tensor.device}"
            )


def _check_transpose(transpose: Transposed, col: Tensor, dense: Tensor) -> None:
    shapes = [tuple(part.shape) for part in transpose]
    wanted = [(dense.shape[0] + 1,), tuple(col.shape), tuple(col.shape)]
    if shapes != wanted:
        raise ValueError(f"`transpose` must hold tensors of {wanted}, got {shapes}")
    for name, part in zip(Transposed._fields, transpose, strict=True):
        _check_indices(f"transpose.{name}", part)
        _check_devices(dense, **{f"transpose.{name}": part})
