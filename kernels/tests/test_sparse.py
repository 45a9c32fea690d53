"""Sparse codes against their definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave.kernels import use_backend
from unweave.kernels.sparse import (
    batch_topk,
    sparse_decode,
    sparse_encode,
    threshold_sparse,
    topk_sparse,
    update_threshold,
)

KINDS = ("normal", "relu", "ties", "zeros", "huge", "nan", "infinite", "all nan", "one row")


def drawn(rows, features, kind="normal", seed=0, dtype=torch.float32):
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))
    if kind == "relu":
        x = (x - 1).relu()
    elif kind == "ties":
        x = (2 * x).round()
    elif kind == "zeros":
        x = torch.zeros_like(x)
        x.view(-1)[::2] = -0.0
    elif kind == "huge":
        x = x * 1e38
    elif kind == "nan":
        x[x > 1] = torch.nan
    elif kind == "infinite":
        x[x > 1], x[x < -1] = torch.inf, -torch.inf
    elif kind == "all nan":
        x = torch.full_like(x, torch.nan)
    elif kind == "one row":
        x[1:] = x[1:].abs().neg() - 10
    return x.to(dtype)


def code(rows, features, entries, seed=0):
    """Entries in rows and features that may repeat, and rows that may be empty."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(max(rows, 1), (entries,), generator=generator).sort().values
    crow = torch.searchsorted(row, torch.arange(rows + 1))
    return torch.randint(features, (entries,), generator=generator), crow


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_definition(call, *arguments, **options):
    with use_backend("reference"):
        return call(*arguments, **options)


def require_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


SHAPES = {
    "rows": st.integers(0, 6),
    "features": st.integers(0, 200),
    "k": st.integers(0, 210),
    "kind": st.sampled_from(KINDS),
    "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    "seed": st.integers(0, 99),
}


@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_the_largest_of_a_row_are_those_of_the_definition(rows, features, k, kind, dtype, seed):
    x = drawn(rows, features, kind, seed, dtype)
    for count in (k, k % 5):
        require_same(topk_sparse(x, count), by_definition(topk_sparse, x, count))


@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_the_largest_of_a_batch_are_those_of_the_definition(rows, features, k, kind, dtype, seed):
    x = drawn(rows, features, kind, seed, dtype)
    for count in (k, k % 5):
        found = batch_topk(x, count)
        require_same(found, by_definition(batch_topk, x, count))
        assert len(found.values) == found.crow[-1] == rows * min(count, features)


@settings(max_examples=30, deadline=None)
@given(
    threshold=st.sampled_from([0.0, -0.0, 0.7, -2.0, torch.inf, -torch.inf, torch.nan]), **SHAPES
)
def test_what_is_above_a_threshold_is_that_of_the_definition(
    threshold, rows, features, k, kind, dtype, seed
):
    x = drawn(rows, features, kind, seed, dtype)
    require_same(threshold_sparse(x, threshold), by_definition(threshold_sparse, x, threshold))


@pytest.mark.parametrize("kind", KINDS)
def test_many_features(kind):
    x = drawn(64, 3001, kind)
    require_same(topk_sparse(x, 16), by_definition(topk_sparse, x, 16))
    require_same(batch_topk(x, 16), by_definition(batch_topk, x, 16))


def test_values_of_a_row_are_those_of_torch():
    x = drawn(3, 500).reshape(3, 1, 500)
    torch.testing.assert_close(topk_sparse(x, 7).values, x.topk(7).values)


def test_nan_is_larger_than_everything():
    x = torch.tensor([[1.0, torch.nan, torch.inf], [0.0, 5.0, -torch.inf]])
    assert topk_sparse(x, 2).indices.tolist() == [[1, 2], [1, 0]]
    assert batch_topk(x, 1).indices.tolist() == [1, 2]
    assert threshold_sparse(x, 1e9).indices.tolist() == [1, 2]


def test_equal_elements_are_taken_by_place():
    x = torch.ones(3, 100)
    assert topk_sparse(x, 3).indices.tolist() == [[0, 1, 2]] * 3
    found = batch_topk(x, 40)
    assert found.crow.tolist() == [0, 100, 120, 120]
    assert found.indices.tolist() == [*range(100), *range(20)]


