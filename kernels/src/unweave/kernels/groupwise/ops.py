"""The operators behind the public functions; a product is linear in `x`, and so is its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unweave.kernels.backends import operator
from unweave.kernels.groupwise import cpu, gpu


def _empty_quantized(
    weight: Tensor, bits: int, group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    *lead, width = weight.shape
    codes = weight.new_empty(
        (*lead, -(-width * bits // 8)), dtype=torch.int8 if bits == 8 else torch.uint8
    )
    dtype = torch.promote_types(weight.dtype, torch.float32)
    scales = weight.new_empty((*lead, -(-width // group_size)), dtype=dtype)
    return codes, scales, scales.new_empty(0) if symmetric else torch.empty_like(scales)


def _empty_rows(codes: Tensor, scales: Tensor, *arguments: Any) -> Tensor:
    return scales.new_empty(codes.shape[0], arguments[-1])


def _empty_product(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def _empty_product_back(grad: Tensor, *arguments: Any) -> Tensor:
    return grad.new_empty(grad.shape[0], arguments[-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, zeros, bits, group_size = inputs
    ctx.save_for_backward(codes, scales, zeros)
    ctx.settings = bits, group_size, x.shape[1]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return product_back(grad, *ctx.saved_tensors, *ctx.settings), *[None] * 5


def _keep_back(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scales, zeros, bits, group_size, _ = inputs
    ctx.save_for_backward(codes, scales, zeros)
    ctx.settings = bits, group_size


def _gradient_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return product(grad, *ctx.saved_tensors, *ctx.settings), *[None] * 6


quantize = operator("quantize_groupwise", cpu.quantize, _empty_quantized)
dequantize = operator("dequantize_groupwise", cpu.dequantize, _empty_rows)
product = operator("quantized_matmul", cpu.product, _empty_product)
product_back = operator("quantized_matmul_backward", cpu.product_back, _empty_product_back)
product.register_autograd(_gradient, setup_context=_keep)
product_back.register_autograd(_gradient_back, setup_context=_keep_back)
dequantize.register_kernel("cuda", gpu.dequantize)
product.register_kernel("cuda", gpu.product)
product_back.register_kernel("cuda", gpu.product_back)
