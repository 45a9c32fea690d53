"""Sinkhorn-Knopp on a CPU: one exponential, then two scaling vectors instead of divisions.

The first iteration is made in the log domain, which bounds what is exponentiated by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unweave.kernels.sinkhorn import reference


def sinkhorn(scores: Tensor, eps: float, iters: int) -> Tensor:
    """Return what `reference.sinkhorn` does, through it where a scale leaves the number range."""
    logits = scores / eps
    logits -= logits.logsumexp(1, keepdim=True)
    kernel = logits.sub_(logits.logsumexp(2, keepdim=True)).exp_()
    row_scale = torch.ones_like(kernel[:, :, :1])
    column_scale = torch.ones_like(kernel[:, :1].transpose(1, 2))
    for _ in range(iters - 1):
        column_scale = (kernel.transpose(1, 2) @ row_scale).reciprocal_()
        row_scale = (kernel @ column_scale).reciprocal_()
    if not (column_scale.isfinite().all() and row_scale.isfinite().all()):
        return reference.sinkhorn(scores, eps, iters)
    return kernel.mul_(row_scale).mul_(column_scale.transpose(1, 2))
