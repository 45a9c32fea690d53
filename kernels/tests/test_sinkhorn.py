"""Sinkhorn-Knopp against its definition and the usual loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unweave.kernels import sinkhorn, use_backend


def usual_loop(scores: Tensor, eps: float, iters: int) -> Tensor:
    q = (scores / eps).exp().T
    q = q / q.sum()
    for _ in range(iters):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 9),
    iters=st.integers(1, 5),
    spread=st.sampled_from([0.1, 1.0, 40.0]),
    seed=st.integers(0, 99),
)
def test_assignments_are_those_of_the_definition(n, k, iters, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(2, n, k, generator=generator, dtype=torch.float64)
    found = sinkhorn(scores, 0.5, iters)
    with use_backend("reference"):
        torch.testing.assert_close(found, sinkhorn(scores, 0.5, iters))
    if spread < 40:
        for own, each in zip(found, scores, strict=True):
            torch.testing.assert_close(own, usual_loop(each, 0.5, iters))
    torch.testing.assert_close(found.sum(2), torch.ones(2, n, dtype=torch.float64))


@pytest.mark.parametrize("size", [1.0, 1e2, 1e4, 1e30])
def test_no_finite_scores_overflow(size):
    scores = size * torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    found = sinkhorn(scores, 0.02, 3)
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(1), torch.ones(40), rtol=1e-4, atol=1e-4)


def test_columns_are_used_equally_in_the_end():
    scores = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    found = sinkhorn(scores, 0.3, 200)
    torch.testing.assert_close(found.sum(0), torch.full((8,), 8.0), rtol=1e-3, atol=1e-3)


def test_scores_stay_and_types_are_kept():
    scores = torch.randn(5, 7, requires_grad=True)
    before = scores.detach().clone()
    assert not sinkhorn(scores).requires_grad
    assert torch.equal(scores, before)
    assert sinkhorn(before.bfloat16()).dtype == torch.bfloat16
    assert sinkhorn(torch.zeros(0, 3, 4)).shape == (0, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3),), "`scores` must be"),
        ((torch.zeros(0, 3),), "N, K > 0"),
        ((torch.zeros(2, 3), 0.0), "`eps`"),
        ((torch.zeros(2, 3), 0.1, 0), "`iters`"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(*arguments)
