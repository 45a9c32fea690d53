"""CUDA kernels and what launches them, run on a CPU from their own source: see `on_cpu`."""

from __future__ import annotations

import mmap
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from unweave.kernels import cuda
from unweave.kernels.attention import attention_maps, attention_with_maps, masked_attention
from unweave.kernels.attention import cpu as attention_cpu
from unweave.kernels.attention import gpu as attention_gpu
from unweave.kernels.attention import reference as attention_reference
from unweave.kernels.backends import BackendError, use_backend
from unweave.kernels.codes import gpu as codes_gpu
from unweave.kernels.codes import nearest_code, scalar_quantize
from unweave.kernels.codes import reference as codes_reference
from unweave.kernels.graph import edge_dot, weighted_spmm
from unweave.kernels.graph import gpu as graph_gpu
from unweave.kernels.graph import reference as graph_reference
from unweave.kernels.groupwise import gpu as groupwise_gpu
from unweave.kernels.groupwise import quantize_groupwise, quantized_matmul
from unweave.kernels.groupwise import reference as groupwise_reference
from unweave.kernels.sparse import (
    batch_topk,
    sparse_decode,
    sparse_encode,
    threshold_sparse,
    topk_sparse,
)
from unweave.kernels.sparse import gpu as sparse_gpu
from unweave.kernels.sparse import reference as sparse_reference

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def strided(x):
    """Return equal values in memory with gaps and another order."""
    wide = x.new_full((*x.shape[:-1][::-1], x.shape[-1] + 3), torch.nan)
    view = wide.permute(*range(x.dim() - 2, -1, -1), x.dim() - 1)[..., 1:-2]
    return view.copy_(x)


def test_half_types_are_converted_as_torch_does(on_cpu, tmp_path, monkeypatch):
    source = """
template <typename T>
__global__ void convert(const T* x, float* wide, const float* y, T* narrowed, i64 items) {
    for (i64 item = first_item(); item < items; item += item_step()) {
        wide[item] = (float)widen(x[item]);
        narrow(y[item], narrowed + item);
    }
}
"""
    path = tmp_path / "convert" / "kernels.cu"
    path.parent.mkdir()
    path.write_text(source)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, (1 << 16,), generator=generator)
    floats = bits.to(torch.int32).view(torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        x = every.view(dtype)
        # Between neighbours lie the values where rounding turns.
        middles = (x.float() + x.roll(1).float()) / 2
        for y in (x.float(), middles, middles.nextafter(torch.tensor(torch.inf)), floats):
            wide, narrowed = torch.empty(len(x)), torch.empty(len(x), dtype=dtype)
            cuda.Module(path).launch("convert", [dtype], len(x), x, wide, y, narrowed)
            assert_close(wide, x.float(), rtol=0, atol=0, equal_nan=True)
            assert_close(narrowed, y.to(dtype), rtol=0, atol=0, equal_nan=True)
            assert torch.equal(narrowed.signbit() | y.isnan(), y.signbit() | y.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "v"), [(0, 3, 2), (4, 0, 2), (1, 1, 1), (70, 3, 5), (33, 7, 16)]
)
def test_nearest_value(on_cpu, dtype, n, d, v):
    z, values = drawn(n, d, dtype=dtype), drawn(d, v, seed=1, dtype=dtype)
    for own in (z, strided(z)):
        codes, found = codes_gpu.nearest_value(own, values)
        assert found.dtype == torch.int64 and codes.dtype == dtype
        assert torch.equal(found, codes_reference.nearest_value(z.double(), values.double())[1])
        assert torch.equal(codes, values[torch.arange(d), found])


def test_nearest_value_with_ties_and_what_is_not_finite(on_cpu):
    values = torch.tensor([[1.0, 0.0, 1.0, -1.0]])
    z = torch.tensor([[0.5], [1.0], [torch.nan], [torch.inf], [-torch.inf], [-9.0]])
    _, found = codes_gpu.nearest_value(z, values)
    assert found[:, 0].tolist() == [0, 0, 0, 0, 0, 3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "m", "d"), [(0, 3, 2), (5, 1, 4), (9, 3, 0), (37, 300, 5), (6, 129, 1)]
)
@pytest.mark.parametrize("k", [1, 3])
def test_nearest_codes(on_cpu, monkeypatch, dtype, n, m, d, k):
    monkeypatch.setattr(codes_gpu, "CODES", 256)
    monkeypatch.setattr(codes_gpu, "BLOCK", 2000)
    k = min(k, m)
    x, codebook = drawn(n, d, dtype=dtype), drawn(m, d, seed=1, dtype=dtype)
    found = codes_gpu.nearest(x, codebook, k)
    assert found.shape == (n, k) and found.dtype == torch.int64
    distances = torch.cdist(x.double(), codebook.double())
    best = distances.sort(1).values[:, :k]
    assert_close(distances.gather(1, found), best, rtol=1e-5, atol=1e-5)


