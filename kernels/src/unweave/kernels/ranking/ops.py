"""The operator behind the public function, known to autograd and to `torch.compile`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unweave.kernels.backends import operator
from unweave.kernels.ranking import cpu


def _empty_ranking(queries: Tensor, keys: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    count = queries.shape[0]
    return queries.new_empty(count), queries.new_empty(count, k, dtype=torch.int64)


def _empty_gradients(grad: Tensor, queries: Tensor, keys: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(queries), torch.empty_like(keys)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    queries, keys, _, scale = inputs
    ctx.save_for_backward(queries, keys, output[0])
    ctx.scale = scale


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    queries, keys, lse = ctx.saved_tensors
    return *_backward(grad, queries, keys, lse, ctx.scale), None, None


logsumexp_topk = operator("logsumexp_topk", cpu.logsumexp_topk, _empty_ranking)
_backward = operator("logsumexp_backward", cpu.lse_backward, _empty_gradients)
logsumexp_topk.register_autograd(_gradients, setup_context=_keep)
