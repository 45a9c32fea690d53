"""Nearest codes on a GPU: products by torch, and their minima by kernels that read them once.

Shapes are those of `reference`. Of codes whose distances differ by less than rounding, either may
be found. Half precision is compared in float32, on which torch's setting for TF32 acts. Without
CuPy the nearest codes are found by torch alone, in more passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from unweave.kernels import cuda

MODULE = cuda.Module(Path(__file__).with_name("kernels.cu"))

BLOCK = 1 << 24
"""Elements of a block of scores."""

CODES = 1 << 12
"""Codes of a block where only the nearest is wanted."""

RUN = 128
"""Codes that one thread compares."""


def nearest(x: Tensor, codebook: Tensor, k: int) -> Tensor:
    """Return the indices (N, k) of the nearest codes, nearest first.

    |x - c|^2 is compared as |c|^2 / 2 - x . c, after both were moved by the mean code, which
    changes no distance and keeps the numbers small.
    """
    kind = _accumulator(x.dtype)
    center = codebook.to(kind).mean(0)
    codes = codebook.to(kind) - center
    bias = codes.square().sum(1) / 2
    found = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    runs = k == 1 and cuda.available()
    for part in _parts(len(x), min(len(codes), CODES) if runs else len(codes)):
        rows = x[part].to(kind) - center
        if runs:
            found[part, 0] = _least(rows, codes, bias)
        else:
            scores = torch.addmm(bias, rows, codes.T, alpha=-1)
            found[part] = scores.topk(k, dim=1, largest=False, sorted=True).indices
    return found


def nearest_value(z: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest value (N, D), and its index; half types are compared as float32."""
    z, columns = z.contiguous(), values.T.contiguous()
    found = torch.empty(z.shape, dtype=torch.int64, device=z.device)
    codes = torch.empty_like(z)
    sizes = z.shape[1], values.shape[1]
    MODULE.launch("nearest_value", [z.dtype], z.numel(), z, columns, found, codes, *sizes)
    return codes, found


def _least(rows: Tensor, codes: Tensor, bias: Tensor) -> Tensor:
    """Return the nearest code of each row; one thread compares a run of codes for a row."""
    runs = -(-len(codes) // RUN)
    least = rows.new_empty(runs, len(rows))
    found = torch.empty(least.shape, dtype=torch.int64, device=rows.device)
    for first in range(0, len(codes), CODES):
        own = slice(first, first + CODES)
        products = codes[own] @ rows.T
        place = slice(first // RUN, first // RUN + -(-len(products) // RUN))
        arguments = products, bias[own], least[place], found[place], *products.shape, RUN, first
        MODULE.launch("least_of_runs", [rows.dtype], least[place].numel(), *arguments)
    return found.gather(0, least.argmin(0, keepdim=True))[0]


def _parts(rows: int, codes: int) -> Iterator[slice]:
    """Yield slices of rows whose scores fill a block."""
    step = max(1, BLOCK // max(1, codes))
    for first in range(0, rows, step):
        yield slice(first, first + step)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
