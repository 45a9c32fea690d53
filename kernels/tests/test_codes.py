"""Nearest codes and quantization against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave.kernels import (
    nearest_code,
    scalar_quantize,
    update_codebook,
    use_backend,
    vector_quantize,
)
from unweave.kernels.codes import cpu

SIZES = [(1, 1, 1), (63, 100, 7), (500, 300, 64), (5, 257, 3)]


def drawn(n, m, d, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randn(m, d, generator=generator, dtype=torch.float64).to(dtype)


def least_distances(x, codebook, k=1):
    return torch.cdist(x.double(), codebook.double()).sort(1).values[:, :k]


@pytest.mark.parametrize("k", [None, 1, 3])
@pytest.mark.parametrize(("n", "m", "d"), SIZES)
def test_no_code_is_nearer(n, m, d, k):
    x, codebook = drawn(n, m, d)
    k = None if k is None else min(k, m)
    indices, distances = nearest_code(x, codebook, k=k)
    assert indices.shape == distances.shape == ((n,) if k is None else (n, k))
    best = least_distances(x, codebook, k or 1).reshape(distances.shape)
    torch.testing.assert_close(distances.double(), best, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "m", "d"), SIZES)
def test_indices_are_those_of_the_definition_in_float64(n, m, d):
    x, codebook = drawn(n, m, d, dtype=torch.float64)
    found = nearest_code(x, codebook, k=min(3, m))[0]
    with use_backend("reference"):
        assert torch.equal(found, nearest_code(x, codebook, k=min(3, m))[0])


def test_codes_far_from_the_origin_are_told_apart():
    x, codebook = drawn(200, 50, 8)
    near, _ = nearest_code(x, codebook)
    far, distances = nearest_code(x + 3e3, codebook + 3e3)
    torch.testing.assert_close(
        distances, torch.linalg.vector_norm(x - codebook[far], dim=1), rtol=0, atol=5e-3
    )
    assert (near == far).float().mean() > 0.98


def test_cosine_finds_the_nearest_direction():
    x, codebook = drawn(40, 30, 6)
    indices, distances = nearest_code(x, codebook, metric="cosine")
    similarity = torch.nn.functional.cosine_similarity(x[:, None], codebook[None], dim=-1)
    torch.testing.assert_close(1 - distances, similarity.amax(1))
    assert torch.equal(indices, similarity.argmax(1))


def test_blocks_and_runs_do_not_show(monkeypatch):
    x, codebook = drawn(101, 700, 5, dtype=torch.float64)
    whole = nearest_code(x, codebook)[0]
    monkeypatch.setattr(cpu, "ROWS", 32)
    monkeypatch.setattr(cpu, "CODES", 128)
    assert torch.equal(nearest_code(x, codebook)[0], whole)
    assert torch.equal(nearest_code(x, codebook, k=2)[0][:, 0], whole)


def test_distances_have_the_gradients_of_the_definition():
    x, codebook = drawn(6, 4, 3, dtype=torch.float64)
    for tensor in (x, codebook):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: nearest_code(a, b, k=2)[1], (x, codebook))
    assert torch.autograd.gradcheck(
        lambda a, b: nearest_code(a, b, metric="cosine")[1], (x, codebook)
    )


def test_duplicate_codes_and_rows_of_nan():
    codebook = torch.eye(3).repeat(2, 1)
    indices, distances = nearest_code(torch.eye(3), codebook)
    assert (indices % 3).tolist() == [0, 1, 2] and not distances.any()
    x = torch.full((2, 3), torch.nan)
    x[1] = 0.0
    indices, distances = nearest_code(x, codebook)
    assert 0 <= indices[0] < 6 and distances[0].isnan() and distances[1] == 1


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (2, 3, 4), (4,)])
def test_leading_dimensions_stay(shape):
    x = torch.zeros(shape)
    codebook = torch.eye(4)
    indices, distances = nearest_code(x, codebook)
    assert indices.shape == distances.shape == shape[:-1]
    assert nearest_code(x, codebook, k=2)[0].shape == (*shape[:-1], 2)
    quantized = vector_quantize(x, codebook)
    assert quantized.values.shape == shape and quantized.indices.shape == shape[:-1]
    assert scalar_quantize(x, codebook).values.shape == shape


def test_vector_quantization_passes_gradients_straight_through():
    x, codebook = drawn(6, 4, 3, dtype=torch.float64)
    x.requires_grad_(), codebook.requires_grad_()
    quantized = vector_quantize(x, codebook)
    assert torch.equal(quantized.values, codebook[quantized.indices])
    weight = torch.randn(6, 3, dtype=torch.float64)
    (quantized.values * weight).sum().backward()
    assert torch.equal(x.grad, weight) and codebook.grad is None
    quantized.codes.sum().backward()
    counts = torch.bincount(quantized.indices, minlength=4)
    assert torch.equal(codebook.grad, counts[:, None].expand(4, 3).double())


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(0, 20),
    d=st.integers(1, 5),
    v=st.integers(1, 12),
    seed=st.integers(0, 999),
    duplicated=st.booleans(),
)
def test_scalar_quantization_is_nearest_for_any_values(n, d, v, seed, duplicated):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=generator, dtype=torch.float64)
    values = torch.randn(d, v, generator=generator, dtype=torch.float64)
    if duplicated:
        values[:, -1] = values[:, 0]
    found = scalar_quantize(z, values)
    with use_backend("reference"):
        expected = scalar_quantize(z, values)
    assert torch.equal(found.values, expected.values)
    columns = torch.arange(d)
    assert torch.equal(found.values, values[columns, found.indices])


def test_scalar_quantization_passes_gradients_straight_through():
    z, values = drawn(6, 3, 3, dtype=torch.float64)
    z.requires_grad_(), values.requires_grad_()
    quantized = scalar_quantize(z, values)
    quantized.values.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z)) and values.grad is None
    quantized.codes.sum().backward()
    assert values.grad.sum() == 18


def test_what_is_not_finite_stays_visible():
    values = torch.tensor([[0.0, 1.0]])
    z = torch.tensor([[torch.nan], [torch.inf], [0.7]])
    for backend in ("auto", "reference"):
        with use_backend(backend):
            found = scalar_quantize(z, values).values
        assert found[:2].isnan().all() and found[2] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_find_the_values_of_the_definition(dtype):
    z, values = (tensor.to(dtype) for tensor in drawn(200, 12, 9))
    z = z.T[1:].T
    values = values.T[1:, :5]
    found = scalar_quantize(z, values)
    with use_backend("reference"):
        expected = scalar_quantize(z.double(), values.double())
    least = (expected.codes - z.double()).abs()
    assert torch.equal((found.codes.double() - z.double()).abs(), least)
    assert found.values.dtype == dtype


def test_the_operators_keep_torchs_contract():
    x, codebook = drawn(5, 4, 3)
    torch.library.opcheck(torch.ops.unweave.nearest_code, (x, codebook, 2))
    values = torch.randn(3, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.unweave.nearest_value, (x, values))


def test_codes_move_to_the_mean_of_their_rows():
    x, codebook = drawn(400, 8, 4)
    counts, sums = torch.zeros(8), torch.zeros(8, 4)
    for _ in range(60):
        indices, _ = nearest_code(x, codebook)
        before = codebook.clone()
        assert update_codebook(codebook, counts, sums, x, indices, decay=0.5) == 0
    assert (codebook - before).abs().max() < 1e-3
    for code in range(8):
        torch.testing.assert_close(codebook[code], x[indices == code].mean(0), rtol=0, atol=1e-2)


def test_dead_codes_restart_at_rows():
    x, codebook = drawn(50, 3, 4)
    codebook[2] = 1e4
    counts, sums = torch.ones(3), codebook.clone()
    indices, _ = nearest_code(x, codebook)
    generator = torch.Generator().manual_seed(0)
    revived = update_codebook(
        codebook, counts, sums, x, indices, decay=0.1, revive_below=0.5, generator=generator
    )
    assert revived == 1 and (x == codebook[2]).all(1).any() and counts[2] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nearest_code(torch.zeros(2, 3), torch.zeros(4, 2)), r"`codebook` \(M, d\)"),
        (lambda: nearest_code(torch.zeros(2, 3), torch.zeros(0, 3)), "M > 0"),
        (lambda: nearest_code(torch.zeros(2, 3), torch.zeros(4, 3).double()), "one floating dtype"),
        (lambda: nearest_code(torch.zeros(2, 3), torch.zeros(4, 3), k=5), "`k` must be from 1"),
        (lambda: nearest_code(torch.zeros(2, 3), torch.zeros(4, 3), metric="l1"), "`metric`"),
        (lambda: scalar_quantize(torch.zeros(2, 3), torch.zeros(2, 3)), r"`values` \(D, V\)"),
        (
            lambda: update_codebook(
                torch.zeros(2, 3),
                torch.zeros(3),
                torch.zeros(2, 3),
                torch.zeros(1, 3),
                torch.zeros(1).long(),
            ),
            "`counts` and `sums`",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
