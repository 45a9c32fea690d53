"""Ranking by inner products, defined: plain torch, all products stored, differentiable."""

from __future__ import annotations

from torch import Tensor


def logsumexp_topk(queries: Tensor, keys: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return log sum_j exp(q . k_j scale) (N,) and the indices (N, k) of the best keys."""
    scores = queries @ keys.T * scale
    return scores.logsumexp(1), scores.topk(k, dim=1).indices
