"""Several LoRAs fused into one change of each matrix, in closed form (MACE, arXiv 2403.06135)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unweave.diffusion_core.changes import LowRank
from unweave.erasure.closed_form import ClosedFormEdit


@dataclass(frozen=True)
class Fusion:
    """The part of a fusion that all matrices share.

    `refinement` is the refinement as far as preserved states leave it. `carriers` (width, width),
    one a concept, are E_i A^-1: what of its LoRA's input the fused matrix reads.
    """

    refinement: ClosedFormEdit
    carriers: tuple[Tensor, ...]

    def change(self, weight: Tensor, factors: Sequence[tuple[Tensor, Tensor]]) -> LowRank:
        """Return the change of `weight` (out, width) with one (down, up) for each concept."""
        refined = self.refinement.low_rank(weight)
        downs, ups = [refined.down], [refined.up]
        for (down, up), carrier in zip(factors, self.carriers, strict=True):
            downs.append((down.cpu().double() @ carrier).to(refined.down))
            ups.append(up.to(refined.up))
        return LowRank(torch.cat(downs), torch.cat(ups, dim=1))


def fuse(
    refinement: ClosedFormEdit,
    grams: Sequence[Tensor],
    prior: Tensor | None,
    prior_weight: float,
    *,
    ridge: float = 1e-6,
) -> Fusion:
    """Solve min sum_i sum_e || W e - (W_r + dW_i) e ||^2 + lambda sum_p || W p - W_0 p ||^2.

    `grams` are E_i = sum e e^T (width, width) over the states of each concept's prompts; `prior`
    (n, width) are the states p. With W = W_r + X and P = sum p p^T it is
    X A = sum_i dW_i E_i + lambda (W_0 - W_r) P, A = sum_i E_i + lambda P + ridge I, `ridge` being
    relative to A's mean eigenvalue: X is 0 where no state says anything.
    """
    preserved = torch.zeros_like(grams[0]) if prior is None else prior_weight * gram_of(prior)
    system = torch.stack(list(grams)).sum(0) + preserved
    system.diagonal().add_(ridge * system.diagonal().mean())
    factor = torch.linalg.cholesky(system)

    def over_system(rows: Tensor) -> Tensor:
        return torch.cholesky_solve(rows.T, factor).T

    kept = refinement.down - over_system(refinement.down @ preserved)
    return Fusion(
        ClosedFormEdit(refinement.difference, kept), tuple(over_system(gram) for gram in grams)
    )


def gram_of(states: Tensor) -> Tensor:
    """Return sum e e^T over the states (n, width): (width, width) in float64 on the CPU."""
    rows = states.detach().cpu().double()
    return rows.T @ rows
