"""Groupwise quantized weights against their definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave.kernels import use_backend
from unweave.kernels.groupwise import (
    GroupQuantized,
    cpu,
    dequantize_groupwise,
    quantize_groupwise,
    quantized_matmul,
)

KINDS = [(8, True), (8, False), (4, True), (4, False)]
kinds = pytest.mark.parametrize(("bits", "symmetric"), KINDS)


def drawn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def quantized(weight, bits, symmetric, group_size=6):
    return quantize_groupwise(weight, bits=bits, group_size=group_size, symmetric=symmetric)


def per_element(per_group, group_size, width):
    return per_group.repeat_interleave(group_size, -1)[..., :width].double()


def require_near(weight, found):
    """Each element is within half a scale, beside rounding."""
    result = dequantize_groupwise(found).double()
    size, width = found.group_size, weight.shape[-1]
    groups = torch.nn.functional.pad(weight.double().abs(), (0, -width % size))
    largest = groups.unflatten(-1, (-1, size)).amax(-1)
    limits = torch.finfo(found.scales.dtype)
    slack = 4 * limits.eps * per_element(largest, size, width) + limits.tiny
    error = (weight.double() - result).abs()
    assert (error <= per_element(found.scales, size, width) / 2 + slack).all()


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=2),
    width=st.integers(1, 40),
    kind=st.sampled_from(KINDS),
    group_size=st.sampled_from([2, 6, 32, 64]),
    magnitude=st.sampled_from([1e-44, 1e-38, 1e-5, 1.0, 1e37]),
    shift=st.sampled_from([0.0, 1.0, -300.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
def test_no_element_is_off_by_more_than_half_a_scale(
    shape, width, kind, group_size, magnitude, shift, dtype
):
    if dtype == torch.float16:
        magnitude = min(magnitude, 1e3)
    weight = (drawn(*shape, width, dtype=torch.float64) + shift).mul(magnitude / 300).to(dtype)
    found = quantized(weight, *kind, group_size)
    assert found.shape == weight.shape
    assert found.scales.shape == (*shape, -(-width // group_size))
    assert found.codes.shape == (*shape, width if kind[0] == 8 else -(-width // 2))
    assert found.scales.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (found.zeros is None) == kind[1]
    require_near(weight, found)


@kinds
@pytest.mark.parametrize("width", [1, 6, 13, 24])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_weights_come_back_just_as_defined(bits, symmetric, width, dtype):
    found = quantized(drawn(5, 2, width) * 3 + 1, bits, symmetric)
    with use_backend("reference"):
        expected = dequantize_groupwise(found, dtype)
    result = dequantize_groupwise(found, dtype)
    assert torch.equal(result, expected)
    assert result.is_contiguous()
    assert result.dtype == (dtype or torch.float32)


def test_ties_go_to_the_even_code():
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert quantize_groupwise(weight).codes.tolist() == [[127, 0, 2, 2, 0, -2]]


@kinds
def test_zeros_are_exact(bits, symmetric):
    found = quantized(torch.zeros(3, 13), bits, symmetric)
    assert torch.equal(dequantize_groupwise(found), torch.zeros(3, 13))
    assert torch.equal(quantized_matmul(torch.ones(2, 13), found), torch.zeros(2, 3))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("constant", [0.1, -3e-39, 1e38, 7.0])
def test_constants_are_exact_if_asymmetric(bits, constant):
    weight = torch.full((2, 9), constant)
    assert torch.equal(dequantize_groupwise(quantized(weight, bits, False)), weight)


@kinds
def test_quantizing_again_changes_nothing(bits, symmetric):
    once = dequantize_groupwise(quantized(drawn(8, 30), bits, symmetric))
    again = dequantize_groupwise(quantized(once, bits, symmetric))
    torch.testing.assert_close(again, once, rtol=0, atol=1e-6)


def test_the_low_half_of_a_byte_comes_first():
    found = quantize_groupwise(torch.tensor([[-7.0, 7.0, 3.0]]), bits=4)
    assert found.codes.tolist() == [[1 | 15 << 4, 11]]


def test_an_outlier_only_spoils_its_group():
    weight = drawn(4, 64)
    weight[0, 0] = 1e4
    found = quantize_groupwise(weight, bits=8, group_size=16)
    error = (dequantize_groupwise(found) - weight).abs()
    assert error[0, :16].max() > 0.5
    assert error[0, 16:].max() < 0.02


@kinds
def test_blocks_do_not_show(bits, symmetric, monkeypatch):
    weight, x = drawn(50, 13), drawn(20, 13)
    whole = quantized(weight, bits, symmetric)
    product = quantized_matmul(x, whole)
    monkeypatch.setattr(cpu, "BLOCK", 100)
    parts = quantized(weight, bits, symmetric)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.scales, whole.scales)
    assert symmetric or torch.equal(parts.zeros, whole.zeros)
    torch.testing.assert_close(quantized_matmul(x, whole), product)


@settings(max_examples=25, deadline=None)
@given(
    lead=st.lists(st.integers(0, 5), min_size=0, max_size=2),
    out=st.integers(0, 7),
    width=st.integers(1, 300),
    kind=st.sampled_from(KINDS),
    group_size=st.sampled_from([2, 6, 64]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_products_are_those_with_the_weights(lead, out, width, kind, group_size, dtype):
    found = quantized(drawn(out, width) + 0.3, *kind, group_size)
    x = drawn(*lead, width, seed=1, dtype=dtype)
    result = quantized_matmul(x, found)
    exact = x.double() @ dequantize_groupwise(found, torch.float64).T
    scale = x.double().abs() @ dequantize_groupwise(found, torch.float64).abs().T
    assert result.shape == (*lead, out)
    assert result.dtype == dtype
    limit = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 5e-3}[dtype]
    assert ((result.double() - exact).abs() <= limit * scale).all()
    with use_backend("reference"):
        torch.testing.assert_close(quantized_matmul(x, found), result)


@pytest.mark.parametrize("rows", [1, cpu.FEW, cpu.FEW + 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_spreads_to_its_row_only(rows, value):
    found = quantize_groupwise(drawn(5, 70) + 4, symmetric=False)
    x = drawn(rows, 70)
    x[0, 3] = value
    result = quantized_matmul(x, found)
    assert not result[0].isfinite().any()
    assert result[1:].isfinite().all()


@kinds
def test_slices_and_transposes_are_read_in_their_order(bits, symmetric):
    weight, x = drawn(26, 20).T, drawn(26, 6).T[::2]
    found = quantized(weight, bits, symmetric)
    copied = quantized(weight.contiguous(), bits, symmetric)
    assert torch.equal(found.codes, copied.codes)
    sliced = GroupQuantized(
        found.codes[::2],
        found.scales[::2],
        None if symmetric else found.zeros[::2],
        (10, 26),
        bits,
        6,
    )
    torch.testing.assert_close(quantized_matmul(x, sliced), quantized_matmul(x, found)[:, ::2])
    assert torch.equal(dequantize_groupwise(sliced), dequantize_groupwise(found)[::2])


@kinds
@pytest.mark.parametrize("few", [1, 2])
def test_gradcheck(bits, symmetric, few, monkeypatch):
    monkeypatch.setattr(cpu, "FEW", few)
    found = quantized(drawn(3, 9, dtype=torch.float64), bits, symmetric)
    x = drawn(2, 9, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: quantized_matmul(x, found), x)
    assert torch.autograd.gradgradcheck(lambda x: quantized_matmul(x, found).square(), x)


def test_only_x_has_a_gradient():
    weight = drawn(5, 13).requires_grad_()
    found = quantize_groupwise(weight, symmetric=False)
    for tensor in (found.scales, found.zeros, dequantize_groupwise(found)):
        assert not tensor.requires_grad
    assert not quantized_matmul(drawn(2, 13), found).requires_grad
    trained = found._replace(scales=found.scales.requires_grad_())
    assert not quantized_matmul(drawn(2, 13), trained).requires_grad


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@kinds
@pytest.mark.parametrize("rows", [1, 5])
def test_threads_and_runs_do_not_show(threads, bits, symmetric, rows):
    weight, x = drawn(300, 500), drawn(rows, 500)
    results = []
    for count in (1, 3, 3):
        threads(count)
        found = quantized(weight, bits, symmetric, 64)
        results.append((found.codes, dequantize_groupwise(found), quantized_matmul(x, found)))
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


@kinds
def test_the_operators_keep_torchs_contract(bits, symmetric):
    ops, weight = torch.ops.unweave, drawn(3, 5, 13)
    torch.library.opcheck(ops.quantize_groupwise, (weight, bits, 6, symmetric))
    found = quantized(weight[0], bits, symmetric)
    fields = (found.codes, found.scales, found.zeros, bits, 6)
    torch.library.opcheck(ops.dequantize_groupwise, (*fields, 13))
    for rows in (2, cpu.FEW + 1):
        x = drawn(rows, 13).requires_grad_()
        torch.library.opcheck(ops.quantized_matmul, (x, *fields))
        grad = drawn(rows, 5).requires_grad_()
        torch.library.opcheck(ops.quantized_matmul_backward, (grad, *fields, 13))


@kinds
def test_compiled_code_does_the_same(bits, symmetric):
    def product(x, weight):
        found = quantized(weight, bits, symmetric)
        return quantized_matmul(x, found).square().sum() + dequantize_groupwise(found).sum()

    x, weight = drawn(2, 13).requires_grad_(), drawn(5, 13)
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), product(x, weight))
    gradients = [torch.autograd.grad(f(x, weight), x)[0] for f in (compiled, product)]
    torch.testing.assert_close(*gradients)


@kinds
def test_a_file_of_tensors_keeps_everything(bits, symmetric, tmp_path):
    files = pytest.importorskip("safetensors.torch")
    found = quantized(drawn(5, 13), bits, symmetric)
    tensors = {name: t for name, t in found._asdict().items() if isinstance(t, torch.Tensor)}
    assert found.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    files.save_file(tensors, tmp_path / "weight.safetensors")
    settings = {"shape": found.shape, "bits": bits, "group_size": found.group_size}
    loaded = files.load_file(tmp_path / "weight.safetensors")
    back = GroupQuantized(**{"zeros": None, **loaded, **settings})
    assert torch.equal(dequantize_groupwise(back), dequantize_groupwise(found))


def test_scales_kept_in_float16_still_work():
    found = quantize_groupwise(drawn(5, 13))
    half = found._replace(scales=found.scales.half())
    expected = dequantize_groupwise(half, torch.float32)
    assert dequantize_groupwise(half).dtype == torch.float16
    x = drawn(2, 13)
    torch.testing.assert_close(quantized_matmul(x, half), x @ expected.T)


def test_without_numba_the_definition_runs(monkeypatch):
    found, x = quantize_groupwise(drawn(5, 13)), drawn(2, 13)
    expected = quantized_matmul(x, found)
    monkeypatch.setattr("unweave.kernels.backends._installed", lambda library: False)
    torch.testing.assert_close(quantized_matmul(x, found), expected)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (2, 0, 3)])
@kinds
def test_nothing_is_quantized_to_nothing(bits, symmetric, shape):
    found = quantized(torch.zeros(shape), bits, symmetric)
    assert dequantize_groupwise(found).shape == shape
    if len(shape) == 2:
        product = quantized_matmul(torch.ones(2, shape[1]), found)
        assert torch.equal(product, torch.zeros(2, shape[0]))


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.ones(2, 3).long(), {}, "`weight` must be floating"),
        (torch.tensor(1.0), {}, r"`weight` must be floating \(\.\.\., in\)"),
        (torch.ones(2, 3), {"bits": 3}, "`bits` must be 8 or 4, got 3"),
        (torch.ones(2, 3), {"group_size": 0}, "`group_size` must be positive"),
        (torch.ones(2, 3), {"group_size": 3, "bits": 4}, "even for 4 bits, got 3"),
    ],
)
def test_bad_weights_are_named(weight, options, message):
    with pytest.raises(ValueError, match=message):
        quantize_groupwise(weight, **options)


def test_the_place_of_what_is_not_finite_is_named():
    weight = torch.ones(2, 3, 4, dtype=torch.float16)
    weight[1, 2, 3] = -torch.inf
    with pytest.raises(ValueError, match=r"`weight` must be finite, got -inf at \(1, 2, 3\)"):
        quantize_groupwise(weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(5, 12, dtype=torch.int8)}, r"`quantized.codes` must be torch.int8"),
        ({"codes": torch.zeros(5, 13, dtype=torch.uint8)}, "got torch.uint8"),
        ({"scales": torch.zeros(5, 2)}, r"`quantized.scales` must be floating \(5, 1\)"),
        ({"zeros": torch.zeros(5)}, "`quantized.zeros` must be floating"),
        ({"bits": 4}, "`quantized.codes` must be torch.uint8"),
        ({"bits": 5}, "`bits` must be"),
        ({"shape": (13,)}, r"`quantized.codes` must be torch.int8 \(13,\)"),
    ],
)
def test_fields_that_do_not_fit_are_named(change, message):
    found = quantize_groupwise(torch.ones(5, 13))._replace(**change)
    for use in (dequantize_groupwise, lambda found: quantized_matmul(torch.ones(2, 13), found)):
        with pytest.raises(ValueError, match=message):
            use(found)


@pytest.mark.parametrize(
    ("x", "shape", "message"),
    [
        (torch.ones(2, 12), (5, 13), r"`x` must be floating \(\.\.\., 13\)"),
        (torch.ones(2, 13).long(), (5, 13), "`x` must be floating"),
        (torch.tensor(1.0), (5, 13), "`x` must be floating"),
        (torch.ones(2, 13), (2, 5, 13), r"must be of a weight \(out, in\), got \(2, 5, 13\)"),
        (torch.ones(2, 13, device="meta"), (5, 13), "on one device, got meta and cpu"),
    ],
)
def test_bad_factors_are_named(x, shape, message):
    with pytest.raises(ValueError, match=message):
        quantized_matmul(x, quantize_groupwise(torch.ones(shape)))
    with pytest.raises(ValueError, match="`dtype` must be floating"):
        dequantize_groupwise(quantize_groupwise(torch.ones(shape)), torch.int8)
