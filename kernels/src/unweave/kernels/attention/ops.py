"""The operators behind the public functions, known to autograd and to `torch.compile`.

Tensors are (B, H, tokens, features); `reference` says what each argument means.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unweave.kernels.attention import cpu, gpu, reference
from unweave.kernels.backends import is_automatic, operator, resolve

FAST = ("cpu", "cuda")
"""Devices with a fast form."""

KEPT = 1 << 21
"""Scores up to which a CPU keeps them all for gradients: making them again would take longer."""


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    drop_columns: Tensor | None,
    scale: float,
) -> Tensor:
    """Return the output (B, H, Q, e)."""
    if _by_definition(q, mask) or _is_kept(q, k):
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
    if _by_definition(q, mask) or _is_kept(q, k):
        return reference.attention_with_maps(*arguments)
    results: tuple[Tensor, Tensor, Tensor] = _attention_with_maps(*arguments)
    return results


def attention_maps(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    columns: Tensor,
    weights: Tensor | None,
    scale: float,
    reduce_heads: str,
) -> Tensor:
    """Return the maps alone."""
    if _by_definition(q, mask):
        return reference.attention_with_maps(
            q, k, k.detach(), mask, columns, weights, scale, reduce_heads
        )[1]
    maps: Tensor = _attention_maps(q, k, mask, columns, weights, scale, reduce_heads)[0]
    return maps


@torch.no_grad()
def transposed_product(
    q: Tensor, k: Tensor, x: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Return P^T x, (B, H, K, e)."""
    if _by_definition(q, mask):
        p = reference.probabilities(reference.scores(q, k, mask, scale))
        return p.transpose(-1, -2) @ x
    form = gpu if q.device.type == "cuda" else cpu
    lse = form.attention(q, k, k, mask, scale)[1]
    return cpu.transposed_product(q, k, x, mask, lse, scale)


def _by_definition(q: Tensor, mask: Tensor | None) -> bool:
    learned = mask is not None and mask.requires_grad
    return learned or resolve(q.device, FAST) == "reference"


def _is_kept(q: Tensor, k: Tensor) -> bool:
    """Return whether the scores are few enough to be kept until the backward pass."""
    differentiated = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    few = q.device.type == "cpu" and q.shape[:3].numel() * k.shape[2] <= KEPT
    return differentiated and few and is_automatic()


def _empty_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), _empty_lse(q)


def _empty_with_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    columns: Tensor,
    weights: Tensor | None,
    scale: float,
    reduce_heads: str,
) -> tuple[Tensor, Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, _empty_maps(q, columns, weights, reduce_heads), _empty_lse(q)


def _empty_maps_alone(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    columns: Tensor,
    weights: Tensor | None,
    scale: float,
    reduce_heads: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_maps(q, columns, weights, reduce_heads), q.new_empty(q.shape), _empty_lse(q)


def _empty_gradients(
    grad_out: Any, grad_columns: Any, grad_lse: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _empty_gradient(grad_columns: Tensor, q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q)


def _empty_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=cpu.accumulator(q.dtype))


def _empty_maps(q: Tensor, columns: Tensor, weights: Tensor | None, reduce_heads: str) -> Tensor:
    batch, heads, queries, _ = q.shape
    width = columns.shape[1] if weights is None else weights.shape[1]
    over = (batch, heads, queries) if reduce_heads == "none" else (batch, queries)
    return q.new_empty(*over, width)


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
        grad_out, None, grad_lse, q, k, v, mask, drop_columns, None, lse, ctx.scale, _of_keys(ctx)
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
    grad_columns = _spread(grad_maps, weights, ctx.reduce_heads, q.shape[1])
    gradients = _attention_backward(
        grad_out,
        grad_columns,
        grad_lse,
        q,
        k,
        v,
        mask,
        None,
        columns,
        lse,
        ctx.scale,
        _of_keys(ctx),
    )
    return *gradients, None, None, None, None, None


def _keep_maps_alone(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    q, k, mask, columns, weights, scale, reduce_heads = inputs
    ctx.save_for_backward(q, k, mask, columns, weights, output[1], output[2])
    ctx.scale, ctx.reduce_heads = scale, reduce_heads
    ctx.set_materialize_grads(False)


def _maps_alone_gradients(
    ctx: Any, grad_maps: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, mask, columns, weights, expected_key, lse = ctx.saved_tensors
    grad_columns = _spread(grad_maps, weights, ctx.reduce_heads, q.shape[1])
    if grad_columns is None:
        return (None,) * 7
    if ctx.needs_input_grad[1]:
        dq, dk, _unused = _attention_backward(
            None, grad_columns, None, q, k, k, mask, None, columns, lse, ctx.scale, True
        )
        return dq, dk, None, None, None, None, None
    dq = _maps_backward(grad_columns, q, k, mask, columns, expected_key, lse, ctx.scale)
    return dq, None, None, None, None, None, None


def _spread(
    grad_maps: Tensor | None, weights: Tensor | None, reduce_heads: str, heads: int
) -> Tensor | None:
    """Return the gradient of each head's probabilities of the columns, (B, H or 1, Q, C)."""
    if grad_maps is None:
        return None
    if weights is not None:
        grad_maps = grad_maps @ weights.transpose(0, 1)
    if reduce_heads == "none":
        return grad_maps
    grad_maps = grad_maps[:, None]
    return grad_maps / heads if reduce_heads == "mean" else grad_maps


def _of_keys(ctx: Any) -> bool:
    """Whether keys or values need a gradient."""
    return bool(ctx.needs_input_grad[1] or ctx.needs_input_grad[2])


_masked_attention = operator("masked_attention", cpu.masked_attention, _empty_attention)
_attention_with_maps = operator("attention_with_maps", cpu.attention_with_maps, _empty_with_maps)
_attention_maps = operator("attention_maps", cpu.maps_alone, _empty_maps_alone)
_attention_backward = operator("attention_backward", cpu.backward, _empty_gradients)
_maps_backward = operator("maps_backward", cpu.maps_backward, _empty_gradient)
_masked_attention.register_autograd(_masked_gradients, setup_context=_keep_masked)
_attention_with_maps.register_autograd(_maps_gradients, setup_context=_keep_maps)
_attention_maps.register_autograd(_maps_alone_gradients, setup_context=_keep_maps_alone)
_masked_attention.register_kernel("cuda", gpu.masked_attention)
_attention_with_maps.register_kernel("cuda", gpu.attention_with_maps)
_attention_maps.register_kernel("cuda", gpu.maps_alone)
