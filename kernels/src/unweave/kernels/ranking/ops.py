"""The operator behind the public function, known to autograd and to `torch.compile`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unweave.kernels.ranking import cpu


@torch.library.custom_op("unweave::logsumexp_topk", mutates_args=())
def logsumexp_topk(queries: Tensor, keys: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp (N,) and the indices (N, k) of the best keys."""
    return cpu.logsumexp_topk(queries, keys, k, scale)


@logsumexp_topk.register_fake
def _(queries: Tensor, keys: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    count = queries.shape[0]
    return queries.new_empty(count), queries.new_empty(count, k, dtype=torch.int64)


@torch.library.custom_op("unweave::logsumexp_backward", mutates_args=())
def _backward(
    grad: Tensor, queries: Tensor, keys: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return cpu.lse_backward(grad, queries, keys, lse, scale)


@_backward.register_fake
def _(
    grad: Tensor, queries: Tensor, keys: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(queries), torch.empty_like(keys)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    queries, keys, _, scale = inputs
    ctx.save_for_backward(queries, keys, output[0])
    ctx.scale = scale


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    queries, keys, lse = ctx.saved_tensors
    return *_backward(grad, queries, keys, lse, ctx.scale), None, None


logsumexp_topk.register_autograd(_gradients, setup_context=_keep)
