"""Sinkhorn-Knopp by blocks of samples: one exponential, then two scaling vectors, no divisions.

A block stays in the cache while its rows are scaled and added to the sums of the columns, so an
iteration reads the matrix once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unweave.kernels.sinkhorn import reference

BLOCK = 1 << 21
"""Elements of a block of samples."""


def sinkhorn(scores: Tensor, eps: float, iters: int) -> Tensor:
    """Return what `reference.sinkhorn` does, through it where a scale leaves the number range."""
    assigned = torch.empty_like(scores, memory_format=torch.contiguous_format)
    for one, result in zip(scores, assigned, strict=True):
        if not _assign(one, eps, iters, result):
            result.copy_(reference.sinkhorn(one[None], eps, iters)[0])
    return assigned


def _assign(scores: Tensor, eps: float, iters: int, kernel: Tensor) -> bool:
    """Write the assignments of `scores` (N, K) to `kernel`; return whether all scales are finite.

    Dividing by the largest of each column, then of each row, leaves a one in every column and row,
    and nothing above it.
    """
    blocks = kernel.split(max(1, BLOCK // scores.shape[1]))
    sums = scores.new_zeros(scores.shape[1])
    highest = scores.amax(0)
    for part, block in zip(scores.split(len(blocks[0])), blocks, strict=True):
        torch.sub(part, highest, out=block).div_(eps)
        below = block.amax(1, keepdim=True)
        block.sub_(below).exp_()
        sums.addmv_(block.T, below[:, 0].exp())
    for _ in range(iters - 1):
        scale, sums = sums.reciprocal(), torch.zeros_like(sums)
        for block in blocks:
            sums.addmv_(block.T, (block @ scale).reciprocal_())
    scale, finite = sums.reciprocal_(), torch.ones((), dtype=torch.bool, device=scores.device)
    for block in blocks:
        row_scale = (block @ scale).reciprocal_()
        block.mul_(row_scale[:, None]).mul_(scale)
        finite &= row_scale.isfinite().all()
    return bool(finite & scale.isfinite().all())
