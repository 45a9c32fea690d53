"""Groupwise quantization in blocks of rows, and compiled loops that read the codes as they lie.

Shapes are those of `reference`. Quantization, which is done once, is its definition block by block
on any device. Its temporaries are many, so its blocks are small.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unweave.kernels.groupwise import reference
from unweave.kernels.loops import Loop

BLOCK = 1 << 22
"""Elements of a block of weights: large, since torch's threads and a loop's take turns."""

FEW = 16
"""The most rows whose products are taken straight from the codes."""


def quantize(
    weight: Tensor, bits: int, group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, packed if of 4 bits, scales and zeros, each (..., of a row); no zeros: (0,)."""
    *lead, width = weight.shape
    rows = weight.reshape(prod(lead), width)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    groups, size = -(-width // group_size), -(-width * bits // 8)
    codes = rows.new_empty(len(rows), size, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales = rows.new_empty(len(rows), groups, dtype=dtype)
    zeros = scales.new_empty(0) if symmetric else torch.empty_like(scales)
    for part in blocks(len(rows), 16 * width):
        block = rows[part].to(dtype)
        _require_finite(block, part.start, weight)
        found, scales[part], shifts = reference.quantize(block, bits, group_size, symmetric)
        codes[part] = found if bits == 8 else reference.pack(found)
        if shifts is not None:
            zeros[part] = shifts
    shapes = [(*lead, size), (*lead, groups), (0,) if symmetric else (*lead, groups)]
    return codes.view(shapes[0]), scales.view(shapes[1]), zeros.view(shapes[2])


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, width: int
) -> Tensor:
    """Return the weights (R, W) in the dtype of `scales`."""
    rows = scales.new_empty(len(codes), width + width % 2 if bits == 4 else width)
    dequantize_rows(*rows.shape, bits, *_contiguous(codes, scales, zeros), group_size, rows)
    return rows[:, :width].contiguous()


def product(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """Return x @ W^T (N, R) of `x` (N, W), both of the dtype of `scales`."""
    result = x.new_empty(len(x), len(codes))
    if len(x) <= FEW:
        loop = product_row if len(x) == 1 else product_rows
        work = x.shape[1] * (1 + len(x))
        shared = _contiguous(codes, scales, zeros)
        loop(len(codes), work, bits, _ordered(x, bits), *shared, group_size, result)
        return result
    own = codes, scales, zeros, bits, group_size, x.shape[1]
    for part in blocks(len(codes), x.shape[1]):
        torch.mm(x, _block(part, *own).T, out=result[:, part])
    return result


def product_back(
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    width: int,
) -> Tensor:
    """Return grad @ W (N, W) of `grad` (N, R)."""
    result = grad.new_zeros(len(grad), width)
    own = codes, scales, zeros, bits, group_size, width
    for part in blocks(len(codes), width):
        result.addmm_(grad[:, part], _block(part, *own))
    return result


def blocks(rows: int, width: int) -> list[slice]:
    """Return slices of rows that fill a block."""
    step = max(1, BLOCK // max(1, width))
    return [slice(first, first + step) for first in range(0, rows, step)]


def _block(
    part: slice, codes: Tensor, scales: Tensor, zeros: Tensor | None, *settings: int
) -> Tensor:
    """Return the weights of some rows."""
    shifts = None if zeros is None else zeros[part]
    return dequantize(codes[part], scales[part], shifts, *settings)


def _contiguous(*arrays: Tensor | None) -> list[Any]:
    return [None if array is None else array.contiguous() for array in arrays]


def _ordered(x: Tensor, bits: int) -> Tensor:
    """Return `x` (N, W) in the order in which a loop unpacks a row."""
    if bits == 8:
        return x.contiguous()
    x = torch.nn.functional.pad(x, (0, x.shape[1] % 2))
    return torch.cat([x[:, ::2], x[:, 1::2]], 1)


def _require_finite(block: Tensor, first: int, weight: Tensor) -> None:
    wrong = (~block.isfinite()).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        place = *np.unravel_index(first + row, weight.shape[:-1]), column
        raise ValueError(
            f"`weight` must be finite, got {block[row, column].item()} at "
            f"{tuple(int(index) for index in place)}"
        )


@Loop
def dequantize_rows(
    first: int,
    last: int,
    bits: int,
    codes: Any,
    scales: Any,
    zeros: Any,
    group_size: int,
    rows: Any,
) -> None:
    """Write code * scale + zero of each row."""
    size = group_size * bits // 8
    shift = rows.dtype.type(0)
    for r in range(first, last):
        for g in range(scales.shape[1]):
            scale = scales[r, g]
            if zeros is not None:
                shift = zeros[r, g]
            q = codes[r, g * size : (g + 1) * size]
            w = rows[r, g * group_size : (g + 1) * group_size]
            if bits == 8:
                for j in range(len(q)):
                    w[j] = q[j] * scale + shift
            else:
                for j in range(len(q)):
                    w[2 * j] = np.int8((q[j] & 15) - 8) * scale + shift
                    w[2 * j + 1] = np.int8((q[j] >> 4) - 8) * scale + shift


@partial(Loop, fastmath=True)
def product_row(
    first: int,
    last: int,
    bits: int,
    x: Any,
    codes: Any,
    scales: Any,
    zeros: Any,
    group_size: int,
    result: Any,
) -> None:
    """Write the products of one `x` with each row, a group of codes at a time."""
    size = group_size * bits // 8
    for r in range(first, last):
        total = x.dtype.type(0)
        for g in range(scales.shape[1]):
            q = codes[r, g * size : (g + 1) * size]
            v = x[0, g * size : (g + 1) * size]
            high = x[0, x.shape[1] - codes.shape[1] + g * size :]
            part = x.dtype.type(0)
            ones = x.dtype.type(0)
            if bits == 8:
                for j in range(len(q)):
                    part += q[j] * v[j]
            else:
                for j in range(len(q)):
                    part += np.int8((q[j] & 15) - 8) * v[j] + np.int8((q[j] >> 4) - 8) * high[j]
            total += scales[r, g] * part
            if zeros is not None:
                for j in range(len(q)):
                    ones += v[j]
                if bits == 4:
                    for j in range(len(q)):
                        ones += high[j]
                total += zeros[r, g] * ones
        result[0, r] = total


@partial(Loop, fastmath=True)
def product_rows(
    first: int,
    last: int,
    bits: int,
    x: Any,
    codes: Any,
    scales: Any,
    zeros: Any,
    group_size: int,
    result: Any,
) -> None:
    """Write the products of all `x` with each row, whose weights are made once."""
    size = group_size * bits // 8
    shift = x.dtype.type(0)
    weights = np.empty(x.shape[1], x.dtype)
    for r in range(first, last):
        for g in range(scales.shape[1]):
            scale = scales[r, g]
            if zeros is not None:
                shift = zeros[r, g]
            q = codes[r, g * size : (g + 1) * size]
            low = weights[g * size : (g + 1) * size]
            if bits == 8:
                for j in range(len(q)):
                    low[j] = q[j] * scale + shift
            else:
                high = weights[codes.shape[1] + g * size :]
                for j in range(len(q)):
                    low[j] = np.int8((q[j] & 15) - 8) * scale + shift
                    high[j] = np.int8((q[j] >> 4) - 8) * scale + shift
        for n in range(x.shape[0]):
            v = x[n]
            total = x.dtype.type(0)
            for j in range(len(weights)):
                total += weights[j] * v[j]
            result[n, r] = total
