"""The operators behind the public functions; their integer results have no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from unweave.kernels.backends import operator, resolve
from unweave.kernels.codes import cpu, reference

FAST = ("cpu",)
"""Devices with a fast form."""


def nearest(x: Tensor, codebook: Tensor, k: int) -> Tensor:
    """Return the indices (N, k) of the codes nearest to `x` (N, d)."""
    if resolve(x.device, FAST) == "reference":
        return reference.nearest(x, codebook, k)
    indices: Tensor = _nearest(x, codebook, k)
    return indices


def nearest_value(z: Tensor, values: Tensor) -> Tensor:
    """Return the index (N, D) of the value nearest to `z` in its column's `values` (D, V)."""
    if resolve(z.device, FAST) == "reference":
        return reference.nearest_value(z, values)
    indices: Tensor = _nearest_value(z, values)
    return indices


def _empty_nearest(x: Tensor, codebook: Tensor, k: int) -> Tensor:
    return x.new_empty(x.shape[0], k, dtype=torch.int64)


def _empty_nearest_value(z: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(z, dtype=torch.int64)


_nearest = operator("nearest_code", cpu.nearest, _empty_nearest)
_nearest_value = operator("nearest_value", cpu.nearest_value, _empty_nearest_value)
