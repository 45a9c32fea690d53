"""Graph products, defined: plain torch, any device and dtype, a row of every edge stored."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_spmm(crow: Tensor, col: Tensor, weight: Tensor, dense: Tensor) -> Tensor:
    """Return, for each row, the sum (N, d) over its edges of `weight` (E,) times `dense[col]`."""
    out = dense.new_zeros(crow.shape[0] - 1, dense.shape[1])
    return out.index_add(0, rows(crow, col.shape[0]), weight[:, None] * dense[col])


def edge_dot(u: Tensor, v: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """Return the dot products (E,) of `u[row]` and `v[col]`."""
    return (u[row] * v[col]).sum(1)


def sorted_edges(keys: Tensor, values: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return where each of the `bins` keys starts (bins + 1,), and the values and places by key.

    Edges with one key keep their order. All is in the dtype of `values`.
    """
    order = keys.sort(stable=True).indices
    starts = torch.zeros(bins + 1, dtype=torch.int64, device=keys.device)
    starts[1:] = keys.bincount(minlength=bins).cumsum(0)
    return starts.to(values.dtype), values[order], order.to(values.dtype)


def rows(crow: Tensor, edges: int) -> Tensor:
    """Return the row (E,) of each edge, in the dtype of `crow`."""
    numbers = torch.arange(crow.shape[0] - 1, dtype=crow.dtype, device=crow.device)
    return numbers.repeat_interleave(crow.diff(), output_size=edges)


def require_offsets(crow: Tensor, edges: int) -> None:
    """Raise `ValueError` unless `crow` rises from 0 to the number of edges."""
    if int(crow[0]) or int(crow[-1]) != edges or bool((crow[1:] < crow[:-1]).any()):
        raise ValueError(
            f"`crow` must rise from 0 to the number of edges {edges}, got {int(crow[0])} to "
            f"{int(crow[-1])}, least step {int(crow.diff().min()) if len(crow) > 1 else None}"
        )


def require_below(name: str, indices: Tensor, size: int) -> None:
    """Raise `ValueError` unless `indices` are from 0 to `size` - 1."""
    if len(indices):
        least, most = (int(end) for end in indices.aminmax())
        if least < 0 or most >= size:
            raise ValueError(f"`{name}` must be in [0, {size}), got {least} to {most}")
