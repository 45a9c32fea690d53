"""The operators behind the public functions, known to autograd and to `torch.compile`.

Tensors are (B, H, tokens, features); `reference` says what each argument means.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unweave.kernels.attention import cpu, reference
from unweave.kernels.backends import resolve

FAST = ("cpu",)
"""Devices with a fast form."""


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    drop_columns: Tensor | None,
    scale: float,
) -> Tensor:
    """Return the output (B, H, Q, e)."""
    if _by_definition(q, mask):
        return reference.masked_attention(q, k, v, mask, drop_columns, scale)
    out: Tensor = _masked_attention(q, k, v, mask, drop_columns, scale)[0]
    return out


def attention_with_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    columns: Tensor,
    weights: Tensor | None,
    scale: float,
    reduce_heads: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (B, H, Q, e), the maps and the log-sum-exp (B, H, Q)."""
    arguments = (q, k, v, mask, columns, weights, scale, reduce_heads)
    if _by_definition(q, mask):
        return reference.attention_with_maps(*arguments)
    results: tuple[Tensor, Tensor, Tensor] = _attention_with_maps(*arguments)
    return results


@torch.no_grad()
def transposed_product(
    q: Tensor, k: Tensor, x: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Return P^T x, (B, H, K, e)."""
    if _by_definition(q, mask):
        p = reference.probabilities(reference.scores(q, k, mask, scale))
        return p.transpose(-1, -2) @ x
    lse = cpu.attention(q, k, k, mask, scale)[1]
    return cpu.transposed_product(q, k, x, mask, lse, scale)


def _by_definition(q: Tensor, mask: Tensor | None) -> bool:
    learned = mask is not None and mask.requires_grad
    return learned or resolve(q.device, FAST) == "reference"


@torch.library.custom_op("unweave::masked_attention", mutates_args=())
def _masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    drop_columns: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return cpu.masked_attention(q, k, v, mask, drop_columns, scale)


@_masked_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    drop_columns: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=cpu.accumulator(q.dtype))
    return q.new_empty(*q.shape[:3], v.shape[3]), lse


@torch.library.custom_op("unweave::attention_with_maps", mutates_args=())
def _attention_with_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    columns: Tensor,
    weights: Tensor | None,
    scale: float,
    reduce_heads: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return cpu.attention_with_maps(q, k, v, mask, columns, weights, scale, reduce_heads)


@_attention_with_maps.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    columns: Tensor,
    weights: Tensor | None,
    scale: float,
    reduce_heads: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, queries = q.shape[:3]
    width = columns.shape[1] if weights is None else weights.shape[1]
    over = (batch, heads, queries) if reduce_heads == "none" else (batch, queries)
    lse = q.new_empty(batch, heads, queries, dtype=cpu.accumulator(q.dtype))
    return q.new_empty(batch, heads, queries, v.shape[3]), q.new_empty(*over, width), lse


@torch.library.custom_op("unweave::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor | None,
    grad_columns: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    drop_columns: Tensor | None,
    columns: Tensor | None,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return cpu.backward(
        grad_out, grad_columns, grad_lse, q, k, v, mask, drop_columns, columns, lse, scale
    )


@_attention_backward.register_fake
def _(
    grad_out: Tensor | None,
    grad_columns: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    drop_columns: Tensor | None,
    columns: Tensor | None,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep_masked(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, drop_columns, scale = inputs
    ctx.save_for_backward(q, k, v, mask, drop_columns, output[1])
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _masked_gradients(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, mask, drop_columns, lse = ctx.saved_tensors
    gradients = _attention_backward(
        grad_out, None, grad_lse, q, k, v, mask, drop_columns, None, lse, ctx.scale
    )
    return *gradients, None, None, None


def _keep_maps(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, mask, columns, weights, scale, reduce_heads = inputs
    ctx.save_for_backward(q, k, v, mask, columns, weights, output[2])
    ctx.scale, ctx.reduce_heads = scale, reduce_heads
    ctx.set_materialize_grads(False)


def _maps_gradients(
    ctx: Any, grad_out: Tensor | None, grad_maps: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, mask, columns, weights, lse = ctx.saved_tensors
    grad_columns = grad_maps
    if grad_columns is not None:
        if weights is not None:
            grad_columns = grad_columns @ weights.transpose(0, 1)
        if ctx.reduce_heads != "none":
            grad_columns = grad_columns[:, None]
        if ctx.reduce_heads == "mean":
            grad_columns = grad_columns / q.shape[1]
    gradients = _attention_backward(
        grad_out, grad_columns, grad_lse, q, k, v, mask, None, columns, lse, ctx.scale
    )
    return *gradients, None, None, None, None, None


_masked_attention.register_autograd(_masked_gradients, setup_context=_keep_masked)
_attention_with_maps.register_autograd(_maps_gradients, setup_context=_keep_maps)
