"""Groupwise quantization on a GPU: weights are made from their codes a block at a time.

Shapes are those of `reference`. Products are torch's, on which its setting for TF32 acts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from unweave.kernels.cuda import Module

MODULE = Module(Path(__file__).with_name("kernels.cu"))

BLOCK = 1 << 24
"""Elements of a block of weights."""


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, width: int
) -> Tensor:
    """Return the weights (R, W) in the dtype of `scales`."""
    out = scales.new_empty(len(codes), width)
    shifts = None if zeros is None else zeros.contiguous()
    tensors = codes.contiguous(), scales.contiguous(), shifts, out
    sizes = width, group_size, scales.shape[1]
    MODULE.launch(f"dequantize_{bits}", [scales.dtype], out.numel(), *tensors, *sizes)
    return out


def product(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """Return x @ W^T (N, R) of `x` (N, W), both of the dtype of `scales`."""
    result = x.new_empty(len(x), len(codes))
    for part, weights in _blocks(codes, scales, zeros, bits, group_size, x.shape[1]):
        result[:, part] = x @ weights.T
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
    for part, weights in _blocks(codes, scales, zeros, bits, group_size, width):
        result.addmm_(grad[:, part], weights)
    return result


def _blocks(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, width: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of rows and their weights."""
    step = max(1, BLOCK // max(1, width))
    for first in range(0, len(codes), step):
        part = slice(first, first + step)
        shifts = None if zeros is None else zeros[part]
        yield part, dequantize(codes[part], scales[part], shifts, bits, group_size, width)
