"""Quantize the weights of linear layers by groups, get them back, and multiply with them."""

from __future__ import annotations

from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from unweave.kernels.backends import resolve
from unweave.kernels.groupwise import ops, reference

FAST = ("cpu", "cuda")
"""Devices with a fast form."""

NEEDS = {"cpu": "numba", "cuda": "cupy"}


class GroupQuantized(NamedTuple):
    """A weight (..., in) in few bits: element i of a row is code_i * scale + zero of its group.

    The group of element i is i // group_size. The tensors and the three settings are all there is
    to keep in a file.
    """

    codes: Tensor
    """Whole numbers: int8 (..., in) for 8 bits. For 4 bits uint8 (..., ceil(in / 2)), two codes a
    byte, each plus 8: that of the even place in the low half, that of the odd in the high half.
    """

    scales: Tensor
    """The step between codes, (..., ceil(in / group_size)), float32, or float64 for float64."""

    zeros: Tensor | None
    """The value of code 0, as `scales`; None if it is 0 everywhere."""

    shape: tuple[int, ...]
    """The shape of the weight."""

    bits: int
    """8 or 4."""

    group_size: int
    """How many neighbours share a scale."""

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.zeros) if t is not None)


def quantize_groupwise(
    weight: Tensor,
    *,
    bits: Literal[8, 4] = 8,
    group_size: int = 64,
    symmetric: bool = True,
) -> GroupQuantized:
    """Return `weight` (..., in) as codes of `bits` bits and a scale for each group.

    Groups are `group_size` neighbours of the last dimension; the last may be shorter, so that a
    `group_size` of in or more is one group a row. Symmetric codes run from -127 to 127 or -7 to 7
    and the largest magnitude of a group is the last of them; asymmetric codes run from -128 to 127
    or -8 to 7 between the least and the largest element. Codes are rounded to nearest, ties to
    even. Groups of zeros, and asymmetric groups of one constant, are exact; any other element is
    off by half a scale at most, beside rounding: 4 eps times the largest magnitude of the group,
    and the smallest normal number.

    Scales of float16 and bfloat16 weights are float32, since float16 cannot hold small ones.
    Magnitudes may reach half of the largest number of the dtype. No gradient. Time O(elements),
    memory that of the result and a block of rows. Raises `ValueError` naming what does not fit,
    or where `weight` is not finite.

    >>> quantize_groupwise(torch.tensor([[0.0, 1.0, -7.0]]), bits=4).codes
    tensor([[152,   1]], dtype=torch.uint8)
    """
    if not weight.dim() or not weight.is_floating_point():
        raise ValueError(
            f"`weight` must be floating (..., in), got {weight.dtype} {tuple(weight.shape)}"
        )
    _check_settings(bits, group_size)
    codes, scales, zeros = ops.quantize(weight.detach(), bits, group_size, symmetric)
    return GroupQuantized(
        codes, scales, None if symmetric else zeros, tuple(weight.shape), bits, group_size
    )


def dequantize_groupwise(quantized: GroupQuantized, dtype: torch.dtype | None = None) -> Tensor:
    """Return the weight (..., in) that `quantized` stands for, code * scale + zero.

    It is computed in the dtype of the scales, or `dtype` if that is wider, then cast to `dtype`;
    None keeps that of the scales. No gradient. Time and memory O(elements). Raises `ValueError`
    where the fields of `quantized` do not fit together.

    >>> dequantize_groupwise(quantize_groupwise(torch.tensor([[0.0, 1.0, -7.0]]), bits=4))
    tensor([[ 0.,  1., -7.]])
    """
    _check(quantized)
    dtype = dtype or quantized.scales.dtype
    if not dtype.is_floating_point:
        raise ValueError(f"`dtype` must be floating, got {dtype}")
    *lead, width = quantized.shape
    wide = torch.promote_types(torch.promote_types(dtype, quantized.scales.dtype), torch.float32)
    codes, scales, zeros, bits, group_size = _rows(quantized, wide)
    defined = resolve(codes.device, FAST, NEEDS) == "reference"
    dequantize = reference.dequantize if defined else ops.dequantize
    rows: Tensor = dequantize(codes, scales, zeros, bits, group_size, width)
    return rows.reshape(*lead, width).to(dtype)


