"""Overlap measures against hand-computed cases."""

from __future__ import annotations

import math

import pytest
import torch

from unweave.attention_tools.errors import MapError
from unweave.attention_tools.overlap import iou, jensen_shannon, min_sum_ratio, soft_iou

A = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
B = torch.tensor([[2.0, 2.0], [1.0, 1.0]])


def test_hand_values():
    # min: 1 2 1 0 = 4; sums 6 + 6; max: 2 2 3 1 = 8.
    assert min_sum_ratio(A, B).item() == pytest.approx(4 / 12)
    assert soft_iou(A, B).item() == pytest.approx(4 / 8)
    p, q = A / 6, B / 6
    middle = (p + q) / 2
    expected = sum(
        x * math.log(x / m) / 2
        for own in (p, q)
        for x, m in zip(own.flatten().tolist(), middle.flatten().tolist(), strict=True)
        if x
    )
    assert jensen_shannon(A, B).item() == pytest.approx(expected, rel=1e-6)


def test_ends_of_the_ranges():
    left, right = torch.zeros(2, 4, 4)
    left[:, :2], right[:, 2:] = 0.3, 0.7
    assert min_sum_ratio(left, left).item() == pytest.approx(0.5)
    assert min_sum_ratio(left, right) == 0
    assert soft_iou(left, left) == 1
    assert soft_iou(left, right) == 0
    assert jensen_shannon(left, 5 * left).item() == pytest.approx(0, abs=1e-7)
    assert jensen_shannon(left, right).item() == pytest.approx(math.log(2))


def test_iou_counts_places_and_soft_iou_agrees():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 3, 5, 6, generator=generator) > 0.5
    counted = [(x & y).sum().item() / (x | y).sum().item() for x, y in zip(a, b, strict=True)]
    assert iou(a, b).tolist() == pytest.approx(counted)
    assert torch.allclose(soft_iou(a.float(), b.float()), iou(a, b))


def test_empty_maps_have_no_overlap():
    empty = torch.zeros(3, 3)
    assert min_sum_ratio(empty, empty) == 0
    assert soft_iou(empty, empty) == 0
    assert iou(empty.bool(), empty.bool()) == 0


def test_all_pairs_by_broadcasting():
    maps = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    for measure in (min_sum_ratio, soft_iou, jensen_shannon):
        pairs = measure(maps[:, :, None], maps[:, None])
        assert pairs.shape == (2, 3, 3)
        assert torch.allclose(pairs, pairs.transpose(1, 2), atol=1e-6)
        assert torch.allclose(pairs[1, 0, 2], measure(maps[1, 0], maps[1, 2]))


@pytest.mark.parametrize("measure", [min_sum_ratio, soft_iou, jensen_shannon])
def test_gradients_are_those_of_finite_differences(measure):
    generator = torch.Generator().manual_seed(2)
    a, b = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64) + 0.1
    assert torch.autograd.gradcheck(measure, (a.requires_grad_(), b.requires_grad_()))


def test_divergence_has_finite_gradients_at_zeros():
    a = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    jensen_shannon(a, torch.tensor([[0.0, 1.0, 0.0]])).backward()
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("measure", [min_sum_ratio, soft_iou, jensen_shannon])
def test_half_precision_is_computed_in_float32(measure):
    assert measure(A.bfloat16(), B.bfloat16()).dtype == torch.float32


def test_bad_input_is_named():
    with pytest.raises(MapError, match="same height and width"):
        min_sum_ratio(torch.rand(4, 4), torch.rand(4, 5))
    with pytest.raises(MapError, match="boolean"):
        iou(torch.rand(4, 4), torch.rand(4, 4))
    with pytest.raises(MapError, match="same height"):
        iou(torch.ones(4, 4) > 0, torch.ones(1, 4) > 0)
    with pytest.raises(MapError, match="mass"):
        jensen_shannon(torch.zeros(4, 4), torch.rand(4, 4))
