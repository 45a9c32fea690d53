"""Sparse codes on a CPU: few elements are looked at twice, and sums run over contiguous features.

Shapes are those of `reference`. Tensors are contiguous float32 or float64.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unweave.kernels.loops import GRAIN, Loop
from unweave.kernels.sparse import reference

RUN = 32
"""Elements of a row whose maximum is taken together."""


def topk(x: Tensor, k: int) -> Tensor:
    """Return the indices (B, k) of the largest elements, largest first, equal ones by index.

    A row is split into 2 k sets, whose k-th largest maximum is a lower bound: only what reaches it
    is sorted, and of what equals it no more than k.
    """
    found = torch.empty(len(x), k, dtype=torch.int64)
    if found.numel():
        _best(*x.shape, x, 2 * k, found)
    return found


def batch_topk(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return `indices` (count,) and `crow` of the largest elements of all rows.

    The count-th largest maximum of runs is a lower bound of the least element that is taken: what
    is larger is collected, and the exact threshold found among it. When too few are larger, the
    bound itself is the threshold.
    """
    if not count:
        return torch.empty(0, dtype=torch.int64), torch.zeros(len(x) + 1, dtype=torch.int64)
    maxima = _maxima(x)
    sample = maxima if count <= maxima.numel() else x
    bound = _kth_largest(sample.numpy(), count)
    if np.isnan(bound):
        return reference.batch_topk(x, count)
    bounds, none = x.new_full((len(x),), bound), torch.zeros(len(x), dtype=torch.int64)
    values, columns, crow = _collect(x, maxima, bounds, none)
    missing = count - len(columns)
    if missing <= 0:
        threshold = _kth_largest(values.numpy(), count)
        if np.isnan(threshold):
            return reference.batch_topk(x, count)
        return _trimmed(values, columns, crow, threshold, count)
    equal = (x == bound).sum(1)
    quota = (missing - (equal.cumsum(0) - equal)).clamp(min=0).minimum(equal)
    return _collect(x, maxima, bounds, quota)[1:]


