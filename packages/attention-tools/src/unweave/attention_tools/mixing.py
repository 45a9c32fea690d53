"""How Anagram-MTL mixes the noises of views: weights by what is behind, and a scale that keeps
their variance (arXiv 2412.02693, sections 3.3 and 3.4).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Correlation = Literal["pearson", "raw"]
LARGEST_SCALE = 10.0
"""The most that rectification multiplies noise by; own addition for views that cancel."""


def balancing_weights(
    scores: Tensor, index: int, count: int, smallest_score: float = 0.01
) -> Tensor:
    """Return alpha_k = s_k^-(1 + i/N) / sum_j s_j^-(1 + i/N) of scores (..., T).

    Section 3.3: the less a task is done, the more it weighs, and more sharply in later steps.

    >>> balancing_weights(torch.tensor([0.30, 0.15]), 0, 30)
    tensor([0.3333, 0.6667])
    """
    logs = scores.clamp_min(smallest_score).log()
    return (-(1 + index / count) * logs).softmax(-1)


def rectifying_scale(
    noises: Tensor, weights: Tensor, correlation: Correlation = "pearson"
) -> Tensor:
    """Return c = D^(-1/2), D = sum_jk alpha_j alpha_k rho_jk with rho_kk = 1 (section 3.4).

    `noises` are (..., T, C, H, W) and `weights` (..., T); c is (...). Multiplied by c, the
    weighted sum of noises has the variance of one of them. c is at most 10, which only noises
    that cancel reach.

    >>> rectifying_scale(torch.randn(2, 3, 64, 64), torch.tensor([0.5, 0.5])).round(decimals=1)
    tensor(1.4000)
    """
    flat = noises.flatten(-3).float()
    if correlation == "pearson":
        flat = flat - flat.mean(-1, keepdim=True)
        flat = flat / flat.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
        rho = flat @ flat.transpose(-2, -1)
    else:
        rho = flat @ flat.transpose(-2, -1) / flat.shape[-1]
    same = torch.eye(rho.shape[-1], dtype=torch.bool, device=rho.device)
    rho = torch.where(same, torch.ones_like(rho), rho)
    alpha = weights.to(rho)
    variance = (alpha[..., :, None] * alpha[..., None, :] * rho).sum((-2, -1))
    return variance.clamp_min(LARGEST_SCALE**-2).rsqrt()
