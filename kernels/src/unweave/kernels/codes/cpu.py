"""Nearest codes on a CPU: blocks of one matrix product each, read once for their minima.

Shapes are those of `reference`. Of codes whose distances differ by less than rounding, either may
be found.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 21
"""Elements of a block of scores."""

RUN = 256
"""Codes whose least score is taken together."""


def nearest(x: Tensor, codebook: Tensor, k: int) -> Tensor:
    """Return the indices (N, k) of the nearest codes, nearest first.

    |x - c|^2 is compared as |c|^2 / 2 - x . c, after both were moved by the mean code, which
    changes no distance and keeps the numbers small.
    """
    center = codebook.mean(0)
    codes = codebook - center
    bias = codes.square().sum(1) / 2
    if k == 1:
        codes, bias = _padded(codes, bias)
    found = torch.empty(len(x), k, dtype=torch.int64)
    rows = max(1, BLOCK // len(codes))
    for first in range(0, len(x), rows):
        scores = torch.addmm(bias, x[first : first + rows] - center, codes.T, alpha=-1)
        part = _least(scores)[:, None] if k == 1 else _least_k(scores, k)
        found[first : first + rows] = part
    return found


def nearest_value(z: Tensor, values: Tensor) -> Tensor:
    """Return the index (N, D) of the nearest value, by how many midpoints of values lie below."""
    ordered, order = values.sort(dim=1, stable=True)
    midpoints = ordered[:, :-1] + (ordered[:, 1:] - ordered[:, :-1]) / 2
    found = torch.empty(z.shape, dtype=torch.int64)
    columns = torch.arange(z.shape[1])
    rows = max(1, BLOCK // 8 // max(1, z.shape[1]))
    for first in range(0, len(z), rows):
        part = z[first : first + rows]
        place = torch.zeros(part.shape, dtype=torch.int64)
        for midpoint in midpoints.unbind(1):
            place += part > midpoint
        found[first : first + rows] = order[columns, place]
    return found


def _padded(codes: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Add codes that are never nearest, up to a multiple of `RUN`."""
    missing = -len(codes) % RUN
    codes = torch.nn.functional.pad(codes, (0, 0, 0, missing))
    return codes, torch.nn.functional.pad(bias, (0, missing), value=torch.inf)


def _least(scores: Tensor) -> Tensor:
    """Return where each row is least: first among the minima of runs, then within one run."""
    runs = scores.view(len(scores), -1, RUN)
    run = runs.amin(2).argmin(1)
    within = runs[torch.arange(len(scores)), run].argmin(1)
    return run * RUN + within


def _least_k(scores: Tensor, k: int) -> Tensor:
    return scores.topk(k, dim=1, largest=False, sorted=True).indices
