"""Sinkhorn-Knopp, defined in the log domain: stable for any finite scores."""

from __future__ import annotations

import math

from torch import Tensor


def sinkhorn(scores: Tensor, eps: float, iters: int) -> Tensor:
    """Return assignments (B, N, K) of `scores` (B, N, K); rows sum to one.

    Each iteration scales the K columns to equal sums, then the N rows.
    """
    logits = scores / eps
    rows, columns = scores.shape[1:]
    for _ in range(iters):
        logits = logits - logits.logsumexp(1, keepdim=True) - math.log(columns)
        logits = logits - logits.logsumexp(2, keepdim=True) - math.log(rows)
    return (logits + math.log(rows)).exp()
