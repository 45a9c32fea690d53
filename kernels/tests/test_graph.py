"""Graph products against their definitions."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave.kernels import use_backend
from unweave.kernels.graph import Transposed, edge_dot, transpose_csr, weighted_spmm

pytest.importorskip("numba")


def drawn(rows, columns, edges, width, seed=0, dtype=torch.float64, index=torch.int64):
    """A graph whose first rows and columns have most of the edges, its weights and its table."""
    generator = torch.Generator().manual_seed(seed)
    skewed = torch.rand(2, edges, generator=generator).pow(3)
    row = (skewed[0] * rows).long().sort().values
    crow = torch.zeros(rows + 1, dtype=torch.int64)
    crow[1:] = row.bincount(minlength=rows).cumsum(0)
    col = (skewed[1] * columns).long()
    weight = torch.randn(edges, generator=generator, dtype=torch.float64).to(dtype)
    dense = torch.randn(columns, width, generator=generator, dtype=torch.float64).to(dtype)
    return crow.to(index), col.to(index), weight, dense


def rows_of(crow):
    return torch.arange(len(crow) - 1).repeat_interleave(crow.diff())


def matrix(crow, col, weight, columns):
    """The graph as a matrix, in which the weights of edges that repeat are added."""
    out = torch.zeros(len(crow) - 1, columns, dtype=weight.dtype)
    return out.index_put((rows_of(crow), col.long()), weight, accumulate=True)


def gradients(crow, col, weight, dense, **options):
    """The product and its gradients."""
    weight, dense = weight.clone().requires_grad_(), dense.clone().requires_grad_()
    out = weighted_spmm(crow, col, weight, dense, **options)
    generator = torch.Generator().manual_seed(9)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, (weight, dense), grad)


def dot_gradients(u, v, row, col):
    """The dot products and their gradients."""
    u, v = u.clone().requires_grad_(), v.clone().requires_grad_()
    out = edge_dot(u, v, row, col)
    generator = torch.Generator().manual_seed(9)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, (u, v), grad)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 30),
    edges=st.integers(0, 200),
    width=st.integers(0, 40),
    seed=st.integers(0, 999),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_product_and_gradients_are_those_of_a_dense_matrix(
    rows, columns, edges, width, seed, index
):
    crow, col, weight, dense = drawn(rows, columns, edges, width, seed, index=index)
    found = gradients(crow, col, weight, dense)
    given_transpose = gradients(
        crow, col, weight, dense, transpose=transpose_csr(crow, col, columns)
    )
    with use_backend("reference"):
        defined = gradients(crow, col, weight, dense)
    weight.requires_grad_(), dense.requires_grad_()
    out = matrix(crow, col, weight, columns) @ dense
    generator = torch.Generator().manual_seed(9)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    expected = (out, *torch.autograd.grad(out, (weight, dense), grad))
    for one, same, other, wanted in zip(found, given_transpose, defined, expected, strict=True):
        assert torch.equal(one, same)
        torch.testing.assert_close(one, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(other, wanted, rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 30),
    edges=st.integers(0, 200),
    width=st.integers(0, 40),
    seed=st.integers(0, 999),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_dot_products_are_elements_of_the_matrix_product(rows, columns, edges, width, seed, index):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    v = torch.randn(columns, width, generator=generator, dtype=torch.float64)
    row = torch.randint(rows, (edges,), generator=generator).to(index)
    col = torch.randint(columns, (edges,), generator=generator)
    found = dot_gradients(u, v, row, col)
    torch.testing.assert_close(found[0], (u @ v.T)[row.long(), col], rtol=1e-10, atol=1e-10)
    with use_backend("reference"):
        defined = dot_gradients(u, v, row, col)
    torch.testing.assert_close(found, defined, rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 20),
    columns=st.integers(1, 20),
    edges=st.integers(0, 100),
    seed=st.integers(0, 999),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_a_transposed_graph_is_sorted_by_column_and_stable(rows, columns, edges, seed, index):
    crow, col, *_ = drawn(rows, columns, edges if rows else 0, 1, seed, index=index)
    found = transpose_csr(crow, col, columns)
    with use_backend("reference"):
        assert all(
            torch.equal(*pair)
            for pair in zip(found, transpose_csr(crow, col, columns), strict=True)
        )
    assert {part.dtype for part in found} == {index}
    assert torch.equal(found.order.long(), col.sort(stable=True).indices)
    assert torch.equal(found.col.long(), rows_of(crow)[found.order.long()])
    assert torch.equal(found.crow.diff().long(), col.bincount(minlength=columns))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_is_that_of_the_dtype(dtype):
    crow, col, weight, dense = drawn(50, 40, 600, 33, dtype=dtype)
    found = gradients(crow, col, weight, dense)
    expected = gradients(crow, col, weight.double(), dense.double())
    assert {part.dtype for part in found} == {dtype}
    scale = max(1.0, float(expected[2].abs().max()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            one.double(), other, rtol=0, atol=4 * scale * torch.finfo(dtype).eps
        )
    dots = edge_dot(dense, dense, col, col)
    assert dots.dtype == dtype
    torch.testing.assert_close(
        dots, edge_dot(dense.double(), dense.double(), col, col).to(dtype), rtol=1e-2, atol=1e-3
    )


def product_of(crow, col, transpose, weight, dense):
    return weighted_spmm(crow, col, weight, dense, transpose=transpose)


def test_gradients_of_gradients():
    crow, col, weight, dense = drawn(4, 3, 9, 2)
    weight.requires_grad_(), dense.requires_grad_()
    row = rows_of(crow)
    u = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    for transpose in (None, transpose_csr(crow, col, 3)):
        product = partial(product_of, crow, col, transpose)
        assert torch.autograd.gradcheck(product, (weight, dense))
        assert torch.autograd.gradgradcheck(product, (weight, dense))
    dots = partial(edge_dot, row=row, col=col)
    assert torch.autograd.gradcheck(dots, (u, dense))
    assert torch.autograd.gradgradcheck(dots, (u, dense))


def test_only_what_needs_a_gradient_gets_one():
    crow, col, weight, dense = drawn(5, 4, 12, 3)
    _, of_weight, of_dense = gradients(crow, col, weight, dense)
    generator = torch.Generator().manual_seed(9)
    grad = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    for wanted, expected in ((weight, of_weight), (dense, of_dense)):
        wanted.requires_grad_()
        (alone,) = torch.autograd.grad(weighted_spmm(crow, col, weight, dense), wanted, grad)
        assert torch.equal(alone, expected)
        wanted.requires_grad_(False)
    row = rows_of(crow)
    dense.requires_grad_()
    edge_dot(grad, dense, row, col).sum().backward()
    assert dense.grad is not None and grad.grad is None


def test_one_row_may_have_all_edges_and_others_none():
    weight = torch.arange(1.0, 6.0)
    for place in range(4):
        crow = torch.tensor([0] * (place + 1) + [5] * (4 - place))
        out = weighted_spmm(crow, torch.zeros(5, dtype=torch.int64), weight, torch.ones(1, 3))
        assert out.sum() == 45 and torch.equal(out[place], torch.full((3,), 15.0))


@pytest.mark.parametrize(
    ("rows", "columns", "width"), [(0, 3, 2), (3, 0, 2), (3, 3, 0), (0, 0, 0), (1, 1, 1)]
)
def test_nothing_is_allowed(rows, columns, width):
    crow, col, weight, dense = drawn(rows, columns, 0, width, dtype=torch.float32)
    out, of_weight, of_dense = gradients(crow, col, weight, dense)
    assert out.shape == (rows, width) and not out.any()
    assert of_weight.shape == (0,) and of_dense.shape == dense.shape and not of_dense.any()
    dots = dot_gradients(out, dense, col, col)
    assert [part.shape for part in dots] == [(0,), out.shape, dense.shape]
    assert transpose_csr(crow, col, columns).crow.tolist() == [0] * (columns + 1)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_spreads_along_its_edges_only(bad):
    crow, col, weight, dense = drawn(30, 20, 60, 9, dtype=torch.float32)
    clean = gradients(crow, col, weight, dense)
    dense[col[7], 4] = bad
    out, of_weight, of_dense = gradients(crow, col, weight, dense)
    reached = torch.zeros_like(out, dtype=torch.bool)
    reached[rows_of(crow)[col == col[7]], 4] = True
    assert torch.equal(~out.isfinite(), reached)
    assert torch.equal(out[~reached], clean[0][~reached])
    assert torch.equal(~of_weight.isfinite(), col == col[7])
    assert torch.equal(of_dense, clean[2])
    dots = edge_dot(out, dense, rows_of(crow), col)
    alone = torch.isin(rows_of(crow), rows_of(crow)[col == col[7]])
    assert torch.equal(~dots.isfinite(), alone)


def test_huge_numbers_stay_finite_where_they_are():
    crow, col = torch.tensor([0, 1, 2]), torch.tensor([0, 1])
    dense = torch.tensor([[1e38, -1e38], [1e-38, 1.0]])
    out = weighted_spmm(crow, col, torch.tensor([1.0, 1e38]), dense)
    torch.testing.assert_close(out, torch.tensor([[1e38, -1e38], [1.0, 1e38]]))
    assert edge_dot(dense, dense, col, col)[0] == torch.inf


def test_slices_and_strides_do_not_matter():
    crow, col, weight, dense = drawn(20, 15, 80, 12)
    expected = gradients(crow, col, weight, dense)
    strided = [torch.stack([part, part], 1)[:, 0] for part in (crow, col, weight)]
    assert not strided[1].is_contiguous()
    wide = torch.cat([dense, dense], 1)
    for table in (wide[:, :12], wide[:, 12:], dense.T.contiguous().T):
        found = gradients(*strided, table)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    row = rows_of(crow)
    out = expected[0]
    dots = edge_dot(out, dense, row, col)
    assert torch.equal(edge_dot(out.T.contiguous().T, wide[:, 12:], row, strided[1]), dots)


def test_runs_and_threads_do_not_change_a_bit(threads):
    crow, col, weight, dense = drawn(3000, 2000, 20_000, 32, dtype=torch.float32)
    results = []
    for count in (1, 3, 3, 5):
        threads(count)
        out, *rest = gradients(crow, col, weight, dense)
        results.append([out, *rest, *dot_gradients(out, dense, rows_of(crow), col)])
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


def test_compiled_graphs_are_equal():
    crow, col, weight, dense = drawn(20, 15, 80, 12)
    transpose = transpose_csr(crow, col, 15)

    def loss(weight, dense, transpose):
        out = weighted_spmm(crow, col, weight, dense, transpose=transpose)
        return out, edge_dot(out, dense, rows_by_search(crow, col), col)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    weight.requires_grad_(), dense.requires_grad_()
    for given_transpose in (None, transpose):
        pairs = []
        for function in (loss, compiled):
            results = function(weight, dense, given_transpose)
            total = sum(part.square().sum() for part in results)
            pairs.append((*results, *torch.autograd.grad(total, (weight, dense))))
        assert all(torch.equal(*pair) for pair in zip(*pairs, strict=True))


def rows_by_search(crow, col):
    return torch.searchsorted(crow, torch.arange(len(col)), right=True) - 1


def test_the_operators_keep_torchs_contract():
    crow, col, weight, dense = drawn(5, 4, 12, 3)
    weight.requires_grad_(), dense.requires_grad_()
    row, unweave = rows_of(crow), torch.ops.unweave
    transpose = transpose_csr(crow, col, 4)
    torch.library.opcheck(unweave.weighted_spmm, (crow, col, weight, dense, None, None, None))
    torch.library.opcheck(unweave.weighted_spmm, (crow, col, weight, dense, *transpose))
    torch.library.opcheck(unweave.edge_dot, (torch.randn(5, 3).double(), dense, row, col))
    torch.library.opcheck(unweave.sorted_edges, (col, row, 4))


TWO = torch.zeros(2)
GRAPH = torch.tensor([0, 1, 2]), torch.tensor([0, 1])
TABLE = torch.zeros(2, 3)
WRONG = Transposed(torch.zeros(2).long(), *GRAPH)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weighted_spmm(*GRAPH, torch.zeros(3), TABLE), "`weight` must be"),
        (lambda: weighted_spmm(*GRAPH, TWO, TWO), r"`dense` \(M, d\)"),
        (lambda: weighted_spmm(*GRAPH, TWO, TABLE.double()), "one floating dtype"),
        (lambda: weighted_spmm(*GRAPH, TWO.long(), TABLE.long()), "one floating dtype"),
        (lambda: weighted_spmm(TWO, GRAPH[1], TWO, TABLE), "`crow` must .* int32 or int64"),
        (lambda: weighted_spmm(GRAPH[1][:0], GRAPH[1], TWO, TABLE), r"`crow` must be \(N \+ 1,\)"),
        (
            lambda: weighted_spmm(torch.tensor([1, 2]), GRAPH[1], TWO, TABLE),
            "`crow` must rise from 0",
        ),
        (
            lambda: weighted_spmm(torch.tensor([0, 3]), GRAPH[1], TWO, TABLE),
            "number of edges 2, got 0 to 3",
        ),
        (
            lambda: weighted_spmm(torch.tensor([0, 9, -4, 2]), GRAPH[1], TWO, TABLE),
            "`crow` must rise .* least step -13",
        ),
        (
            lambda: weighted_spmm(GRAPH[0], torch.tensor([0, 2]), TWO, TABLE),
            r"`col` must be in \[0, 2\), got 0 to 2",
        ),
        (
            lambda: weighted_spmm(GRAPH[0], torch.tensor([-1, 1]), TWO, TABLE),
            r"`col` must be in \[0, 2\), got -1 to 1",
        ),
        (lambda: weighted_spmm(*GRAPH, TWO, TABLE, transpose=WRONG), "`transpose` must hold"),
        (lambda: edge_dot(TABLE, TABLE[:, :2], *GRAPH), r"`v` \(M, d\)"),
        (lambda: edge_dot(TABLE, TABLE.double(), *GRAPH), "one floating dtype"),
        (lambda: edge_dot(TABLE, TABLE, *GRAPH), "one length, got 3 and 2"),
        (lambda: edge_dot(TABLE, TABLE, TABLE.long(), GRAPH[1]), "`row` must have one dimension"),
        (
            lambda: edge_dot(TABLE, TABLE, GRAPH[1] + 1, GRAPH[1]),
            r"`row` must be in \[0, 2\), got 1 to 2",
        ),
        (lambda: edge_dot(TABLE, TABLE, GRAPH[1], GRAPH[1] - 1), r"`col` must be in \[0, 2\)"),
        (lambda: transpose_csr(*GRAPH, 1), r"`col` must be in \[0, 1\)"),
        (lambda: transpose_csr(*GRAPH, -1), "`columns` must not be negative"),
        (lambda: transpose_csr(GRAPH[1], GRAPH[1], 2), "`crow` must rise"),
    ],
)
def test_bad_arguments_are_named(call, message, backend):
    with use_backend(backend), pytest.raises(ValueError, match=message):
        call()


def test_a_transpose_of_another_graph_is_no_crash():
    crow, col = GRAPH
    far = Transposed(crow, torch.tensor([0, 7]), torch.tensor([0, 1]))
    dense = TABLE.clone().requires_grad_()
    out = weighted_spmm(crow, col, TWO, dense, transpose=far)
    with pytest.raises(ValueError, match="must be in"):
        out.sum().backward()
