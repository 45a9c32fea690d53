"""Nearest codes, and quantization whose gradient passes straight through."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from unweave.kernels.checks import require_one_kind
from unweave.kernels.codes import ops

Metric = Literal["l2", "cosine"]


class Quantized(NamedTuple):
    """What a quantizer returns."""

    values: Tensor
    """The nearest codes, with the gradient of the input passed straight through."""

    indices: Tensor
    """Which codes they are, int64."""

    codes: Tensor
    """The same codes with the gradient of the codebook, for losses that move it."""


def nearest_code(
    x: Tensor, codebook: Tensor, *, metric: Metric = "l2", k: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return which codes are nearest to each row of `x`, and how far they are.

    `x` is (..., d), `codebook` (M, d); the results are (...,), or (..., k) nearest first when `k`
    is given: int64 indices and distances |x - c|, or 1 - cos(x, c) for "cosine". Indices compare
    |c|^2 / 2 - x . c in the dtype of `x`: codes whose distances differ by less than rounding may
    be found in any order. Distances are computed from the differences, exactly and with gradients
    of both arguments. A row with NaN gets some index and a NaN distance. Time O(N M d), memory
    O(N k d) and a block of scores: no N x M matrix. Raises `ValueError` naming what does not fit.

    >>> nearest_code(torch.tensor([[0.9, 0.0]]), torch.eye(2))
    (tensor([0]), tensor([0.1000]))
    """
    _check_codes(x, codebook)
    if metric not in ("l2", "cosine"):
        raise ValueError(f'`metric` must be "l2" or "cosine", got {metric!r}')
    count = 1 if k is None else k
    if not 1 <= count <= len(codebook):
        raise ValueError(f"`k` must be from 1 to the number of codes {len(codebook)}, got {k}")
    if metric == "cosine":
        x, codebook = normalize(x, dim=-1), normalize(codebook, dim=-1)
    rows = x.reshape(-1, x.shape[-1])
    indices = ops.nearest(rows.detach(), codebook.detach(), count)
    differences = rows[:, None] - codebook[indices]
    if metric == "l2":
        distances = torch.linalg.vector_norm(differences, dim=-1)
    else:
        distances = differences.square().sum(-1) / 2
    shape = x.shape[:-1] if k is None else (*x.shape[:-1], k)
    return indices.reshape(shape), distances.reshape(shape)


def vector_quantize(x: Tensor, codebook: Tensor, *, metric: Metric = "l2") -> Quantized:
    """Return the nearest code of each row of `x` (..., d) with a straight-through gradient.

    `codebook` is (M, d). With "cosine" the code nearest in direction is returned as it is. The
    codebook and commitment losses of VQ-VAE (arXiv 1711.00937, equation 3) are then
    `mse_loss(codes, x.detach())` and `mse_loss(x, codes.detach())`. Time and memory are those of
    `nearest_code`; rows that are not finite become NaN in `values`.

    >>> vector_quantize(torch.tensor([[0.9, 0.2]]), torch.eye(2)).values
    tensor([[1., 0.]])
    """
    _check_codes(x, codebook)
    with torch.no_grad():
        indices, _ = nearest_code(x, codebook, metric=metric)
    codes = codebook[indices]
    return Quantized(_straight_through(x, codes), indices, codes)


def scalar_quantize(z: Tensor, values: Tensor) -> Quantized:
    """Return, for each latent, the nearest of the values of its own dimension.

    `z` is (..., D), `values` (D, V) in any order; `indices` are columns of `values`. Latent
    quantization of QLAE (arXiv 2305.18378). At the middle of two values either may be taken.
    What is not finite becomes NaN in `values` and `codes`. Time O(N D V), memory O(N D). Raises
    `ValueError` naming what does not fit.

    >>> scalar_quantize(torch.tensor([[0.4, -2.0]]), torch.tensor([[-1.0, 0.5], [0.0, 1.0]])).values
    tensor([[0.5000, 0.0000]])
    """
    if values.dim() != 2 or not values.shape[1] or z.dim() == 0 or z.shape[-1] != len(values):
        raise ValueError(
            f"`z` must be (..., D) and `values` (D, V) with V > 0, got {tuple(z.shape)} and "
            f"{tuple(values.shape)}"
        )
    require_one_kind("z", z, "values", values)
    rows = z.reshape(-1, z.shape[-1])
    codes, indices = ops.nearest_value(rows.detach(), values)
    codes = codes.reshape(z.shape)
    through = torch.is_grad_enabled() and z.requires_grad
    quantized = _straight_through(z, codes) if through else codes.detach()
    return Quantized(quantized, indices.reshape(z.shape), codes)


@torch.no_grad()
def update_codebook(
    codebook: Tensor,
    counts: Tensor,
    sums: Tensor,
    x: Tensor,
    indices: Tensor,
    *,
    decay: float = 0.99,
    eps: float = 1e-5,
    revive_below: float = 0.0,
    generator: torch.Generator | None = None,
) -> int:
    """Move each code towards the mean of the rows assigned to it; return how many were revived.

    In place: `counts` (M,) and `sums` (M, d) are moving averages, with `decay`, of the number and
    the sum of the rows `x` (..., d) whose `indices` (...,) are a code; a code is its sum over its
    count, smoothed by `eps` (arXiv 1711.00937, appendix A.1). Codes whose count is below
    `revive_below` restart at random rows of `x` drawn from `generator`, with a count of one.

    >>> codebook, counts, sums = torch.zeros(1, 2), torch.ones(1), torch.zeros(1, 2)
    >>> update_codebook(codebook, counts, sums, torch.ones(4, 2), torch.zeros(4).long(), decay=0.0)
    0
    >>> codebook
    tensor([[1., 1.]])
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"`decay` must be in [0, 1], got {decay}")
    _check_codes(x, codebook)
    if counts.shape != codebook.shape[:1] or sums.shape != codebook.shape:
        raise ValueError(
            f"`counts` and `sums` must be {tuple(codebook.shape[:1])} and {tuple(codebook.shape)}, "
            f"got {tuple(counts.shape)} and {tuple(sums.shape)}"
        )
    rows, chosen = x.reshape(-1, x.shape[-1]), indices.reshape(-1)
    assigned = torch.bincount(chosen, minlength=len(codebook)).to(counts)
    counts.lerp_(assigned, 1 - decay)
    sums.lerp_(torch.zeros_like(sums).index_add_(0, chosen, rows), 1 - decay)
    total = counts.sum()
    smoothed = (counts + eps) / (total + len(codebook) * eps) * total
    codebook.copy_(sums / smoothed[:, None].clamp(min=eps))
    dead = (counts < revive_below).nonzero()[:, 0]
    if len(dead) and len(rows):
        drawn = torch.randint(len(rows), (len(dead),), generator=generator).to(rows.device)
        codebook[dead] = sums[dead] = rows[drawn]
        counts[dead] = 1.0
    return len(dead) if len(rows) else 0


def _straight_through(x: Tensor, codes: Tensor) -> Tensor:
    """Return `codes` exactly, with the gradient of `x`."""
    return codes.detach() + (x - x.detach())


def _check_codes(x: Tensor, codebook: Tensor) -> None:
    if codebook.dim() != 2 or not len(codebook) or x.dim() == 0 or x.shape[-1] != codebook.shape[1]:
        raise ValueError(
            "`x` must be (..., d) and `codebook` (M, d) with M > 0, got "
            f"{tuple(x.shape)} and {tuple(codebook.shape)}"
        )
    require_one_kind("x", x, "codebook", codebook)