@pytest.mark.parametrize("shape", [(7,), (2, 0, 7), (2, 3, 7), (0,), (2, 0)])
def test_leading_dimensions_stay(shape):
    k = min(3, shape[-1])
    values, indices = topk_sparse(torch.ones(shape), 3)
    assert values.shape == indices.shape == (*shape[:-1], k)
    dictionary = torch.ones(shape[-1], 5)
    assert sparse_decode(values, indices, dictionary).shape == (*shape[:-1], 5)
    x = torch.ones(*shape[:-1], 5)
    assert sparse_encode(x, dictionary, indices).shape == indices.shape


def test_strides_do_not_matter():
    x = drawn(200, 40)
    for view in (x.T, x[::2, 1::3], x[:, 5:]):
        require_same(topk_sparse(view, 4), topk_sparse(view.contiguous(), 4))
        require_same(batch_topk(view, 4), batch_topk(view.contiguous(), 4))
    values, indices = numbers(6, 8), torch.arange(6)[:, None].expand(6, 8) % 5
    dictionary = numbers(3, 5).T
    usual = sparse_decode(values.contiguous(), indices.contiguous(), dictionary.contiguous())
    torch.testing.assert_close(sparse_decode(values, indices, dictionary), usual, rtol=0, atol=0)


@pytest.mark.parametrize("select", [topk_sparse, batch_topk, threshold_sparse])
def test_values_have_the_gradient_of_the_input(select):
    x = drawn(3, 12, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: select(x, 2).values, x)
    (grad,) = torch.autograd.grad(select(x, 2).values.square().sum(), x)
    chosen = torch.zeros_like(x)
    found = select(x, 2)
    rows = torch.arange(3)[:, None]
    if select is not topk_sparse:
        rows = torch.arange(3).repeat_interleave(found.crow.diff())
    chosen[rows, found.indices] = 2 * found.values.detach()
    assert torch.equal(grad, chosen)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 7),
    features=st.integers(1, 9),
    width=st.integers(0, 40),
    entries=st.integers(0, 40),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_products_and_gradients_are_those_of_the_definition(
    rows, features, width, entries, dtype, seed
):
    indices, crow = code(rows, features, entries if rows else 0, seed)
    values = numbers(len(indices), seed=seed, dtype=dtype).requires_grad_()
    dictionary = numbers(features, width, seed=seed, dtype=dtype).requires_grad_()
    x = numbers(rows, width, seed=seed + 1, dtype=dtype).requires_grad_()
    bias = numbers(features, seed=seed + 2, dtype=dtype).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (values, dictionary, x, bias)]

    def results(values, dictionary, x, bias):
        decoded = sparse_decode(values, indices, dictionary, crow=crow)
        encoded = sparse_encode(x, dictionary, indices, bias, crow=crow)
        loss = decoded.square().sum() + encoded.square().sum()
        return decoded, encoded, *torch.autograd.grad(loss, [values, dictionary, x, bias])

    found = results(values, dictionary, x, bias)
    expected = by_definition(results, *exact)
    allowed = {torch.bfloat16: 0.05, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= allowed * (1 + other.norm())


def test_gradcheck_twice():
    indices, crow = code(4, 5, 11)
    values, dictionary = numbers(11).requires_grad_(), numbers(5, 3).requires_grad_()
    x, bias = numbers(4, 3, seed=1).requires_grad_(), numbers(5).requires_grad_()
    for call, inputs in [
        (lambda v, d: sparse_decode(v, indices, d, crow=crow), (values, dictionary)),
        (lambda x, w, b: sparse_encode(x, w, indices, b, crow=crow), (x, dictionary, bias)),
    ]:
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("needed", [0, 1])
def test_one_input_alone_may_need_a_gradient(needed):
    indices, crow = code(4, 5, 11)
    pairs = [(numbers(11), numbers(5, 3)), (numbers(4, 3), numbers(5, 3))]
    calls = [
        lambda v, d: sparse_decode(v, indices, d, crow=crow),
        lambda x, w: sparse_encode(x, w, indices, crow=crow),
    ]
    for inputs, call in zip(pairs, calls, strict=True):
        inputs[needed].requires_grad_()
        (grad,) = torch.autograd.grad(call(*inputs).sum(), inputs[needed])
        (expected,) = torch.autograd.grad(by_definition(call, *inputs).sum(), inputs[needed])
        torch.testing.assert_close(grad, expected)


def test_a_sparse_gradient_holds_the_features_that_occur():
    indices, crow = code(6, 1000, 40)
    values, dictionary = numbers(40), numbers(1000, 3).requires_grad_()
    for backend in ("auto", "reference"):
        dense, sparse = (
            torch.autograd.grad(
                _decoded(backend, values, indices, dictionary, crow, option).square().sum(),
                dictionary,
            )[0]
            for option in (False, True)
        )
        assert not dense.is_sparse and sparse.is_sparse
        sparse = sparse.coalesce()
        assert torch.equal(sparse.indices()[0], indices.unique())
        torch.testing.assert_close(sparse.to_dense(), dense)


def _decoded(backend, values, indices, dictionary, crow, sparse_grad):
    with use_backend(backend):
        return sparse_decode(values, indices, dictionary, crow=crow, sparse_grad=sparse_grad)


def test_a_sparse_gradient_drives_sparse_adam():
    dictionary = torch.nn.Parameter(torch.zeros(50, 4))
    optimizer = torch.optim.SparseAdam([dictionary], lr=0.1)
    sparse_decode(
        torch.ones(1, 2), torch.tensor([[3, 7]]), dictionary, sparse_grad=True
    ).sum().backward()
    optimizer.step()
    assert dictionary.detach().abs().sum(1).nonzero()[:, 0].tolist() == [3, 7]


def test_encoding_after_a_selection_has_the_gradients_of_the_dense_layer():
    h, weight, bias = numbers(9, 4), numbers(70, 4, seed=1), numbers(70, seed=2)
    inputs = [t.requires_grad_() for t in (h, weight, bias)]
    dense = topk_sparse(torch.nn.functional.linear(h, weight, bias).relu(), 3)
    sparse = sparse_encode(h, weight, dense.indices, bias).relu()
    torch.testing.assert_close(sparse, dense.values)
    for one, other in zip(
        torch.autograd.grad(sparse.square().sum(), inputs),
        torch.autograd.grad(dense.values.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_values_that_are_not_finite_stay_visible():
    dictionary = torch.tensor([[1.0, torch.nan], [torch.inf, 2.0]])
    found = sparse_decode(torch.tensor([[1.0, 0.0]]), torch.tensor([[0, 1]]), dictionary)
    assert found.isnan().all()
    assert sparse_encode(torch.ones(1, 2), dictionary, torch.tensor([[0, 1]])).isfinite().sum() == 0


def test_results_do_not_depend_on_threads(threads):
    x = drawn(300, 2000)
    indices, crow = code(300, 500, 9000)
    values, dictionary = drawn(1, 9000)[0].requires_grad_(), drawn(500, 33).requires_grad_()
    rows = drawn(300, 33, seed=1).requires_grad_()

    def results():
        decoded = sparse_decode(values, indices, dictionary, crow=crow)
        encoded = sparse_encode(rows, dictionary, indices, crow=crow)
        grads = torch.autograd.grad(
            decoded.square().sum() + encoded.square().sum(), [values, dictionary, rows]
        )
        return (
            *topk_sparse(x, 8),
            *batch_topk(x, 8),
            *threshold_sparse(x, 2.0),
            decoded,
            encoded,
            *grads,
        )

    threads(1)
    alone = results()
    threads(3)
    for _ in range(2):
        require_same(results(), alone)


def test_the_operators_keep_torchs_contract():
    x = drawn(4, 70)
    indices, crow = code(4, 5, 11)
    values, dictionary = drawn(1, 11)[0].requires_grad_(), drawn(5, 3).requires_grad_()
    rows = drawn(4, 3).requires_grad_()
    operators = torch.ops.unweave
    torch.library.opcheck(operators.topk_sparse, (x, 3))
    torch.library.opcheck(operators.batch_topk, (x, 12))
    torch.library.opcheck(operators.threshold_sparse, (x, torch.tensor(0.5)))
    torch.library.opcheck(operators.sparse_decode, (values, indices, crow, dictionary, False))
    torch.library.opcheck(operators.sparse_encode, (rows, dictionary, indices, crow))
    torch.library.opcheck(operators.sparse_scatter, (values, indices, crow, rows, 5))
    torch.library.opcheck(
        operators.sparse_decode_backward, (rows, values, indices, crow, dictionary)
    )


def test_a_compiled_step_is_the_same():
    h, weight, bias = drawn(6, 4), drawn(70, 4, seed=1), drawn(1, 70)[0]
    dictionary = drawn(70, 4, seed=2)

    def step(h, weight, bias, dictionary):
        x = torch.nn.functional.linear(h, weight, bias).relu()
        one = topk_sparse(x, 3)
        many = batch_topk(x, 3)
        again = sparse_encode(h, weight, one.indices, bias).relu()
        return (
            sparse_decode(one.values, one.indices, dictionary)
            + sparse_decode(many.values, many.indices, dictionary, crow=many.crow)
            + sparse_decode(again, one.indices, dictionary)
        )

    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = [t.clone().requires_grad_() for t in (h, weight, bias, dictionary)]
        out = call(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_a_compiled_threshold_is_the_same(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "capture_dynamic_output_shape_ops", True)
    x = drawn(6, 70)
    compiled = torch.compile(
        lambda x: threshold_sparse(x, 1.0), fullgraph=True, backend="aot_eager"
    )
    require_same(compiled(x), threshold_sparse(x, 1.0))


def test_the_threshold_follows_the_least_positive_value():
    threshold = torch.tensor(-1.0)
    update_threshold(threshold, torch.tensor([0.0, -3.0, torch.nan]))
    assert threshold == -1
    update_threshold(threshold, torch.tensor([[0.0, 4.0], [2.0, -1.0]], dtype=torch.float64))
    assert threshold == 2
    update_threshold(threshold, torch.tensor([1.0]), decay=0.9)
    torch.testing.assert_close(threshold, torch.tensor(1.9))
    update_threshold(threshold, torch.zeros(0))
    torch.testing.assert_close(threshold, torch.tensor(1.9))


def test_the_threshold_of_batches_encodes_as_many_entries_without_a_batch():
    threshold = torch.tensor(-1.0)
    for seed in range(30):
        update_threshold(threshold, batch_topk(drawn(50, 400, "relu", seed), 8).values, decay=0.9)
    found = threshold_sparse(drawn(200, 400, "relu", 99), threshold)
    assert 6 < len(found.values) / 200 < 10


FLOATS, INTS = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: topk_sparse(torch.tensor(1.0), 1), r"`x` must be floating \(\.\.\., F\)"),
        (lambda: topk_sparse(INTS, 1), "`x` must be floating"),
        (lambda: topk_sparse(FLOATS, -1), "`k` must be at least 0, got -1"),
        (lambda: batch_topk(torch.zeros(2, 3, 4), 1), r"`x` must be floating \(B, F\)"),
        (lambda: batch_topk(FLOATS, -1), "`k_per_row` must be at least 0"),
        (lambda: threshold_sparse(torch.zeros(3), 0.1), r"`x` must be floating \(B, F\)"),
        (lambda: threshold_sparse(FLOATS, torch.zeros(3)), "`threshold` must be one number"),
        (lambda: update_threshold(torch.zeros(1), FLOATS), "without dimensions"),
        (lambda: update_threshold(torch.tensor(0.0), FLOATS, decay=2.0), "`decay` must be in"),
        (lambda: sparse_decode(FLOATS, INTS, torch.zeros(4)), r"`dictionary` must be floating"),
        (lambda: sparse_decode(FLOATS, INTS, torch.zeros(4, 2).double()), "one dtype and device"),
        (lambda: sparse_decode(FLOATS, INTS[:, :2], torch.zeros(4, 2)), "one shape"),
        (lambda: sparse_decode(FLOATS, INTS.int(), torch.zeros(4, 2)), "`indices` must be int64"),
        (lambda: sparse_decode(FLOATS, INTS + 4, torch.zeros(4, 2)), "from 0 to 3, .* got 4"),
        (lambda: sparse_decode(FLOATS, INTS - 1, torch.zeros(4, 2)), "from 0 to 3, .* got -1"),
        (lambda: sparse_decode(FLOATS, INTS, FLOATS, crow=INTS[0]), "with `crow`"),
        (
            lambda: sparse_decode(FLOATS[0], INTS[0], FLOATS, crow=torch.tensor([0, 4])),
            r"rise from 0 to the number of entries 3",
        ),
        (
            lambda: sparse_decode(FLOATS[0], INTS[0], FLOATS, crow=torch.tensor([0, 5, 3])),
            r"rise from 0 to the number of entries 3",
        ),
        (lambda: sparse_encode(FLOATS, torch.zeros(4, 2), INTS), r"`weight` \(F, d\)"),
        (lambda: sparse_encode(FLOATS, torch.zeros(4, 3), INTS[:1]), r"`x` must have the rows"),
        (lambda: sparse_encode(FLOATS, torch.zeros(4, 3), INTS, torch.zeros(3)), "`bias` must be"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_arguments_are_named(call, message, backend):
    with use_backend(backend), pytest.raises(ValueError, match=message):
        call()


def test_a_compiled_graph_still_looks_at_where_entries_are():
    compiled = torch.compile(sparse_decode, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="from 0 to 1"):
        compiled(FLOATS, INTS + 7, FLOATS)