def test_nearest_codes_with_ties_and_rows_of_nan(on_cpu, monkeypatch):
    codebook = torch.eye(3).repeat(200, 1)
    x = torch.cat([torch.eye(3), torch.full((1, 3), torch.nan)])
    found = codes_gpu.nearest(x, codebook, 1)[:, 0]
    assert found[:3].tolist() == [0, 1, 2] and 0 <= found[3] < 600


def masks(batch, heads, queries, keys):
    additive = drawn(batch, heads, queries, keys, seed=5)
    boolean = drawn(1, 1, queries, keys, seed=6) > 0
    boolean[..., 0, :] = False
    return [
        None,
        additive,
        additive[:1, :, :1],
        boolean,
        drawn(batch, 1, 1, keys) > 0,
        boolean[..., :1],
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce_heads", ["none", "sum", "mean"])
@pytest.mark.parametrize("case", range(6))
def test_maps(on_cpu, dtype, reduce_heads, case):
    batch, heads, queries, keys, d = 2, 3, 5, 7, 6
    q, k = drawn(batch, heads, queries, d), drawn(batch, heads, keys, d, seed=1)
    q, k = q.to(dtype), k.to(dtype)
    mask = masks(batch, heads, queries, keys)[case]
    columns = torch.tensor([[0, 6, 3, 6], [1, 2, 4, 0]])
    weights = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.5, 0.0]]).to(dtype)
    wide = q.double(), k.double(), k.double()
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype.itemsize >= 4 else {"rtol": 5e-3, "atol": 5e-3}
    )
    for chosen in (None, weights):
        right = attention_reference.attention_with_maps(
            *wide, mask, columns, chosen if chosen is None else chosen.double(), 0.4, reduce_heads
        )
        lse = right[2].to(attention_cpu.accumulator(dtype))
        padded = torch.nn.functional.pad(lse, (0, 32 - queries), value=torch.nan)[..., :queries]
        for parts in ((q, k, lse), (strided(q), strided(k), padded)):
            found = attention_gpu.maps_from_lse(*parts, mask, columns, chosen, 0.4, reduce_heads)
            assert found.dtype == lse.dtype
            assert_close(found.double(), right[1], **tolerance)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (1, 1, 1, 1)])
def test_maps_of_odd_sizes(on_cpu, shape):
    batch, heads, _, d = shape
    q, k = drawn(*shape), drawn(batch, heads, 3, d)
    columns = torch.zeros(batch, 2, dtype=torch.int64)
    lse = attention_reference.log_sum_exp(attention_reference.scores(q, k, None, 1.0))
    for reduce_heads in ("none", "sum"):
        found = attention_gpu.maps_from_lse(q, k, lse, None, columns, None, 1.0, reduce_heads)
        right = attention_cpu.maps_from_lse(q, k, lse, None, columns, None, 1.0, reduce_heads)
        assert_close(found, right)


def fused(q, k, v, added, compute_lse, dropout, causal, *, scale):
    """Return what torch's memory-efficient attention on a GPU is said to return."""
    assert compute_lse and not dropout and not causal and q.dtype != torch.float64
    for x in (q, k, v):
        starts = (x.data_ptr(), *(stride * x.itemsize for stride in x.stride()[:-1]))
        assert x.stride(-1) == 1 and not any(start % 16 for start in starts)
    if added is not None:
        assert added.shape == (*q.shape[:3], k.shape[2])
        assert added.stride(-1) == 1 and not any(stride % 16 for stride in added.stride()[:-1])
    out, lse = attention_cpu.blocked_attention(q, k, v, added, scale)
    missing = -lse.shape[2] % 32
    nowhere = lse == -torch.inf
    out = out.masked_fill(nowhere[..., None], torch.nan).transpose(1, 2).contiguous()
    lse = torch.nn.functional.pad(lse, (0, missing), value=torch.inf)
    return out.transpose(1, 2), lse, torch.zeros(()), torch.zeros(())


