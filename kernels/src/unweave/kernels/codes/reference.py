"""Nearest codes, defined: plain torch, any device and dtype, every distance stored."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest(x: Tensor, codebook: Tensor, k: int) -> Tensor:
    """Return the indices (N, k) of the codes (M, d) nearest to `x` (N, d), nearest first.

    Of codes at one distance the first comes first.
    """
    distances = (x[:, None] - codebook).square().sum(-1)
    return distances.sort(dim=1, stable=True).indices[:, :k]


def nearest_value(z: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the one of its column's `values` (D, V) that is nearest to `z` (N, D), and its index.

    It is NaN where `z` is not finite. Of values at one distance the first wins.
    """
    distances = (z[:, :, None] - values).abs()
    indices = (
        torch.where(
            distances == distances.amin(-1, keepdim=True),
            torch.arange(values.shape[1], device=z.device),
            values.shape[1],
        )
        .amin(-1)
        .clamp(max=values.shape[1] - 1)
    )
    codes = values[torch.arange(len(values), device=z.device), indices]
    return codes + (z - z).detach(), indices
