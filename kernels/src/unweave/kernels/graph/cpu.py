"""Graph products on a CPU: loops over rows, split so that each thread has as many edges.

Each row is summed by one thread in one order. To find the least and the largest
index takes a few hundredths of the time of a product, so indices are checked before.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unweave.kernels.graph import reference
from unweave.kernels.loops import GRAIN, Loop


def weighted_spmm(crow: Tensor, col: Tensor, weight: Tensor, dense: Tensor) -> Tensor:
    """Return, for each row, the sum (N, d) over its edges of `weight` (E,) times `dense[col]`."""
    reference.require_offsets(crow, len(col))
    reference.require_below("col", col, len(dense))
    out = dense.new_empty(len(crow) - 1, dense.shape[1])
    _sums.over(_parts(crow, dense.shape[1]), *_contiguous(crow, col, weight, dense), out)
    return out


def edge_dot(u: Tensor, v: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """Return the dot products (E,) of `u[row]` and `v[col]`."""
    reference.require_below("row", row, len(u))
    reference.require_below("col", col, len(v))
    out = u.new_empty(len(row))
    _dots(-(-len(row) // 4), 4 * u.shape[1], *_contiguous(u, v, row, col), out)
    return out


def sorted_edges(keys: Tensor, values: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `reference.sorted_edges` does, by counting: O(E + bins)."""
    reference.require_below("col", keys, bins)
    starts = values.new_zeros(bins + 1)
    ordered, order = torch.empty_like(values), torch.empty_like(values)
    arrays = (*_contiguous(keys, values), starts, starts.new_empty(bins), ordered, order)
    _counting_sort.over([0, len(keys)], *arrays)
    return starts, ordered, order


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def _parts(crow: Tensor, width: int) -> list[int]:
    """Return bounds of groups of rows with about as many edges each, one for each thread."""
    count = len(crow) - 1
    total = int(crow[-1]) + count
    threads = max(1, min(torch.get_num_threads(), count, total * width // GRAIN))
    inner = [
        bisect_left(range(count), total * part // threads, key=lambda row: int(crow[row]) + row)
        for part in range(1, threads)
    ]
    return [0, *inner, count]


@Loop
def _sums(first: int, last: int, crow: Any, col: Any, weight: Any, dense: Any, out: Any) -> None:
    """Add up the weighted rows at the ends of edges, four at a time."""
    width = dense.shape[1]
    for row in range(first, last):
        total = out[row]
        total[:] = 0
        start, end = crow[row], crow[row + 1]
        fours = start + (end - start) // 4 * 4
        for edge in range(start, fours, 4):
            one, two = dense[col[edge]], dense[col[edge + 1]]
            three, four = dense[col[edge + 2]], dense[col[edge + 3]]
            a, b = weight[edge], weight[edge + 1]
            c, d = weight[edge + 2], weight[edge + 3]
            for feature in range(width):
                total[feature] += (a * one[feature] + b * two[feature]) + (
                    c * three[feature] + d * four[feature]
                )
        for edge in range(fours, end):
            one, a = dense[col[edge]], weight[edge]
            for feature in range(width):
                total[feature] += a * one[feature]


@partial(Loop, fastmath=True)
def _dots(first: int, last: int, u: Any, v: Any, row: Any, col: Any, out: Any) -> None:
    """Multiply the rows at both ends of each edge, four edges at a time, the same for any split."""
    width, zero = u.shape[1], out[:0].sum()
    for edge in range(4 * first, min(4 * last, len(out) // 4 * 4), 4):
        one, two, three, four = u[row[edge]], u[row[edge + 1]], u[row[edge + 2]], u[row[edge + 3]]
        a, b, c, d = v[col[edge]], v[col[edge + 1]], v[col[edge + 2]], v[col[edge + 3]]
        first_sum = second_sum = third_sum = fourth_sum = zero
        for feature in range(width):
            first_sum += one[feature] * a[feature]
            second_sum += two[feature] * b[feature]
            third_sum += three[feature] * c[feature]
            fourth_sum += four[feature] * d[feature]
        out[edge], out[edge + 1] = first_sum, second_sum
        out[edge + 2], out[edge + 3] = third_sum, fourth_sum
    for edge in range(max(4 * first, len(out) // 4 * 4), min(4 * last, len(out))):
        one, a = u[row[edge]], v[col[edge]]
        total = zero
        for feature in range(width):
            total += one[feature] * a[feature]
        out[edge] = total


@Loop
def _counting_sort(
    first: int,
    last: int,
    keys: Any,
    values: Any,
    starts: Any,
    places: Any,
    ordered: Any,
    order: Any,
) -> None:
    """Count the keys, then put each edge behind those of its key."""
    for edge in range(first, last):
        starts[keys[edge] + 1] += 1
    for key in range(len(places)):
        places[key] = starts[key]
        starts[key + 1] += starts[key]
    for edge in range(first, last):
        place = places[keys[edge]]
        places[keys[edge]] += 1
        ordered[place] = values[edge]
        order[place] = edge