@pytest.fixture
def with_fused(monkeypatch):
    attention_gpu.fused_agrees.cache_clear()
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments)
        return fused(*arguments, **options)

    monkeypatch.setattr(
        torch.ops.aten, "_scaled_dot_product_efficient_attention", counted, raising=False
    )
    yield calls
    attention_gpu.fused_agrees.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", range(6))
@pytest.mark.parametrize("wide", [6, 8, 9])
def test_attention_around_the_fused_form(with_fused, dtype, case, wide):
    batch, heads, queries, keys = 2, 3, 5, 7
    mask = masks(batch, heads, queries, keys)[case]
    q, k = drawn(batch, heads, queries, 8), drawn(batch, heads, keys, 8, seed=1)
    v = drawn(batch, heads, keys, wide, seed=2)
    q, k, v = (strided(x.to(dtype)) for x in (q, k, v))
    out, lse = attention_gpu.attention(q, k, v, mask, 0.3)
    assert bool(with_fused) == (dtype != torch.float64)
    logits = attention_reference.scores(q.double(), k.double(), mask, 0.3)
    tolerance = 2e-2 if dtype.itemsize < 4 else 1e-5
    right = attention_reference.probabilities(logits) @ v.double()
    assert out.dtype == dtype and lse.dtype == attention_cpu.accumulator(dtype)
    assert_close(out.double(), right, rtol=tolerance, atol=tolerance)
    right = attention_reference.log_sum_exp(logits)
    assert_close(lse.double(), right, rtol=tolerance, atol=tolerance)


def test_dropped_columns(with_fused):
    q, k = drawn(2, 3, 5, 8), drawn(2, 3, 7, 8, seed=1)
    drops = torch.tensor([[0, 1], [-1, -1], [6, 6], [2, -1], [5, 0]])[None, None]
    for mask in masks(2, 3, 5, 7):
        out, _ = attention_gpu.masked_attention(q, k, k, mask, drops, 0.3)
        assert_close(out, attention_reference.masked_attention(q, k, k, mask, drops, 0.3))


@pytest.mark.parametrize("wrong", ["base", "layout", "error"])
def test_a_fused_form_that_changed_is_not_used(with_fused, monkeypatch, wrong):
    def changed(*arguments, **options):
        if wrong == "error":
            raise RuntimeError("no kernel found")
        out, lse, *rest = fused(*arguments, **options)
        return out, lse / 0.6931 if wrong == "base" else lse.transpose(0, 1), *rest

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", changed)
    q = drawn(1, 2, 5, 8)
    out, lse = attention_gpu.attention(q, q, q, None, 0.3)
    right = attention_cpu.blocked_attention(q, q, q, None, 0.3)
    assert torch.equal(out, right[0]) and torch.equal(lse, right[1])


def test_the_fused_operator_still_takes_these_arguments():
    q = torch.empty(2, 3, 33, 40, device="meta")
    out, lse = attention_gpu.fused_attention(q, q, q, None, 0.1)
    assert out.shape == q.shape and lse.shape == (2, 3, 33) and lse.dtype == torch.float32


def unreserved(count, dtype):
    """Return a tensor that takes memory only where it is written."""
    if sys.platform != "linux":
        pytest.skip("memory that is not reserved is Linux's")
    not_reserved = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | not_reserved
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype)


