"""What unweave-kernels says about weights in 8 or 4 bits, measured beside the usual ways."""

from __future__ import annotations

from functools import cache, partial
from typing import Literal

import torch
from ratios import at_least
from torch import Tensor
from torch.nn.functional import linear

from claims_runner import Claim, Measure
from timing import median_seconds, peak_bytes
from unweave.kernels.groupwise import (
    GroupQuantized,
    dequantize_groupwise,
    quantize_groupwise,
    quantized_matmul,
)

Bits = Literal[8, 4]
BITS: tuple[Bits, ...] = (8, 4)
GROUP = 64


def weight_bytes(seed: int, quick: bool) -> Claim:
    """Bytes of codes and scales, against those of float32."""
    weight = weights(seed, quick)
    whole = {bits: weight.nbytes / quantized(seed, quick, bits).nbytes for bits in BITS}
    half = {bits: ratio / 2 for bits, ratio in whole.items()}
    return at_least(
        "groupwise-bytes",
        "Weights in 4 bits take a seventh of the memory, with their scales",
        "float32",
        f"{shape(weight)}, groups of {GROUP}, float32 scales; {listed(whole)}; against float16 "
        f"{listed(half)}",
        whole[4],
        7,
    )


def row_time(seed: int, quick: bool) -> Claim:
    """Time of one row."""
    return product_time(
        "groupwise-row-time",
        "One row is multiplied by the codes faster than by weights dequantized first",
        1,
        5,
        seed,
        quick,
    )


def batch_time(seed: int, quick: bool) -> Claim:
    """Time of 256 rows."""
    return product_time(
        "groupwise-batch-time",
        "256 rows are multiplied no slower than by weights dequantized first",
        256,
        1,
        seed,
        quick,
    )


def batch_memory(seed: int, quick: bool) -> Claim:
    """Memory of 256 rows beyond the inputs, as a part of the weights in float32."""
    weight = weights(seed, quick, rows=4)
    x, codes = inputs(seed, 256, weight), quantize_groupwise(weight, bits=4, group_size=GROUP)
    used = peak_bytes(lambda: quantized_matmul(x, codes)) - x.nbytes // x.shape[1] * len(weight)
    return Claim.at_most(
        "groupwise-batch-memory",
        "The product of 256 rows holds a part of the weights at a time",
        "the weights in float32",
        f"{shape(weight)}, 4 bits; bytes beyond the result",
        value=100 * used / weight.nbytes,
        limit=30,
        unit="%",
        note="blocks of 16 MiB are as large as small weights",
    )


def error(seed: int, quick: bool) -> Claim:
    """Mean squared error of weights with outliers, against one scale for all."""
    weight = weights(seed, quick).clone()
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(weight.numel(), generator=generator)[: weight.numel() // 10_000]
    weight.view(-1)[places] *= 20
    ratios = {}
    for bits in BITS:
        one = quantize_groupwise(weight.view(1, -1), bits=bits, group_size=weight.numel())
        groups = quantize_groupwise(weight, bits=bits, group_size=GROUP)
        ratios[bits] = squared_error(weight, one) / squared_error(weight, groups)
    return at_least(
        "groupwise-error",
        "A scale for each group loses less than one for all",
        "one scale for the whole weight",
        f"{shape(weight)} normal, one in 10,000 is 20 times larger; mean squared error "
        f"{listed(ratios)}",
        min(ratios.values()),
        5,
    )


def product_time(name: str, text: str, rows: int, limit: float, seed: int, quick: bool) -> Claim:
    """Time of a product with `rows` rows, against dequantizing first, and against float32."""
    weight = weights(seed, quick)
    x = inputs(seed, rows, weight)
    ratios, plain = {}, {}
    for bits in BITS:
        codes = quantized(seed, quick, bits)
        require_product(x, codes)
        ours, first, full = median_seconds(
            partial(quantized_matmul, x, codes),
            partial(dequantized_matmul, x, codes),
            partial(linear, x, weight),
            repeats=3 if quick else 15,
        )
        ratios[bits], plain[bits] = first / ours, full / ours
    return at_least(
        name,
        text,
        "dequantize_groupwise and torch linear, each call",
        f"{shape(weight)}, groups of {GROUP}; {listed(ratios)}; against linear with float32 "
        f"weights {listed(plain)}",
        min(ratios.values()),
        limit,
    )


@cache
def weights(seed: int, quick: bool, rows: int = 1) -> Tensor:
    """A normal weight, square or `rows` times as high."""
    size = 512 if quick else 4096
    return torch.randn(rows * size, size, generator=torch.Generator().manual_seed(seed))


@cache
def quantized(seed: int, quick: bool, bits: Bits) -> GroupQuantized:
    """The codes of `weights`."""
    return quantize_groupwise(weights(seed, quick), bits=bits, group_size=GROUP)


def inputs(seed: int, rows: int, weight: Tensor) -> Tensor:
    """Rows to multiply."""
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(rows, weight.shape[1], generator=generator)


def require_product(x: Tensor, codes: GroupQuantized) -> None:
    """Raise `AssertionError` unless a product is that with the dequantized weights."""
    exact = x.double() @ dequantize_groupwise(codes, torch.float64).T
    torch.testing.assert_close(quantized_matmul(x, codes).double(), exact, rtol=1e-5, atol=1e-3)


def dequantized_matmul(x: Tensor, codes: GroupQuantized) -> Tensor:
    """The product with weights that are dequantized in full."""
    return linear(x, dequantize_groupwise(codes))


def squared_error(weight: Tensor, codes: GroupQuantized) -> float:
    """The mean squared error of the codes."""
    return float((dequantize_groupwise(codes).view_as(weight) - weight).square().mean())


def shape(weight: Tensor) -> str:
    """Rows x columns."""
    return " x ".join(f"{size:,}" for size in weight.shape)


def listed(ratios: dict[Bits, float]) -> str:
    """Ratios by number of bits."""
    return ", ".join(f"{ratio:.2f}x in {bits} bits" for bits, ratio in ratios.items())


CLAIMS: dict[str, Measure] = {
    "groupwise-bytes": weight_bytes,
    "groupwise-row-time": row_time,
    "groupwise-batch-time": batch_time,
    "groupwise-batch-memory": batch_memory,
    "groupwise-error": error,
}
