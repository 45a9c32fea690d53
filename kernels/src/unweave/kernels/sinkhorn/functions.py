"""Balanced assignments of samples to prototypes."""

from __future__ import annotations

import torch
from torch import Tensor

from unweave.kernels.backends import resolve
from unweave.kernels.sinkhorn import cpu, reference

FAST = ("cpu", "cuda")
"""Devices with a fast form."""


def sinkhorn(scores: Tensor, eps: float = 0.05, iters: int = 3) -> Tensor:
    """Return soft assignments whose rows sum to one and whose columns are used about equally.

    `scores` are (..., N, K): N samples, K prototypes; `eps` is the temperature. Each of the `iters`
    Sinkhorn-Knopp iterations scales all columns of exp(scores / eps) to one sum, then all rows, as
    in SwAV (arXiv 2006.09882) and DINOv2. The result has no gradient: it is a target. Finite scores
    never overflow, at any temperature. Time O(iters N K), memory O(N K). Raises `ValueError` naming
    what does not fit.

    >>> sinkhorn(torch.tensor([[1.0, 0.9], [1.0, 0.0]]), eps=0.1, iters=50).round(decimals=2)
    tensor([[0.0100, 0.9900],
            [0.9900, 0.0100]])
    """
    if scores.dim() < 2 or 0 in scores.shape[-2:] or not scores.is_floating_point():
        raise ValueError(
            "`scores` must be floating (..., N, K) with N, K > 0, got "
            f"{scores.dtype} {tuple(scores.shape)}"
        )
    if not eps > 0:
        raise ValueError(f"`eps` must be positive, got {eps}")
    if iters < 1:
        raise ValueError(f"`iters` must be at least 1, got {iters}")
    batch = scores.detach().reshape(-1, *scores.shape[-2:])
    batch = batch.float() if batch.dtype in (torch.float16, torch.bfloat16) else batch
    defined = resolve(scores.device, FAST) == "reference"
    with torch.no_grad():
        form = reference.sinkhorn if defined else cpu.sinkhorn
        return form(batch, eps, iters).reshape(scores.shape).to(scores.dtype)