def last_blocks(items):
    blocks = -(-items // cuda.THREADS)
    return blocks - 2, blocks, blocks


def test_more_than_two_to_the_31_values(on_cpu):
    items = 3 << 30
    z, codes = (unreserved(items, torch.float16) for _ in range(2))
    found = unreserved(items, torch.int64)
    z[-300:] = drawn(300)
    values = torch.tensor([[-1.0, 0.0, 1.0], [-1.0, 0.5, 2.0]], dtype=torch.float16)
    library = on_cpu(codes_gpu.MODULE)
    arguments = z, values, found, codes, 3, 2, items
    library.run("nearest_value<Half>", arguments, last_blocks(items), cuda.THREADS)
    right = codes_reference.nearest_value(z[-300:].view(-1, 3).float(), values.T.float())
    assert torch.equal(found[-300:], right[1].flatten())


def test_more_than_two_to_the_31_scores(on_cpu):
    codes, rows = 3, 1 << 30
    products = unreserved(codes * rows, torch.float32)
    least, found = unreserved(rows, torch.float32), unreserved(rows, torch.int64)
    tail = products.view(codes, rows)[:, -300:]
    tail.copy_(drawn(codes, 300))
    arguments = products, torch.zeros(codes), least, found, codes, rows, 128, 5, rows
    library = on_cpu(codes_gpu.MODULE)
    library.run("least_of_runs<float>", arguments, last_blocks(rows), cuda.THREADS)
    assert torch.equal(found[-300:], tail.argmax(0) + 5)
    assert torch.equal(least[-300:], -tail.amax(0))


def test_more_than_two_to_the_31_places_of_maps(on_cpu):
    queries, count, d = 1 << 27, 24, 4
    q, k = drawn(1, 1, 1, d).expand(1, 1, queries, d), drawn(1, 1, count, d, seed=1)
    lse = torch.zeros(1, 1, 1).expand(1, 1, queries)
    maps = unreserved(queries * count, torch.float32)
    strides = *q.stride()[:3], *k.stride()[:3], *lse.stride(), 0, 0, 0, 0
    sizes = 1, 1, queries, count, d
    arguments = q, k, lse, None, torch.arange(count), maps, 0.5, *sizes, *strides, len(maps)
    library = on_cpu(attention_gpu.MODULE)
    library.run("column_maps<float>", arguments, last_blocks(len(maps)), cuda.THREADS)
    right = (q[0, 0, 0] @ k[0, 0].T * 0.5).exp()
    assert_close(maps[-count:], right)
    assert not maps[: 1 << 20].any()


def test_guards_see_a_write_outside_and_a_wrong_argument(on_cpu, tmp_path):
    source = "template <typename A>\n__global__ void f(A* x, i64 items) { x[items] = 0; }"
    path = tmp_path / "outside" / "kernels.cu"
    path.parent.mkdir()
    path.write_text(source)
    module = cuda.Module(path)
    with pytest.raises(AssertionError, match="wrote outside"):
        module.launch("f", [torch.float64], 2, torch.zeros(2, dtype=torch.float64))
    with pytest.raises(AssertionError, match="is given for float"):
        module.launch("f", [torch.float32], 2, torch.zeros(2, dtype=torch.float64))


def test_a_launch_is_on_torchs_stream_with_addresses_for_tensors(monkeypatch):
    events = []

    class Context:
        def __init__(self, *what):
            self.what = what

        def __enter__(self):
            events.append(self.what)

        def __exit__(self, *_):
            events.append(("left", self.what[0]))

    def raw_module(code, options, name_expressions):
        assert code == codes_gpu.MODULE.source and options == cuda.OPTIONS
        events.append(("compiled", *name_expressions))
        return SimpleNamespace(get_function=lambda name: lambda *launch: events.append(launch))

    stream = SimpleNamespace(
        from_external=lambda stream: Context("stream", *stream.__cuda_stream__())
    )
    device = SimpleNamespace(Device=lambda index: Context("device", index), Stream=stream)
    fake = SimpleNamespace(cuda=device, RawModule=raw_module)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=77))
    cuda._compiled.cache_clear()
    x = torch.zeros(600)
    for _ in range(2):
        arguments = x, None, 2.5, 7, 600
        codes_gpu.MODULE.run("f<float>", 600, arguments, torch.device("cuda", 3))
    cuda._compiled.cache_clear()
    launch = (3,), (256,), (x.data_ptr(), 0, 2.5, 7, 600)
    inside = [("device", 3), ("stream", 0, 77)]
    left = [("left", "stream"), ("left", "device")]
    assert events == [*inside, ("compiled", "f<float>"), launch, *left, *inside, launch, *left]


def test_without_cupy_an_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BackendError, match=r'pip install "unweave-kernels\[cuda\]"'):
        codes_gpu.MODULE.launch("nearest_value", [torch.float32], 1, torch.zeros(1))


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(BackendError, match="one device"):
        codes_gpu.MODULE.launch("f", [], 1, torch.zeros(1), torch.zeros(1, device="meta"))


def graph(rows, columns, edges, seed=0):
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(max(1, rows), (edges,), generator=generator).sort().values
    crow = torch.searchsorted(row, torch.arange(rows + 1))
    return crow, torch.randint(max(1, columns), (edges,), generator=generator), row


