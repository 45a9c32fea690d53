"""Attention against its definition in float64, forwards and backwards."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unweave.kernels import (
    attention_maps,
    attention_product,
    attention_with_maps,
    masked_attention,
    self_attention_rows,
    use_backend,
)
from unweave.kernels.attention import cpu, ops, reference

SHAPES = {
    "B2-H3-Q5-K7-d8-e8": (2, 3, 5, 7, 8, 8),
    "B1-H2-Q63-K77-d40-e40": (1, 2, 63, 77, 40, 40),
    "B1-H1-Q1-K1-d1-e1": (1, 1, 1, 1, 1, 1),
    "B2-H2-Q9-K33-d6-e10": (2, 2, 9, 33, 6, 10),
}
REDUCTIONS = ("mean", "sum", "none")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def _fused(monkeypatch):
    """Small scores too go through the fused form."""
    monkeypatch.setattr(ops, "KEPT", 0)


def inputs(shape, dtype=torch.float64, seed=0, grad=False) -> tuple[Tensor, Tensor, Tensor]:
    b, h, q, k, d, e = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((b, h, q, d), (b, h, k, d), (b, h, k, e))
    drawn = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return tuple(x.to(dtype).requires_grad_(grad) for x in drawn)


def masks(shape, seed=1) -> dict[str, Tensor | None]:
    b, h, q, k, *_ = shape
    generator = torch.Generator().manual_seed(seed)
    boolean = torch.rand(b, h, q, k, generator=generator) < 0.7
    boolean[..., -1, :] = False
    added = torch.randn(b, 1, q, k, generator=generator, dtype=torch.float64)
    return {
        "none": None,
        "boolean": boolean,
        "added": added.masked_fill(~boolean[:, :1], -torch.inf),
        "of-keys": boolean[:, :1, :1],
        "of-queries": boolean[0, 0, :, :1],
    }


def assert_close(name: str, found: Tensor, expected: Tensor) -> None:
    """Compare by the root mean square of the difference, relative to that of what is expected."""
    assert found.shape == expected.shape, name
    if not found.numel():
        return
    difference = (found.double() - expected.double()).square().mean().sqrt()
    size = expected.double().square().mean().sqrt()
    assert difference <= TOLERANCE[found.dtype] * (size + 1e-3), (name, difference, size)


def both(function, *tensors, **arguments):
    """Return results and gradients of the fast form and, in float64, of the definition."""
    results = []
    for backend, dtype in (("auto", tensors[0].dtype), ("reference", torch.float64)):
        own = [x.detach().to(dtype).requires_grad_() for x in tensors]
        with use_backend(backend):
            out = function(*own, **arguments)
        outs = [x for x in ((out,) if isinstance(out, Tensor) else out) if x.isfinite().all()]
        torch.manual_seed(3)
        loss = sum((x.double() * torch.randn(x.shape, dtype=torch.float64)).sum() for x in outs)
        loss.backward()
        results.append([*outs, *(x.grad for x in own)])
    return zip(*results, strict=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mask", ["none", "boolean", "added", "of-keys", "of-queries"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_maps_and_gradients_are_those_of_the_definition(shape, mask, dtype):
    tensors = inputs(shape, dtype)
    own = masks(shape)[mask]
    own = own.to(dtype) if own is not None and own.is_floating_point() else own
    chosen = sorted({0, shape[3] // 2, shape[3] - 1})
    results = both(attention_with_maps, *tensors, columns=chosen, mask=own, return_lse=True)
    for place, (found, expected) in enumerate(results):
        assert_close(f"result {place}", found, expected)


@pytest.mark.parametrize("reduce_heads", REDUCTIONS)
def test_groups_sum_their_tokens_and_may_overlap(reduce_heads):
    q, k, v = inputs((2, 3, 5, 7, 8, 8))
    groups = [[0, 1], [1, 4, 6], []]
    _, maps = attention_with_maps(q, k, v, groups=groups, reduce_heads=reduce_heads)
    _, single = attention_with_maps(q, k, v, reduce_heads=reduce_heads)
    expected = torch.stack([single[..., group].sum(-1) for group in groups], -1)
    torch.testing.assert_close(maps, expected)
    for found, expected in both(
        attention_with_maps, q, k, v, groups=groups, reduce_heads=reduce_heads
    ):
        assert_close("groups", found, expected)


def test_maps_of_all_keys_sum_to_one():
    q, k, v = inputs((2, 3, 5, 7, 8, 8), torch.float32)
    torch.testing.assert_close(attention_with_maps(q, k, v)[1].sum(-1), torch.ones(2, 5))


def test_columns_of_each_batch_element_may_differ():
    q, k, v = inputs((2, 3, 5, 7, 8, 8))
    columns = torch.tensor([[0, 3], [6, 6]])
    _, maps = attention_with_maps(q, k, v, columns=columns)
    for row in range(2):
        _, own = attention_with_maps(
            q[row : row + 1], k[row : row + 1], v[row : row + 1], columns=columns[row].tolist()
        )
        torch.testing.assert_close(maps[row : row + 1], own)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mask", ["none", "boolean", "added"])
def test_dropping_columns_is_attention_without_them(mask, dtype):
    shape = (2, 3, 5, 7, 8, 8)
    drops = torch.tensor([0, 3, -1]).expand(2, 3, 5, 3).clone()
    drops[0, 1, 2] = torch.tensor([6, 6, 1])
    own = masks(shape)[mask]
    own = own.to(dtype) if own is not None and own.is_floating_point() else own
    tensors = inputs(shape, dtype)
    for place, (found, expected) in enumerate(
        both(masked_attention, *tensors, mask=own, drop_columns=drops)
    ):
        assert_close(f"result {place}", found, expected)
    q, k, v = inputs(shape)
    rest = [1, 2, 4, 5, 6]
    torch.testing.assert_close(
        masked_attention(q, k, v, drop_columns=torch.tensor([0, 3])),
        torch.nn.functional.scaled_dot_product_attention(q, k[..., rest, :], v[..., rest, :]),
    )


def test_a_query_without_keys_gets_zeros_and_no_gradient():
    q, k, v = inputs((1, 2, 3, 4, 8, 8), torch.float32, grad=True)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    out, maps, lse = attention_with_maps(q, k, v, mask=mask, return_lse=True)
    assert not out[:, :, 1].any() and not maps[:, 1].any()
    assert (lse[:, :, 1] == -torch.inf).all()
    (out.sum() + maps.square().sum()).backward()
    assert not q.grad[:, :, 1].any()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    everything = torch.arange(4).expand(3, 4)
    assert not masked_attention(q, k, v, drop_columns=everything).any()


def test_large_scores_neither_overflow_nor_lose_their_maximum():
    q = torch.full((1, 1, 1, 4), 1e4)
    k = torch.stack([torch.full((4,), 1e4), torch.full((4,), -1e4)])[None, None]
    out, maps = attention_with_maps(q, k, torch.eye(2, 4)[None, None], reduce_heads="sum")
    assert maps.tolist() == [[[1.0, 0.0]]] and out[0, 0, 0].tolist() == [1.0, 0.0, 0.0, 0.0]


def test_nan_stays_in_its_own_row():
    q, k, v = inputs((1, 1, 3, 4, 8, 8), torch.float32)
    q[0, 0, 1] = torch.nan
    out, maps = attention_with_maps(q, k, v)
    assert out[0, 0, 1].isnan().all() and maps[0, 1].isnan().all()
    assert out[0, 0, [0, 2]].isfinite().all() and maps[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("place", range(4), ids=["B0", "H0", "Q0", "K0"])
def test_empty_sizes_give_empty_results_or_zeros(place):
    shape = [2, 3, 5, 7, 8, 8]
    shape[place] = 0
    q, k, v = inputs(shape, torch.float32, grad=True)
    out, maps, lse = attention_with_maps(q, k, v, return_lse=True, reduce_heads="sum")
    b, h, queries, keys, *_ = shape
    assert out.shape == (b, h, queries, 8) and maps.shape == (b, queries, keys)
    assert lse.shape == (b, h, queries) and not out.any()
    (out.sum() + maps.sum()).backward()
    assert not q.grad.any()


def test_views_are_read_as_they_are():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs((2, 3, 5, 7, 8, 8)))
    expected = attention_with_maps(q.contiguous(), k.contiguous(), v.contiguous())
    found = attention_with_maps(q, k[..., ::1, :], v)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_more_batch_dimensions_lead():
    q, k, v = inputs((6, 3, 5, 7, 8, 8))
    wide = [x.reshape(2, 3, *x.shape[1:]) for x in (q, k, v)]
    mask = torch.rand(3, 1, 1, 7) < 0.5
    flat_mask = mask.expand(2, 3, 1, 1, 7).reshape(6, 1, 1, 7)
    found = attention_with_maps(*wide, mask=mask, columns=[1, 2])
    expected = attention_with_maps(q, k, v, mask=flat_mask, columns=[1, 2])
    torch.testing.assert_close(found[0].flatten(0, 1), expected[0])
    torch.testing.assert_close(found[1].flatten(0, 1), expected[1])


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_gradients_come_to_whatever_requires_them(wanted):
    tensors = inputs((1, 2, 3, 4, 5, 5))
    for x, grad in zip(tensors, wanted, strict=True):
        x.requires_grad_(grad)
    _, maps = attention_with_maps(*tensors, columns=[1])
    assert maps.requires_grad == any(wanted)
    if any(wanted):
        maps.sum().backward()
    assert [x.grad is not None for x in tensors] == list(wanted)


def test_gradcheck():
    tensors = inputs((1, 2, 3, 4, 5, 5), grad=True)
    mask = torch.tensor([[True, True, False, True]])

    def results(q, k, v):
        return attention_with_maps(q, k, v, groups=[[0, 1], [3]], mask=mask, return_lse=True)

    assert torch.autograd.gradcheck(results, tensors)
    drops = torch.tensor([1])
    assert torch.autograd.gradcheck(
        lambda q, k, v: masked_attention(q, k, v, drop_columns=drops), tensors
    )


def test_the_operators_keep_torchs_contract():
    q, k, v = inputs((1, 2, 3, 4, 5, 5), torch.float32, grad=True)
    columns = torch.tensor([[0, 2]])
    weights = torch.ones(2, 1)
    torch.library.opcheck(
        torch.ops.unweave.attention_with_maps, (q, k, v, None, columns, weights, 0.5, "mean")
    )
    torch.library.opcheck(torch.ops.unweave.masked_attention, (q, k, v, None, None, 0.5))
    torch.library.opcheck(
        torch.ops.unweave.attention_maps, (q, k, None, columns, weights, 0.5, "mean")
    )


def test_compiled_graphs_hold_the_operators():
    q, k, v = inputs((1, 2, 3, 4, 5, 5), torch.float32, grad=True)

    def loss(q, k, v):
        out, maps = attention_with_maps(q, k, v, columns=[0, 2])
        return out.sum() + maps.square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    for one, other in zip(found, torch.autograd.grad(loss(q, k, v), (q, k, v)), strict=True):
        torch.testing.assert_close(one, other)


def test_a_mask_that_learns_gets_its_gradient():
    q, k, v = inputs((1, 2, 3, 4, 5, 5))
    mask = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    attention_with_maps(q, k, v, mask=mask)[1][..., 0].sum().backward()
    assert mask.grad is not None and mask.grad.abs().sum() > 0


def test_the_same_call_gives_the_same_bits():
    q, k, v = inputs((2, 4, 300, 77, 40, 40), torch.float32)
    first, second = (attention_with_maps(q, k, v, columns=[3, 5]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_blocks_of_scores_add_up(monkeypatch):
    tensors = inputs((2, 3, 17, 7, 8, 6))
    whole = [found for found, _ in both(attention_with_maps, *tensors, columns=[0, 6])]
    monkeypatch.setattr(cpu, "BLOCK", 50)
    parts = [found for found, _ in both(attention_with_maps, *tensors, columns=[0, 6])]
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)


def test_maps_alone_are_the_maps_and_so_are_their_gradients():
    q, k, v = inputs((2, 3, 5, 7, 8, 8))
    torch.testing.assert_close(
        attention_maps(q, k, groups=[[1, 2]]), attention_with_maps(q, k, v, groups=[[1, 2]])[1]
    )
    for found, expected in both(attention_maps, q, k, groups=[[1, 2]]):
        assert_close("maps alone", found, expected)


@pytest.mark.parametrize("mask", ["none", "boolean", "added", "of-keys"])
@pytest.mark.parametrize("reduce_heads", REDUCTIONS)
def test_maps_of_frozen_keys_have_the_same_gradient(reduce_heads, mask):
    shape = (2, 3, 5, 7, 8, 8)
    q, k, _ = inputs(shape)
    own = masks(shape)[mask]

    def maps_of(q):
        return attention_maps(q, k, groups=[[1, 2], [6]], reduce_heads=reduce_heads, mask=own)

    for found, expected in both(maps_of, q):
        assert_close("frozen keys", found, expected)


@pytest.mark.parametrize("reduce_heads", REDUCTIONS)
def test_rows_are_rows_of_the_whole(reduce_heads):
    q, k, v = inputs((2, 3, 5, 5, 8, 8))
    mask = torch.rand(2, 1, 5, 5) < 0.7
    whole = attention_with_maps(q, k, v, mask=mask, reduce_heads=reduce_heads)[1]
    rows = self_attention_rows(q, k, [4, 0], mask=mask, reduce_heads=reduce_heads)
    torch.testing.assert_close(rows, whole[..., [4, 0], :])
    own = torch.tensor([[1], [3]])
    torch.testing.assert_close(
        self_attention_rows(q, k, own)[:, 0],
        attention_with_maps(q, k, v)[1][torch.arange(2), own[:, 0]],
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("reduce_heads", REDUCTIONS)
def test_products_are_those_with_the_stored_matrix(reduce_heads, transpose, backend):
    q, k, v = inputs((2, 3, 5, 7, 8, 8))
    mask = torch.rand(5, 7) < 0.7
    p = attention_with_maps(q, k, v, mask=mask, reduce_heads=reduce_heads)[1]
    p = p.transpose(-1, -2) if transpose else p
    x = torch.randn(2, p.shape[-1], 4, dtype=torch.float64)
    expected = p @ (x[:, None] if reduce_heads == "none" else x)
    with use_backend(backend):
        found = attention_product(
            q, k, x, transpose=transpose, mask=mask, reduce_heads=reduce_heads
        )
    torch.testing.assert_close(found, expected)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_and_mask_agrees_with_the_definition(data):
    limits = zip("bhqkd", (3, 3, 9, 9, 9), strict=True)
    sizes = [data.draw(st.integers(1, limit), name) for name, limit in limits]
    b, h, q, k, d = sizes
    tensors = inputs((b, h, q, k, d, d), seed=data.draw(st.integers(0, 99), "seed"))
    shape = [data.draw(st.sampled_from([1, size]), "mask") for size in (b, h, q, k)]
    keep = data.draw(st.floats(0, 1), "keep")
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < keep
    columns = data.draw(st.lists(st.integers(0, k - 1), max_size=4), "columns")
    for found, expected in both(attention_with_maps, *tensors, mask=mask, columns=columns):
        assert_close("any", found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 2, 4, 6)}, "`q` and `k` must have the same features, got 8 and 6"),
        ({"v": torch.zeros(1, 2, 5, 8)}, "`k` and `v` must have the same tokens, got 4 and 5"),
        ({"k": torch.zeros(1, 3, 4, 8)}, "same batch dimensions and heads"),
        ({"q": torch.zeros(3, 8)}, r"`q` must be a floating tensor .* got \(3, 8\)"),
        ({"v": torch.zeros(1, 2, 4, 8, dtype=torch.float64)}, "one dtype and device"),
        ({"columns": [4]}, "`columns` must be from 0 to 3, got 4"),
        ({"groups": [[-1]]}, "`groups` must be from 0 to 3, got -1"),
        ({"columns": [0], "groups": [[1]]}, "`columns` or `groups`, not both"),
        ({"columns": torch.zeros(2, 1, dtype=torch.int64)}, "batch dimensions"),
        ({"columns": torch.zeros(2)}, "`columns` must be ints"),
        ({"mask": torch.zeros(3, 5)}, r"`mask` must be broadcastable to \(1, 2, 3, 4\)"),
        ({"mask": torch.zeros(3, 4, dtype=torch.int64)}, "`mask` must be boolean or floating"),
        ({"reduce_heads": "max"}, "`reduce_heads`"),
    ],
)
def test_bad_arguments_are_named(change, message):
    q, k, v = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match=message):
        attention_with_maps(**{"q": q, "k": k, "v": v, **change})


def test_dropped_columns_out_of_range_are_named():
    q = k = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="`drop_columns` must be from -1 to 2, got 3"):
        masked_attention(q, k, k, drop_columns=torch.tensor([3]))


def test_few_scores_are_kept_for_their_gradients_unless_a_form_was_chosen(monkeypatch):
    q, k, v = inputs((1, 2, 5, 7, 8, 8), grad=True)
    monkeypatch.setattr(ops, "KEPT", 2 * 5 * 7)
    calls = []
    defined = reference.attention_with_maps
    monkeypatch.setattr(
        reference, "attention_with_maps", lambda *args: calls.append(1) or defined(*args)
    )
    attention_with_maps(q, k, v, columns=[1])
    assert len(calls) == 1
    with use_backend("cpu"):
        attention_with_maps(q, k, v, columns=[1])
    with torch.no_grad():
        attention_with_maps(q, k, v, columns=[1])
    attention_with_maps(*inputs((1, 2, 6, 7, 8, 8), grad=True), columns=[1])
    attention_maps(q, k, columns=[1])
    assert len(calls) == 1