def above(x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return `indices` and `crow` of the elements that are larger than `threshold`."""
    if np.isnan(threshold) or not x.numel():
        return reference.above(x, torch.tensor(threshold, dtype=x.dtype))
    maxima, bounds = _maxima(x), x.new_full((len(x),), threshold)
    none = torch.zeros(len(x), dtype=torch.int64)
    return _collect(x, maxima, bounds, none)[1:]


def decode(values: Tensor, indices: Tensor, crow: Tensor, dictionary: Tensor) -> Tensor:
    """Return the sums (B, d) of the rows' entries."""
    out = dictionary.new_empty(len(crow) - 1, dictionary.shape[1])
    _sums.over(_parts(crow, dictionary.shape[1]), values, indices, crow, dictionary, out)
    return out


def encode(x: Tensor, weight: Tensor, indices: Tensor, crow: Tensor) -> Tensor:
    """Return the products (n,) of rows of `x` (B, d) and `weight` (F, d)."""
    out = x.new_empty(len(indices))
    _products.over(_parts(crow, x.shape[1]), x, weight, indices, crow, out)
    return out


def scatter(values: Tensor, indices: Tensor, crow: Tensor, x: Tensor, features: int) -> Tensor:
    """Return, for each feature, the sum (F, d) of `values` (n,) times their rows of `x` (B, d).

    Entries are put in order of their feature, so each sum is made by one thread in one order.
    """
    order, members, starts = _by_feature(indices, crow, features)
    out = x.new_empty(features, x.shape[1])
    _sums.over(_parts(starts, x.shape[1]), values[order], members, starts, x, out)
    return out


def decode_backward(
    grad: Tensor, values: Tensor, indices: Tensor, crow: Tensor, dictionary: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `encode` of the gradient (B, d) and its `scatter`, which read it together."""
    order, members, starts = _by_feature(indices, crow, len(dictionary))
    products, sums = torch.empty_like(values), torch.empty_like(dictionary)
    parts = _parts(starts, grad.shape[1])
    _products_and_sums.over(parts, values, order, members, starts, grad, dictionary, products, sums)
    return products, sums


def _by_feature(indices: Tensor, crow: Tensor, features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return entries in order of their feature, their rows, and where each feature starts."""
    starts = _from_zero(indices.bincount(minlength=features))
    order = torch.empty_like(indices)
    _counted.over([0, len(indices)], indices, starts.clone(), order)
    return order, reference.rows(crow, len(indices))[order], starts


def _maxima(x: Tensor) -> Tensor:
    """Return the maximum of each run of a row, (B, runs), NaN where there is one."""
    whole = x.shape[1] // RUN * RUN
    maxima = x[:, :whole].unflatten(1, (whole // RUN, RUN)).amax(2)
    return maxima if whole == x.shape[1] else torch.cat([maxima, x[:, whole:].amax(1, True)], 1)


def _kth_largest(sample: np.ndarray, k: int) -> float:
    """Return the k-th largest element, to which NaN is largest."""
    place = sample.size - k
    return float(np.partition(sample, place, axis=None)[place])


def _collect(
    x: Tensor, maxima: Tensor, bounds: Tensor, quota: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, `indices` and `crow` of what is larger than the bound of its row.

    Of what equals it, the first `quota` (B,) are included. Each thread writes without gaps into
    room for all elements of the runs that it may find, most of which is never touched.
    """
    room = _from_zero((~(maxima <= bounds[:, None])).sum(1) * RUN + quota)
    values, columns = x.new_empty(int(room[-1])), torch.empty(int(room[-1]), dtype=torch.int64)
    counts = torch.empty(len(x), dtype=torch.int64)
    parts = _parts(torch.arange(len(x) + 1) * x.shape[1], 1)
    _places.over(parts, x, maxima, bounds, RUN, quota, room, values, columns, counts)
    crow = _from_zero(counts)
    used = [
        slice(int(room[first]), int(room[first] + crow[last] - crow[first]))
        for first, last in pairwise(parts)
    ]
    return (
        torch.cat([values[part] for part in used]),
        torch.cat([columns[part] for part in used]),
        crow,
    )


def _trimmed(
    values: Tensor, columns: Tensor, crow: Tensor, threshold: float, count: int
) -> tuple[Tensor, Tensor]:
    """Keep the `count` largest entries: those above `threshold`, and the first that equal it."""
    above = ~(values.numpy() <= threshold)
    kept, counts = columns.new_empty(count), torch.empty(len(crow) - 1, dtype=torch.int64)
    ties = count - int(above.sum())
    _kept.over([0, len(counts)], values, columns, crow, threshold, ties, kept, counts)
    return kept, _from_zero(counts)


def _from_zero(counts: Tensor) -> Tensor:
    """Return the sums of what comes before each place, and the total: (n + 1,)."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])


def _parts(starts: Tensor, width: int) -> list[int]:
    """Return bounds of groups of rows with about as many entries each, one for each thread."""
    work = starts + torch.arange(len(starts))
    total = int(work[-1])
    threads = max(1, min(torch.get_num_threads(), total * width // GRAIN))
    wanted = torch.tensor([total * part // threads for part in range(1, threads)])
    return [0, *torch.searchsorted(work, wanted).tolist(), len(starts) - 1]


@Loop
def _places(
    first: int,
    last: int,
    x: Any,
    maxima: Any,
    bounds: Any,
    length: int,
    quota: Any,
    room: Any,
    values: Any,
    columns: Any,
    counts: Any,
) -> None:
    """Write what is larger than the bound, and the first that equal it."""
    width, place = x.shape[1], room[first]
    for row in range(first, last):
        elements, bound, left, start = x[row], bounds[row], quota[row], place
        for run in range(maxima.shape[1]):
            if maxima[row, run] < bound or (left == 0 and maxima[row, run] == bound):
                continue
            for column in range(run * length, min(run * length + length, width)):
                value = elements[column]
                if value < bound or (left == 0 and value == bound):
                    continue
                left -= value == bound
                values[place] = value
                columns[place] = column
                place += 1
        counts[row] = place - start


@Loop
def _kept(
    first: int,
    last: int,
    values: Any,
    columns: Any,
    crow: Any,
    threshold: float,
    ties: int,
    kept: Any,
    counts: Any,
) -> None:
    """Write the columns of entries above the threshold, and of the first that equal it."""
    place = 0
    for row in range(first, last):
        start = place
        for entry in range(crow[row], crow[row + 1]):
            equal = values[entry] == threshold
            if not values[entry] <= threshold or (equal and ties > 0):
                ties -= equal
                kept[place] = columns[entry]
                place += 1
        counts[row] = place - start


@Loop
def _best(first: int, last: int, x: Any, sets: int, found: Any) -> None:
    """Write the largest of each row: bound, collect, merge sort."""
    width, k = x.shape[1], found.shape[1]
    tops = np.empty(sets, x.dtype)
    order, merged = np.empty(width, np.int64), np.empty(width, np.int64)
    for row in range(first, last):
        elements = x[row]

        # Element i is in set i modulo `sets`; NaN is in none.
        tops[:] = -np.inf
        for base in range(0, width - sets + 1, sets):
            part = elements[base : base + sets]
            for place in range(sets):
                tops[place] = part[place] if part[place] > tops[place] else tops[place]
        low, high = 0, sets - 1
        while low < high:
            pivot, left, right = tops[(low + high) // 2], low, high
            while left <= right:
                while tops[left] < pivot:
                    left += 1
                while tops[right] > pivot:
                    right -= 1
                if left <= right:
                    tops[left], tops[right] = tops[right], tops[left]
                    left += 1
                    right -= 1
            if k <= right:
                high = right
            elif k >= left:
                low = left
            else:
                break
        bound = tops[k]

        count, ties = 0, k
        for base in range(0, width, 64):
            reached = 0
            for column in range(base, min(base + 64, width)):
                reached |= not elements[column] < bound
            if not reached:
                continue
            for column in range(base, min(base + 64, width)):
                value = elements[column]
                if value < bound or (ties == 0 and value == bound):
                    continue
                ties -= value == bound
                order[count] = column
                count += 1

        length = 1
        while length < count:
            for start in range(0, count, 2 * length):
                middle, end = min(start + length, count), min(start + 2 * length, count)
                left, right = start, middle
                for place in range(start, end):
                    take = left == middle
                    if left < middle and right < end:
                        one, other = elements[order[left]], elements[order[right]]
                        take = other > one or (other != other and one == one)
                    if take:
                        merged[place] = order[right]
                        right += 1
                    else:
                        merged[place] = order[left]
                        left += 1
            order, merged = merged, order
            length *= 2
        found[row] = order[:k]


@Loop
def _sums(
    first: int, last: int, values: Any, indices: Any, starts: Any, dictionary: Any, out: Any
) -> None:
    """Add rows of the dictionary times values, four at a time."""
    width = dictionary.shape[1]
    for row in range(first, last):
        total = out[row]
        total[:] = 0
        start, end = starts[row], starts[row + 1]
        fours = start + (end - start) // 4 * 4
        for entry in range(start, fours, 4):
            one, two = dictionary[indices[entry]], dictionary[indices[entry + 1]]
            three, four = dictionary[indices[entry + 2]], dictionary[indices[entry + 3]]
            a, b, c, d = (
                values[entry],
                values[entry + 1],
                values[entry + 2],
                values[entry + 3],
            )
            for column in range(width):
                total[column] += (
                    a * one[column] + b * two[column] + (c * three[column] + d * four[column])
                )
        for entry in range(fours, end):
            one, a = dictionary[indices[entry]], values[entry]
            for column in range(width):
                total[column] += a * one[column]


@partial(Loop, fastmath=True)
def _products(
    first: int, last: int, x: Any, weight: Any, indices: Any, starts: Any, out: Any
) -> None:
    """Multiply a row with each of its rows of weights."""
    for row in range(first, last):
        left = x[row]
        for entry in range(starts[row], starts[row + 1]):
            right = weight[indices[entry]]
            total = left[:0].sum()
            for column in range(x.shape[1]):
                total += left[column] * right[column]
            out[entry] = total


@Loop
def _counted(first: int, last: int, indices: Any, places: Any, order: Any) -> None:
    """Sort entries by feature, keeping their order, from the first place of each feature."""
    for entry in range(first, last):
        feature = indices[entry]
        order[places[feature]] = entry
        places[feature] += 1


@partial(Loop, fastmath=True)
def _products_and_sums(
    first: int,
    last: int,
    values: Any,
    order: Any,
    members: Any,
    starts: Any,
    x: Any,
    dictionary: Any,
    products: Any,
    sums: Any,
) -> None:
    """Multiply rows with their feature's, and add them up times values, two at a time."""
    width = x.shape[1]
    for feature in range(first, last):
        total, left = sums[feature], dictionary[feature]
        total[:] = 0
        start, end = starts[feature], starts[feature + 1]
        for entry in range(start, end - 1, 2):
            one, two = x[members[entry]], x[members[entry + 1]]
            a, b = values[order[entry]], values[order[entry + 1]]
            p = q = left[:0].sum()
            for column in range(width):
                p += left[column] * one[column]
                q += left[column] * two[column]
                total[column] += a * one[column] + b * two[column]
            products[order[entry]] = p
            products[order[entry + 1]] = q
        if (end - start) % 2:
            one, a = x[members[end - 1]], values[order[end - 1]]
            p = left[:0].sum()
            for column in range(width):
                p += left[column] * one[column]
                total[column] += a * one[column]
            products[order[end - 1]] = p
