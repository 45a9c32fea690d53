"""The operators behind the public functions; their integer results have no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from unweave.kernels.backends import resolve
from unweave.kernels.codes import cpu, reference

FAST = ("cpu",)
"""Devices with a fast form."""


@torch.library.custom_op("unweave::nearest_code", mutates_args=())
def nearest(x: Tensor, codebook: Tensor, k: int) -> Tensor:
    """Return the indices (N, k) of the codes nearest to `x` (N, d)."""
    defined = resolve(x.device, FAST) == "reference"
    return reference.nearest(x, codebook, k) if defined else cpu.nearest(x, codebook, k)


@nearest.register_fake
def _(x: Tensor, codebook: Tensor, k: int) -> Tensor:
    return x.new_empty(x.shape[0], k, dtype=torch.int64)


@torch.library.custom_op("unweave::nearest_value", mutates_args=())
def nearest_value(z: Tensor, values: Tensor) -> Tensor:
    """Return the index (N, D) of the value nearest to `z` in its column's `values` (D, V)."""
    defined = resolve(z.device, FAST) == "reference"
    return reference.nearest_value(z, values) if defined else cpu.nearest_value(z, values)


@nearest_value.register_fake
def _(z: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(z, dtype=torch.int64)
