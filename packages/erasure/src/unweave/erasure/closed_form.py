"""Closed-form edits of linear maps as exact low-rank changes, with one solve for every matrix.

UCE (arXiv 2308.14761) and its relatives move the outputs of a matrix W at some inputs c_i to
those at other inputs c*_i and keep the outputs at further inputs:

    W' = (lambda W + sum s_e W c* c^T + sum s_p W c_p c_p^T) A^-1,
    A  = lambda I + sum s_e c c^T + sum s_p c_p c_p^T.

Hence W' - W = [W (C* - C)^T] [s_e C A^-1]: a LoRA whose second factor no W enters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unweave.diffusion_core.changes import LowRank
from unweave.diffusion_core.errors import NonFiniteError, SelectionError, UnweaveError


@dataclass(frozen=True)
class ClosedFormEdit:
    """The part of an edit that all matrices share.

    `difference` (edits, width) is C* - C and `down` (edits, width) is s_e C A^-1, in float64.
    """

    difference: Tensor
    down: Tensor

    def low_rank(self, weight: Tensor) -> LowRank:
        """Return the change of `weight` (out, width) as factors in its dtype, on the CPU.

        >>> edit = closed_form_edit(torch.eye(3)[:1], torch.eye(3)[1:2], regularisation=1.0)
        >>> change = edit.low_rank(torch.eye(3))
        >>> change.rank, (torch.eye(3) + change.dense())[:, 0].tolist()
        (1, [0.5, 0.5, 0.0])
        """
        if weight.ndim != 2 or weight.shape[1] != self.down.shape[1]:
            raise SelectionError(
                f"`weight` must be (out, {self.down.shape[1]}) to read these inputs, got "
                f"{tuple(weight.shape)}"
            )
        up = weight.detach().cpu().double() @ self.difference.T
        return LowRank(self.down.to(weight.dtype), up.to(weight.dtype))


def closed_form_edit(
    sources: Tensor,
    targets: Tensor,
    preserved: Tensor | None = None,
    *,
    regularisation: float = 0.5,
    edit_scale: float = 1.0,
    preserve_scale: float = 1.0,
) -> ClosedFormEdit:
    """Solve for the edit that sends `sources` (edits, width) to where `targets` go now.

    `preserved` (n, width) are inputs whose outputs should stay. `regularisation` is lambda. Rows
    that are their own target cost no rank. Raises `SelectionError` for shapes that do not fit,
    `UnweaveError` for scales out of range and `NonFiniteError` for NaN or infinite inputs.
    """
    sources, targets = _rows("sources", sources), _rows("targets", targets)
    kept = sources[:0] if preserved is None else _rows("preserved", preserved)
    if sources.shape != targets.shape or kept.shape[1] != sources.shape[1]:
        raise SelectionError(
            "`sources` and `targets` must have equal shapes and `preserved` their width, got "
            f"{tuple(sources.shape)}, {tuple(targets.shape)} and {tuple(kept.shape)}"
        )
    _check_scales(regularisation, edit_scale, preserve_scale)
    moved = (targets != sources).any(1)
    rows = torch.cat(
        [
            math.sqrt(edit_scale) * sources[moved],
            math.sqrt(edit_scale) * sources[~moved],
            math.sqrt(preserve_scale) * kept,
        ]
    )
    num_moved = int(moved.sum())
    few = rows.shape[0] < rows.shape[1]
    solve = rows_times_inverse_woodbury if few else rows_times_inverse_dense
    down = math.sqrt(edit_scale) * solve(rows, num_moved, regularisation)
    return ClosedFormEdit(targets[moved] - sources[moved], down)


def rows_times_inverse_dense(rows: Tensor, count: int, regularisation: float) -> Tensor:
    """Return the first `count` rows of Q (lambda I + Q^T Q)^-1 by a (width, width) Cholesky."""
    gram = rows.T @ rows
    gram.diagonal().add_(regularisation)
    return torch.cholesky_solve(rows[:count].T, torch.linalg.cholesky(gram)).T


def rows_times_inverse_woodbury(rows: Tensor, count: int, regularisation: float) -> Tensor:
    """Return the first `count` rows of Q (lambda I + Q^T Q)^-1 = (lambda I + Q Q^T)^-1 Q.

    The Cholesky factor is (rows, rows) only. Both matrices being symmetric, the first rows of the
    product are the first columns of the small inverse, transposed, times Q.
    """
    gram = rows @ rows.T
    gram.diagonal().add_(regularisation)
    columns = torch.eye(rows.shape[0], count, dtype=rows.dtype)
    return torch.cholesky_solve(columns, torch.linalg.cholesky(gram)).T @ rows


def _rows(name: str, value: Tensor) -> Tensor:
    if value.ndim != 2:
        raise SelectionError(f"`{name}` must be (rows, width), got {tuple(value.shape)}")
    if not value.isfinite().all():
        raise NonFiniteError(f"`{name}` has NaN or infinite values")
    return value.detach().cpu().double()


def _check_scales(regularisation: float, edit_scale: float, preserve_scale: float) -> None:
    if not (math.isfinite(regularisation) and regularisation > 0):
        raise UnweaveError(f"`regularisation` must be positive, got {regularisation!r}")
    for name, scale in (("edit_scale", edit_scale), ("preserve_scale", preserve_scale)):
        if not (math.isfinite(scale) and scale >= 0):
            raise UnweaveError(f"`{name}` must be at least 0, got {scale!r}")