def quantized_matmul(x: Tensor, quantized: GroupQuantized) -> Tensor:
    """Return x @ W^T (..., out) of `x` (..., in) and the weight W (out, in) of `quantized`.

    The result is that of `dequantize_groupwise(quantized, x.dtype)` up to rounding, but W is never
    stored: up to 16 rows of `x` are multiplied straight from the codes, with one row of weights at
    a time and a result that does not depend on the number of threads; more rows by blocks of W of
    16 MiB, as torch multiplies. float16 and bfloat16 `x` are computed in float32 and cast back. The
    gradient is that of `x` only, and is differentiable again. NaN and infinities in `x` spread as
    in a product. Time O(N in out). Off the CPU or without Numba, W is dequantized in full. Raises
    `ValueError` naming what does not fit.

    >>> quantized_matmul(torch.ones(1, 2), quantize_groupwise(torch.tensor([[1.0, 127.0]])))
    tensor([[128.]])
    """
    _check(quantized)
    if len(quantized.shape) != 2:
        raise ValueError(f"`quantized` must be of a weight (out, in), got {quantized.shape}")
    out, width = quantized.shape
    if not x.dim() or x.shape[-1] != width or not x.is_floating_point():
        raise ValueError(f"`x` must be floating (..., {width}), got {x.dtype} {tuple(x.shape)}")
    if x.device != quantized.codes.device:
        raise ValueError(
            f"`x` and `quantized` must be on one device, got {x.device} and "
            f"{quantized.codes.device}"
        )
    *lead, _ = x.shape
    rows = x.reshape(prod(lead), width)
    rows = rows.to(torch.promote_types(x.dtype, torch.float32))
    defined = resolve(x.device, FAST, NEEDS) == "reference"
    product = reference.product if defined else ops.product
    result: Tensor = product(rows, *_rows(quantized, rows.dtype))
    return result.reshape(*lead, out).to(x.dtype)


def _rows(
    quantized: GroupQuantized, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
    """Return the fields as matrices of rows, with scales and zeros in `dtype`."""
    codes, scales, zeros, shape, bits, group_size = quantized
    rows = prod(shape[:-1])
    scales = scales.detach().reshape(rows, scales.shape[-1]).to(dtype)
    if zeros is not None:
        zeros = zeros.detach().reshape(scales.shape).to(dtype)
    return codes.reshape(rows, codes.shape[-1]), scales, zeros, bits, group_size


def _check(quantized: GroupQuantized) -> None:
    codes, scales, zeros, shape, bits, group_size = quantized
    _check_settings(bits, group_size)
    *lead, width = shape
    kind = torch.int8 if bits == 8 else torch.uint8
    size, groups = -(-width * bits // 8), -(-width // group_size)
    if codes.shape != (*lead, size) or codes.dtype != kind:
        raise ValueError(
            f"`quantized.codes` must be {kind} {(*lead, size)} for {bits} bits of {tuple(shape)}, "
            f"got {codes.dtype} {tuple(codes.shape)}"
        )
    for name, per_group in (("scales", scales), ("zeros", zeros)):
        if per_group is None:
            continue
        if per_group.shape != (*lead, groups) or not per_group.is_floating_point():
            raise ValueError(
                f"`quantized.{name}` must be floating {(*lead, groups)} for groups of "
                f"{group_size} of {tuple(shape)}, got {per_group.dtype} {tuple(per_group.shape)}"
            )


def _check_settings(bits: int, group_size: int) -> None:
    if bits not in (8, 4):
        raise ValueError(f"`bits` must be 8 or 4, got {bits}")
    if group_size < 1 or (bits == 4 and group_size % 2):
        raise ValueError(
            f"`group_size` must be positive, and even for 4 bits, got {group_size} for {bits} bits"
        )
