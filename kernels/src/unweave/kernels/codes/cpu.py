"""Nearest codes on a CPU: one matrix product a tile, read once for the minima of runs of codes.

Shapes are those of `reference`. Of codes whose distances differ by less than rounding, either may
be found.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unweave.kernels.loops import Loop

ROWS, CODES = 1024, 2048
"""The size of a tile of scores."""

RUN = 64
"""Codes whose least score is taken together."""


def nearest(x: Tensor, codebook: Tensor, k: int) -> Tensor:
    """Return the indices (N, k) of the nearest codes, nearest first.

    |x - c|^2 is compared as |c|^2 / 2 - x . c, after both were moved by the mean code, which
    changes no distance and keeps the numbers small.
    """
    center = codebook.mean(0)
    if k == 1:
        return _nearest_one(x, codebook, center)[:, None]
    found = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    codes = codebook - center
    bias = codes.square().sum(1) / 2
    rows = max(1, ROWS * CODES // len(codes))
    for first in range(0, len(x), rows):
        scores = torch.addmm(bias, x[first : first + rows] - center, codes.T, alpha=-1)
        found[first : first + rows] = scores.topk(k, dim=1, largest=False, sorted=True).indices
    return found


def nearest_value(z: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest value (N, D), and its index.

    The index is how many midpoints of neighbouring values lie below. Half precision is compared
    in float32.
    """
    if z.dtype not in (torch.float32, torch.float64):
        codes, found = nearest_value(z.float(), values.float())
        return codes.to(z.dtype), found
    ordered, order = values.sort(dim=1, stable=True)
    midpoints = ordered[:, :-1] + (ordered[:, 1:] - ordered[:, :-1]) / 2
    found = torch.empty(z.shape, dtype=torch.int64)
    codes = torch.empty(z.shape, dtype=z.dtype)
    inputs = (z.contiguous(), midpoints.contiguous(), order, ordered)
    _count_below(len(z), values.numel(), *inputs, found, codes)
    return codes, found


def _nearest_one(x: Tensor, codebook: Tensor, center: Tensor) -> Tensor:
    least = x.new_full((len(x),), torch.inf)
    found = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for start in range(0, len(codebook), CODES):
        codes, bias = _padded(codebook[start : start + CODES] - center)
        tile = x.new_empty(min(ROWS, len(x)), len(codes))
        for first in range(0, len(x), ROWS):
            part = x[first : first + ROWS] - center
            scores = torch.addmm(bias, part, codes.T, alpha=-1, out=tile[: len(part)])
            score, index = _least(scores)
            before = least[first : first + ROWS]
            place = found[first : first + ROWS]
            torch.where(score < before, index + start, place, out=place)
            torch.minimum(score, before, out=before)
    return found


def _padded(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and half their squares, with some that are never nearest to a whole run."""
    missing = -len(codes) % RUN
    bias = torch.nn.functional.pad(codes.square().sum(1) / 2, (0, missing), value=torch.inf)
    return torch.nn.functional.pad(codes, (0, 0, 0, missing)), bias


def _least(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least score of each row and where: the least of runs, then within its run."""
    runs = scores.view(len(scores), -1, RUN)
    score, run = runs.amin(2).min(1)
    within = runs[torch.arange(len(scores), device=scores.device), run].argmin(1)
    return score, run * RUN + within


@Loop
def _count_below(
    first: int, last: int, z: Any, midpoints: Any, order: Any, ordered: Any, found: Any, codes: Any
) -> None:
    for row in range(first, last):
        for column in range(z.shape[1]):
            place = 0
            for midpoint in range(midpoints.shape[1]):
                place += z[row, column] > midpoints[column, midpoint]
            found[row, column] = order[column, place]
            codes[row, column] = ordered[column, place] + (z[row, column] - z[row, column])
