"""The operators behind the public functions, known to autograd and to `torch.compile`.

Arguments are those of `reference`. Decoding, encoding and scattering are each other's derivatives,
so all are differentiable any number of times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unweave.kernels.backends import operator, resolve
from unweave.kernels.sparse import cpu, gpu, reference

FAST = ("cpu", "cuda")
"""Devices with a fast form."""

NEEDS = {"cpu": "numba", "cuda": "cupy"}


def topk(x: Tensor, k: int) -> Tensor:
    """Return the indices (B, k) of the largest elements of each row of (B, F)."""
    if _by_definition(x):
        return reference.topk(x, k)
    indices: Tensor = _topk(_wide(x), k)
    return indices


def batch_topk(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return `indices` (count,) and `crow` of the largest elements of all rows of (B, F)."""
    if _by_definition(x):
        return reference.batch_topk(x, count)
    code: tuple[Tensor, Tensor] = _batch_topk(_wide(x), count)
    return code


def above(x: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Return `indices` and `crow` of the elements of (B, F) that are larger than `threshold`."""
    if _by_definition(x):
        return reference.above(x, threshold)
    code: tuple[Tensor, Tensor] = _above(_wide(x), threshold.to(x.dtype))
    return code


def decode(
    values: Tensor, indices: Tensor, crow: Tensor, dictionary: Tensor, sparse_grad: bool
) -> Tensor:
    """Return the sums (B, d) of entries times their rows of the dictionary."""
    if _by_definition(values):
        _require_places(indices, crow, dictionary)
        return reference.decode(values, indices, crow, dictionary, sparse_grad)
    out: Tensor = _decode(_wide(values), indices, crow, _wide(dictionary), sparse_grad)
    return out.to(values.dtype)


def encode(x: Tensor, weight: Tensor, indices: Tensor, crow: Tensor) -> Tensor:
    """Return the products (n,) of rows of `x` (B, d) and `weight` (F, d)."""
    if _by_definition(x):
        _require_places(indices, crow, weight)
        return reference.encode(x, weight, indices, crow)
    out: Tensor = _encode(_wide(x), _wide(weight), indices, crow)
    return out.to(x.dtype)


def _by_definition(x: Tensor) -> bool:
    return resolve(x.device, FAST, NEEDS) == "reference"


def _wide(x: Tensor) -> Tensor:
    """Return `x` as contiguous float32 or float64."""
    return (x if x.itemsize >= 4 else x.float()).contiguous()


def _require_places(indices: Tensor, crow: Tensor, dictionary: Tensor) -> None:
    """Raise `ValueError` for entries that are nowhere; a graph being compiled is not looked at."""
    if torch.compiler.is_compiling():
        return
    if int(crow[0]) or int(crow[-1]) != len(indices) or bool((crow.diff() < 0).any()):
        raise ValueError(
            f"`crow` must rise from 0 to the number of entries {len(indices)}, got {crow.tolist()}"
            if len(crow) <= 8
            else f"`crow` must rise from 0 to the number of entries {len(indices)}"
        )
    least, most = (int(end) for end in indices.aminmax()) if len(indices) else (0, -1)
    if least < 0 or most >= len(dictionary):
        wrong = least if least < 0 else most
        raise ValueError(
            f"`indices` must be from 0 to {len(dictionary) - 1}, rows of the dictionary, "
            f"got {wrong}"
        )


def _above_item(x: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    return cpu.above(x, float(threshold))


def _checked_decode(
    values: Tensor, indices: Tensor, crow: Tensor, dictionary: Tensor, sparse_grad: bool
) -> Tensor:
    _require_places(indices, crow, dictionary)
    return cpu.decode(values, indices, crow, dictionary)


def _checked_encode(x: Tensor, weight: Tensor, indices: Tensor, crow: Tensor) -> Tensor:
    _require_places(indices, crow, weight)
    return cpu.encode(x, weight, indices, crow)


def _decode_on_gpu(
    values: Tensor, indices: Tensor, crow: Tensor, dictionary: Tensor, sparse_grad: bool
) -> Tensor:
    _require_places(indices, crow, dictionary)
    return gpu.decode(values, indices, crow, dictionary)


def _encode_on_gpu(x: Tensor, weight: Tensor, indices: Tensor, crow: Tensor) -> Tensor:
    _require_places(indices, crow, weight)
    return gpu.encode(x, weight, indices, crow)


def _contiguous_scatter(
    values: Tensor, indices: Tensor, crow: Tensor, x: Tensor, features: int
) -> Tensor:
    return cpu.scatter(values.contiguous(), indices, crow, x.contiguous(), features)


def _empty_topk(x: Tensor, k: int) -> Tensor:
    return x.new_empty(x.shape[0], k, dtype=torch.int64)


def _empty_batch_topk(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(count, dtype=torch.int64), _empty_crow(x)


def _empty_above(x: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(count, dtype=torch.int64), _empty_crow(x)


def _empty_crow(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0] + 1, dtype=torch.int64)


def _empty_decode(
    values: Tensor, indices: Tensor, crow: Tensor, dictionary: Tensor, sparse_grad: bool
) -> Tensor:
    return dictionary.new_empty(crow.shape[0] - 1, dictionary.shape[1])


def _empty_encode(x: Tensor, weight: Tensor, indices: Tensor, crow: Tensor) -> Tensor:
    return x.new_empty(indices.shape)


def _empty_scatter(
    values: Tensor, indices: Tensor, crow: Tensor, x: Tensor, features: int
) -> Tensor:
    return x.new_empty(features, x.shape[1])


def _empty_decode_backward(
    grad: Tensor, values: Tensor, indices: Tensor, crow: Tensor, dictionary: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(values), torch.empty_like(dictionary)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.option = inputs[4] if len(inputs) > 4 else None


def _decode_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, crow, dictionary = ctx.saved_tensors
    of_values, of_dictionary = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    grad = grad.contiguous()
    products = sums = None
    if of_values and of_dictionary and not ctx.option:
        products, sums = _decode_backward(grad, values, indices, crow, dictionary)
    else:
        scattered = _sparse_scatter if ctx.option else _scatter
        if of_values:
            products = _encode(grad, dictionary, indices, crow)
        if of_dictionary:
            sums = scattered(values, indices, crow, grad, dictionary.shape[0])
    return products, None, None, sums, None


def _keep_all(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _second_gradients(ctx: Any, of_products: Tensor, of_sums: Tensor) -> tuple[Tensor | None, ...]:
    grad, values, indices, crow, dictionary = ctx.saved_tensors
    of_products, of_sums = of_products.contiguous(), of_sums.contiguous()
    return (
        _decode(of_products, indices, crow, dictionary, False)
        + _decode(values, indices, crow, of_sums, False),
        _encode(grad, of_sums, indices, crow),
        None,
        None,
        _scatter(of_products, indices, crow, grad, dictionary.shape[0]),
    )


def _encode_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, indices, crow = ctx.saved_tensors
    of_x, of_weight = ctx.needs_input_grad[:2]
    grad = grad.contiguous()
    return (
        _decode(grad, indices, crow, weight, False) if of_x else None,
        _scatter(grad, indices, crow, x, weight.shape[0]) if of_weight else None,
        None,
        None,
    )


def _scatter_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, crow, x = ctx.saved_tensors
    of_values, of_x = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    grad = grad.contiguous()
    return (
        _encode(x, grad, indices, crow) if of_values else None,
        None,
        None,
        _decode(values, indices, crow, grad, False) if of_x else None,
        None,
    )


def _sparse_scatter(
    values: Tensor, indices: Tensor, crow: Tensor, x: Tensor, features: int
) -> Tensor:
    """Return `scatter` as a sparse tensor that holds the features with entries alone."""
    present, inverse = indices.unique(return_inverse=True)
    sums = _scatter(values, inverse, crow, x, len(present))
    return torch.sparse_coo_tensor(
        present[None], sums, (features, x.shape[1]), is_coalesced=True, check_invariants=False
    )


_topk = operator("topk_sparse", cpu.topk, _empty_topk)
_batch_topk = operator("batch_topk", cpu.batch_topk, _empty_batch_topk)
_above = operator("threshold_sparse", _above_item, _empty_above)
_decode = operator("sparse_decode", _checked_decode, _empty_decode)
_encode = operator("sparse_encode", _checked_encode, _empty_encode)
_scatter = operator("sparse_scatter", _contiguous_scatter, _empty_scatter)
_decode_backward = operator("sparse_decode_backward", cpu.decode_backward, _empty_decode_backward)
_decode_backward.register_autograd(_second_gradients, setup_context=_keep_all)
_decode.register_autograd(_decode_gradients, setup_context=_keep)
_encode.register_autograd(_encode_gradients, setup_context=_keep)
_scatter.register_autograd(_scatter_gradients, setup_context=_keep)
_topk.register_kernel("cuda", gpu.topk)
_batch_topk.register_kernel("cuda", gpu.batch_topk)
_above.register_kernel("cuda", gpu.above)
_decode.register_kernel("cuda", _decode_on_gpu)
_encode.register_kernel("cuda", _encode_on_gpu)
_scatter.register_kernel("cuda", gpu.scatter)
