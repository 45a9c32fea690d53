"""Log-sum-exp and best keys against their definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave.kernels import streaming_logsumexp_topk, use_backend
from unweave.kernels.ranking import cpu


def drawn(n, m, d, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(c, d, generator=generator, dtype=dtype) for c in (n, m))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 9),
    m=st.integers(1, 700),
    k=st.integers(0, 7),
    scale=st.sampled_from([1.0, 20.0, -3.0]),
    seed=st.integers(0, 99),
)
def test_ranking_is_that_of_the_definition(n, m, k, scale, seed):
    queries, keys = drawn(n, m, 5, seed)
    found = streaming_logsumexp_topk(queries, keys, min(k, m), scale=scale)
    with use_backend("reference"):
        expected = streaming_logsumexp_topk(queries, keys, min(k, m), scale=scale)
    torch.testing.assert_close(found.lse, expected.lse)
    torch.testing.assert_close(found.values, expected.values)
    assert torch.equal(found.indices, expected.indices)


def test_blocks_do_not_show(monkeypatch):
    queries, keys = drawn(50, 300, 8)
    whole = streaming_logsumexp_topk(queries, keys, 2)
    monkeypatch.setattr(cpu, "BLOCK", 1000)
    parts = streaming_logsumexp_topk(queries, keys, 2)
    torch.testing.assert_close(parts.lse, whole.lse)
    assert torch.equal(parts.indices, whole.indices)


def test_ties_are_all_among_the_best():
    keys = torch.zeros(400, 2)
    keys[300:303] = 1.0
    found = streaming_logsumexp_topk(torch.ones(1, 2), keys, 3)
    assert found.indices[0].sort().values.tolist() == [300, 301, 302]


def test_large_products_do_not_overflow():
    found = streaming_logsumexp_topk(torch.full((1, 1), 1e4), torch.full((2, 1), 1e4), 1)
    assert found.lse.isfinite().all()
    torch.testing.assert_close(found.lse, torch.tensor([1e8]))


def test_gradcheck():
    queries, keys = (x.requires_grad_() for x in drawn(4, 6, 3))
    assert torch.autograd.gradcheck(
        lambda q, c: streaming_logsumexp_topk(q, c, 2, scale=1.5)[:2], (queries, keys)
    )


def test_the_operator_keeps_torchs_contract():
    queries, keys = (x.requires_grad_() for x in drawn(4, 6, 3, dtype=torch.float32))
    torch.library.opcheck(torch.ops.unweave.logsumexp_topk, (queries, keys, 2, 1.0))


@pytest.mark.parametrize(
    ("queries", "keys", "k", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 2), 1, r"`keys` \(M, d\)"),
        (torch.zeros(2, 3), torch.zeros(0, 3), 0, "M > 0"),
        (torch.zeros(2, 3), torch.zeros(4, 3), 5, "`k` must be from 0"),
        (torch.zeros(2, 3), torch.zeros(4, 3).double(), 1, "float32 or float64"),
        (torch.zeros(2, 3).half(), torch.zeros(4, 3).half(), 1, "float32 or float64"),
    ],
)
def test_bad_arguments_are_named(queries, keys, k, message):
    with pytest.raises(ValueError, match=message):
        streaming_logsumexp_topk(queries, keys, k)
