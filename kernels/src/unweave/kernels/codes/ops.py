"""The operators behind the public functions; their integer results have no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unweave.kernels.backends import operator, resolve
from unweave.kernels.codes import cpu, gpu, reference

FAST = ("cpu", "cuda")
"""Devices with a fast form."""

NEEDS = {"cpu": "numba", "cuda": "cupy"}
"""The library that the fast form of `nearest_value` needs."""


def nearest(x: Tensor, codebook: Tensor, k: int) -> Tensor:
    """Return the indices (N, k) of the codes nearest to `x` (N, d)."""
    if resolve(x.device, FAST) == "reference":
        return reference.nearest(x, codebook, k)
    indices: Tensor = _nearest(x, codebook, k)
    return indices


def nearest_value(z: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the one of its column's `values` (D, V) that is nearest to `z` (N, D), and its index.

    It has the gradient of `values`.
    """
    if resolve(z.device, FAST, NEEDS) == "reference":
        return reference.nearest_value(z, values)
    codes, indices = _nearest_value(z, values)
    return codes, indices


def _empty_nearest(x: Tensor, codebook: Tensor, k: int) -> Tensor:
    return x.new_empty(x.shape[0], k, dtype=torch.int64)


def _empty_nearest_value(z: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(z.shape, dtype=torch.int64)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.shape = inputs[1].shape


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[None, Tensor]:
    (indices,) = ctx.saved_tensors
    dims, count = ctx.shape
    places = indices + count * torch.arange(dims, device=grad.device)
    sums = grad.new_zeros(dims * count).index_add(0, places.reshape(-1), grad.reshape(-1))
    return None, sums.reshape(ctx.shape)


_nearest = operator("nearest_code", cpu.nearest, _empty_nearest)
_nearest_value = operator("nearest_value", cpu.nearest_value, _empty_nearest_value)
_nearest.register_kernel("cuda", gpu.nearest)
_nearest_value.register_kernel("cuda", gpu.nearest_value)
_nearest_value.register_autograd(_gradients, setup_context=_keep)
