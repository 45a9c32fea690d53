"""Groupwise quantization, defined: plain torch, any device, whole matrices.

Rows are (R, W), codes whole numbers of `bits` bits with a sign, scales and zeros (R, G): one for
each group of `group_size` neighbours in a row, the last of which may be shorter.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantize(
    rows: Tensor, bits: int, group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the codes (R, W), whose float is (w - zero) / scale rounded, the scales, the zeros."""
    width, steps = rows.shape[1], 2**bits - 1
    groups = -(-width // group_size)
    places = torch.arange(groups * group_size, device=rows.device).clamp(max=width - 1)
    grouped = rows[:, places].view(len(rows), groups, group_size)
    zeros = None
    lowest, highest = -(steps // 2), steps // 2
    if symmetric:
        scales = grouped.abs().amax(2) / highest
    else:
        lowest -= 1
        low, high = grouped.aminmax(dim=2)
        scales = (high - low) / steps
        zeros = low + (high - low) / 2 + scales / 2
        grouped = grouped - zeros[:, :, None]
    divisors = torch.where(scales > 0, scales, torch.inf)[:, :, None]
    codes = (grouped / divisors).round().clamp(lowest, highest)
    return codes.to(torch.int8).flatten(1)[:, :width], scales, zeros


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, width: int
) -> Tensor:
    """Return code * scale + zero (R, W) in the dtype of `scales`, from packed codes."""
    values = unpack(codes, width) if bits == 4 else codes
    product = values.to(scales.dtype) * spread(scales, group_size, width)
    return product if zeros is None else product + spread(zeros, group_size, width)


def product(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """Return x @ W^T (N, R) of `x` (N, W)."""
    return x @ dequantize(codes, scales, zeros, bits, group_size, x.shape[1]).T


def pack(codes: Tensor) -> Tensor:
    """Return codes (R, W) of 4 bits plus 8, two to a byte (R, ceil(W / 2)): first the low bits."""
    nibbles = torch.nn.functional.pad(codes + 8, (0, codes.shape[1] % 2)).to(torch.uint8)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def unpack(packed: Tensor, width: int) -> Tensor:
    """Return the codes (R, W) that `pack` was given."""
    nibbles = torch.stack([packed & 15, packed >> 4], 2).flatten(1)[:, :width]
    return nibbles.to(torch.int8) - 8


def spread(per_group: Tensor, group_size: int, width: int) -> Tensor:
    """Return, for each element of a row (R, W), what its group has."""
    return per_group.repeat_interleave(group_size, 1)[:, :width]