GRAPHS = [(0, 3, 0, 4), (4, 5, 0, 3), (6, 5, 30, 0), (1, 1, 3, 1), (40, 30, 200, 7), (9, 3, 50, 33)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("indices", [torch.int32, torch.int64])
@pytest.mark.parametrize(("rows", "columns", "edges", "d"), GRAPHS)
def test_products_of_a_graph(on_cpu, dtype, indices, rows, columns, edges, d):
    crow, col, row = graph(rows, columns, edges)
    weight = drawn(edges, dtype=dtype)
    u, v = drawn(rows, d, seed=1, dtype=dtype), drawn(columns, d, seed=2, dtype=dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    own = crow, col.to(indices), weight
    for table in (v, strided(v)):
        found = graph_gpu.weighted_spmm(*own, table)
        right = graph_reference.weighted_spmm(crow, col, weight.double(), v.double())
        assert found.dtype == dtype
        assert_close(found.double(), right, rtol=tolerance, atol=tolerance)
        found = graph_gpu.edge_dot(u, table, row.to(indices), col)
        right = graph_reference.edge_dot(u.double(), v.double(), row, col)
        assert_close(found.double(), right, rtol=tolerance, atol=tolerance)
    sorted_by_torch = graph_gpu.sorted_edges(col.to(indices), row, columns)
    for found, right in zip(
        sorted_by_torch, graph_reference.sorted_edges(col, row, columns), strict=True
    ):
        assert torch.equal(found, right)


def test_half_types_are_added_up_in_float32(on_cpu):
    edges = 4096
    crow, col = torch.tensor([0, edges]), torch.zeros(edges, dtype=torch.int64)
    weight, dense = torch.ones(edges, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16)
    assert graph_gpu.weighted_spmm(crow, col, weight, dense).item() == edges


def test_edges_that_lead_nowhere_are_refused_before_a_kernel_reads_them(on_cpu):
    crow, one = torch.tensor([0, 1]), torch.ones(1)
    for wrong in (-1, 3):
        col = torch.tensor([wrong])
        with pytest.raises(ValueError, match="`col` must be in"):
            graph_gpu.weighted_spmm(crow, col, one, torch.ones(3, 2))
        with pytest.raises(ValueError, match="`col` must be in"):
            graph_gpu.edge_dot(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), col)
    with pytest.raises(ValueError, match="`crow` must rise"):
        graph_gpu.weighted_spmm(torch.tensor([0, 9]), torch.tensor([0]), one, torch.ones(3, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_codes(on_cpu, dtype):
    crow, indices, row = graph(11, 30, 60)
    values, dictionary = drawn(60, dtype=dtype), drawn(30, 5, seed=1, dtype=dtype)
    x = drawn(11, 5, seed=2, dtype=dtype)
    found = sparse_gpu.decode(values, indices, crow, dictionary)
    assert_close(found, sparse_reference.decode(values, indices, crow, dictionary))
    found = sparse_gpu.encode(x, dictionary, indices, crow)
    assert_close(found, sparse_reference.encode(x, dictionary, indices, crow))
    found = sparse_gpu.scatter(values, indices, crow, x, 30)
    right = torch.zeros(30, 5, dtype=dtype).index_add(0, indices, values[:, None] * x[row])
    assert_close(found, right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_are_those_of_the_definition(monkeypatch, dtype):
    monkeypatch.setattr(sparse_gpu, "BLOCK", 100)
    generator = torch.Generator().manual_seed(0)
    for shape in ((0, 4), (3, 0), (1, 1), (7, 40)):
        tied = torch.randint(-3, 4, shape, generator=generator).to(dtype)
        holes = tied.clone()
        holes[torch.rand(shape, generator=generator) < 0.1] = torch.nan
        for x in (tied, holes, tied.new_zeros(shape), holes.where(tied != 1, torch.inf)):
            for k in {0, min(1, shape[1]), shape[1] // 2, shape[1]}:
                assert torch.equal(sparse_gpu.topk(x, k), sparse_reference.topk(x, k))
                found = sparse_gpu.batch_topk(x, k * shape[0])
                for part, right in zip(
                    found, sparse_reference.batch_topk(x, k * shape[0]), strict=True
                ):
                    assert torch.equal(part, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1), (5, 7), (4, 64), (3, 33)])
def test_weights_from_codes(on_cpu, monkeypatch, dtype, bits, symmetric, shape):
    monkeypatch.setattr(groupwise_gpu, "BLOCK", 70)
    rows, width = shape
    weight = drawn(*shape, dtype=dtype)
    if width:
        codes, scales, zeros = groupwise_reference.quantize(weight, bits, 4, symmetric)
    else:
        codes, scales = weight.to(torch.int8), weight
        zeros = None if symmetric else weight
    packed = groupwise_reference.pack(codes) if bits == 4 else codes
    own = packed, scales, zeros, bits, 4
    right = groupwise_reference.dequantize(*own, width)
    assert torch.equal(groupwise_gpu.dequantize(*own, width), right)
    x, grad = drawn(2, width, seed=1, dtype=dtype), drawn(2, rows, seed=2, dtype=dtype)
    assert_close(groupwise_gpu.product(x, *own), x @ right.T)
    assert_close(groupwise_gpu.product_back(grad, *own, width), grad @ right)


def test_more_than_two_to_the_31_elements_of_a_table(on_cpu):
    columns, d = 1 << 26, 40
    dense = unreserved(columns * d, torch.float16).view(columns, d)
    dense[-1], dense[-2] = drawn(d), drawn(d, seed=1)
    col = torch.tensor([columns - 1, columns - 2])
    weight = torch.tensor([2.0, 1.0], dtype=torch.float16)
    library, out = on_cpu(graph_gpu.MODULE), torch.empty(1, d, dtype=torch.float16)
    arguments = torch.tensor([0, 2], dtype=torch.int32), col, weight, dense, out, d, d
    library.run("weighted_spmm<Half, int, long long>", arguments, (0, 1, 1), cuda.THREADS)
    assert_close(out[0], (2 * dense[-1].float() + dense[-2].float()).half())
    dots = torch.empty(1, dtype=torch.float16)
    arguments = dense, dense, col[:1], col[1:].int(), dots, d, 1
    library.run("edge_dot<Half, long long, int>", arguments, (0, 1, 1), cuda.THREADS)
    assert_close(dots[0], (dense[-1].float() @ dense[-2].float()).half())


def test_more_than_two_to_the_31_weights(on_cpu):
    rows, width = 1 << 25, 65
    codes = unreserved(rows * 33, torch.uint8).view(rows, 33)
    scales = torch.ones(rows, 1)
    out = unreserved(rows * width, torch.float32)
    codes[-4:] = 0x2F
    arguments = codes, scales, None, out, width, width, 1, rows * width
    library = on_cpu(groupwise_gpu.MODULE)
    library.run("dequantize_4<float>", arguments, last_blocks(len(out)), cuda.THREADS)
    assert out[-3:].tolist() == [7.0, -6.0, 7.0]


WEIGHT = quantize_groupwise(drawn(5, 4), bits=4, group_size=2, symmetric=False)

CROW, COL = torch.tensor([0, 2, 2, 5]), torch.tensor([1, 0, 3, 3, 2])
PUBLIC = {
    "nearest_code": lambda x, y: nearest_code(x[0], y[0], k=2)[1],
    "scalar_quantize": lambda x, y: scalar_quantize(x[0].detach(), y[0, :, :3]).codes + x[0],
    "masked_attention": lambda x, y: masked_attention(
        x, y, y, drop_columns=CROW[None, :3, None] % 4
    ),
    "attention_with_maps": lambda x, y: attention_with_maps(x, y, y, columns=[3, 1])[1],
    "attention_maps": lambda x, y: attention_maps(x, y, columns=[0], mask=x[:, :, :1].detach() > 9),
    "weighted_spmm": lambda x, y: weighted_spmm(CROW, COL, x.flatten()[:5], y[0]),
    "edge_dot": lambda x, y: edge_dot(x[0], y[0], torch.tensor([2, 0, 2]), CROW[:3]),
    "topk_sparse": lambda x, y: topk_sparse(x, 2).values + y[0, :3, :2],
    "batch_topk": lambda x, y: batch_topk(x[0], 2).values * y[0, 0, 0],
    "threshold_sparse": lambda x, y: threshold_sparse(x[0], 0.1).values * y[0, 0, 0],
    "sparse_decode": lambda x, y: sparse_decode(x[0, :, :2], COL[:3, None].expand(3, 2), y[0]),
    "sparse_encode": lambda x, y: sparse_encode(x[0], y[0], CROW[:3, None] % 4),
    "quantized_matmul": lambda x, y: quantized_matmul(x[0], WEIGHT) + y[0, :1, :1],
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_and_their_gradients(gpu_forms, name):
    call = PUBLIC[name]
    x, y = drawn(1, 3, 4, dtype=torch.float64), drawn(1, 4, 4, seed=1, dtype=torch.float64)
    if "attention" in name:
        x, y = x[None], y[None]
    x.requires_grad_(), y.requires_grad_()
    with use_backend("reference"):
        right = call(x, y)
    assert_close(call(x, y), right)
    assert torch.autograd.gradcheck(call, (x, y))
