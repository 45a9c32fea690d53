"""Masks out of maps: thresholds, competition, smoothing, affinity."""

from __future__ import annotations

import math

import pytest
import torch

from unweave.attention_tools import AttentionMaps
from unweave.attention_tools.errors import MapError
from unweave.attention_tools.masks import (
    disjoint_masks,
    otsu_threshold,
    refine_by_self_attention,
    rescaled,
    smooth,
    to_mask,
)


def brute_force_otsu(values: list[float]) -> float:
    """Try every split: the threshold with the largest w0 w1 (m0 - m1)^2."""
    best, threshold = -1.0, max(values)
    for level in sorted(set(values))[:-1]:
        low = [one for one in values if one <= level]
        high = [one for one in values if one > level]
        apart = sum(high) / len(high) - sum(low) / len(low)
        between = len(low) * len(high) * apart**2
        if between > best * (1 + 1e-12):
            best, threshold = between, level
    return threshold


def test_otsu_of_hand_cases():
    two = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    assert otsu_threshold(two) == 0
    # Splits of 1, 2, 9 | after 1: 2 * (5.5 - 1)^2 = 40.5; after 2: 2 * (9 - 1.5)^2 = 112.5.
    assert otsu_threshold(torch.tensor([[9.0, 1.0, 2.0]])) == 2


@pytest.mark.parametrize("seed", range(5))
def test_otsu_is_the_best_of_all_splits(seed):
    maps = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(seed)).double() ** 3
    maps = (maps * 12).round() if seed % 2 else maps
    found = otsu_threshold(maps)
    assert found.shape == (2, 3)
    for own, threshold in zip(maps.flatten(0, 1), found.flatten(), strict=True):
        assert float(threshold) == brute_force_otsu(own.flatten().tolist())


def test_otsu_does_not_change_under_shift_and_scale():
    maps = torch.rand(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert to_mask(maps).equal(to_mask(1e-4 * maps + 5))
    assert to_mask(maps).equal(to_mask(1e6 * maps))


def test_otsu_finds_a_dim_object():
    maps = torch.full((16, 16), 0.010)
    maps[4:9, 2:11] = 0.013
    truth = maps > 0.012
    noise = 2e-4 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    assert to_mask(maps + noise).equal(truth)


def test_constant_map_has_an_empty_mask():
    for value in (0.0, 0.3, 1e-30):
        assert not to_mask(torch.full((4, 4), value)).any()
        assert not disjoint_masks(torch.full((2, 4, 4), value)).any()
    assert otsu_threshold(torch.tensor([[0.7]])) == torch.tensor(0.7)


def test_methods_against_hand_values():
    maps = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    assert to_mask(maps, "relative").tolist() == [[False, True], [True, True]]
    assert to_mask(maps, "relative", 0.9).tolist() == [[False, False], [False, True]]
    assert to_mask(maps, "mean").tolist() == [[False, False], [True, True]]
    assert to_mask(maps, "mean", 1.4).tolist() == [[False, False], [False, True]]
    assert to_mask(maps, "absolute", 0.15).tolist() == [[False, True], [True, True]]
    assert not to_mask(torch.zeros(2, 2), "relative").any()


def test_each_map_has_its_own_threshold():
    maps = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    maps = maps * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    for method in ("otsu", "relative", "mean"):
        apart = torch.stack([to_mask(own, method) for own in maps.flatten(0, 1)])
        assert to_mask(maps, method).flatten(0, 1).equal(apart)


def test_disjoint_masks_share_no_place_and_leave_the_background():
    maps = torch.zeros(1, 2, 8, 8)
    maps[0, 0, 1:4, 1:4] = 0.02
    maps[0, 0, 3:6, 3:6] += 0.01
    maps[0, 1, 3:6, 3:6] = 0.9
    masks = disjoint_masks(maps)
    assert masks.sum(1).max() == 1
    expected_first, expected_second = torch.zeros(2, 8, 8, dtype=torch.bool)
    expected_first[1:4, 1:4] = True  # At (3, 3) both are at their maximum: the first wins.
    expected_second[3:6, 3:6] = True
    expected_second[3, 3] = False
    assert masks[0, 0].equal(expected_first)
    assert masks[0, 1].equal(expected_second)


def test_disjoint_masks_without_background_cover_everything():
    maps = torch.rand(3, 4, 5, 5, generator=torch.Generator().manual_seed(2))
    assert disjoint_masks(maps, background=-1.0).sum(1).eq(1).all()
    assert not disjoint_masks(maps, background=1.0).any()


def test_smoothing_has_the_true_gaussian():
    maps = torch.zeros(1, 7, 7, dtype=torch.float64)
    maps[0, 3, 3] = 1
    side = math.exp(-1 / (2 * 0.5**2))
    row = torch.tensor([side, 1, side], dtype=torch.float64) / (1 + 2 * side)
    assert torch.allclose(smooth(maps)[0, 2:5, 2:5], row[:, None] * row)
    wide = torch.exp(-(torch.arange(-2, 3, dtype=torch.float64) ** 2) / (2 * 0.8**2))
    wide = wide / wide.sum()
    assert torch.allclose(smooth(maps, 5, 0.8)[0, 1:6, 1:6], wide[:, None] * wide)


def test_smoothing_reflects_at_borders_and_keeps_constants():
    maps = torch.zeros(4, 4, dtype=torch.float64)
    maps[1, 0] = 1
    side = math.exp(-2.0)
    total = 1 + 2 * side
    # (0, 0) sees row 1 from below and, reflected, from above.
    assert smooth(maps)[0, 0].item() == pytest.approx((2 * side / total) * (1 / total))
    assert torch.allclose(smooth(torch.full((2, 3, 5), 0.3)), torch.tensor(0.3))


def test_smoothing_is_differentiable():
    maps = torch.rand(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert torch.autograd.gradcheck(smooth, maps.requires_grad_())


def test_refinement_is_a_markov_step():
    generator = torch.Generator().manual_seed(4)
    affinity = torch.rand(2, 12, 12, generator=generator, dtype=torch.float64).softmax(-1)
    maps = torch.rand(2, 3, 3, 4, generator=generator, dtype=torch.float64)
    twice = refine_by_self_attention(maps, affinity, 2)
    expected = torch.einsum("bij,bjk,btk->bti", affinity, affinity, maps.flatten(2))
    assert torch.allclose(twice.flatten(2), expected)
    assert refine_by_self_attention(maps, torch.eye(12).expand(2, -1, -1).double()).equal(maps)


def test_refinement_fills_the_object_that_a_map_began_in():
    label = torch.zeros(8, 8)
    label[1:5, 2:7] = 1
    flat = label.flatten()
    same = (flat[:, None] == flat).float()
    affinity = (same / same.sum(-1, keepdim=True))[None]
    seed = torch.zeros(1, 1, 8, 8)
    seed[0, 0, 2, 3] = 1
    refined = refine_by_self_attention(seed, affinity)
    assert to_mask(refined)[0, 0].equal(label.bool())


def test_refinement_goes_to_the_largest_recorded_grid():
    own = AttentionMaps()
    own.add("coarse", 0, torch.full((1, 4, 4), 0.25), (2, 2))
    own.add("fine", 0, torch.eye(16)[None], (4, 4))
    own.add("finer", 0, torch.full((1, 16, 16), 1 / 16), (4, 4))
    maps = torch.rand(1, 2, 2, 2, generator=torch.Generator().manual_seed(5))
    refined = refine_by_self_attention(maps, own)
    wide = torch.nn.functional.interpolate(maps, (4, 4), mode="bilinear", align_corners=False)
    expected = (wide + wide.mean((2, 3), keepdim=True)) / 2
    assert torch.allclose(refined, expected)
    coarse = refine_by_self_attention(wide, own.select(layer="coarse"))
    assert coarse.shape == (1, 2, 2, 2)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: to_mask(torch.rand(4, 4), "otsus"), "otsus"),
        (lambda: to_mask(torch.rand(4, 4), "absolute"), "absolute"),
        (lambda: to_mask(torch.rand(4, 4), "otsu", 0.4), "0.4"),
        (lambda: to_mask(torch.tensor([[float("nan"), 1.0]])), "finite"),
        (lambda: otsu_threshold(torch.rand(4)), "(4,)"),
        (lambda: rescaled(torch.rand(0, 4)), "(0, 4)"),
        (lambda: disjoint_masks(torch.rand(4, 4)), "tokens"),
        (lambda: smooth(torch.rand(4, 4), 4), "odd"),
        (lambda: smooth(torch.rand(1, 4), 3), "1x4"),
        (lambda: smooth(torch.rand(4, 4), 3, 0.0), "sigma"),
        (lambda: refine_by_self_attention(torch.rand(4, 4), torch.rand(1, 16, 16)), "tokens"),
        (
            lambda: refine_by_self_attention(torch.rand(1, 1, 4, 4), torch.rand(1, 16, 3)),
            "(1, 16, 3)",
        ),
        (lambda: refine_by_self_attention(torch.rand(1, 1, 4, 4), torch.rand(2, 16, 16)), "2"),
        (lambda: refine_by_self_attention(torch.rand(1, 1, 2, 2), torch.rand(1, 4, 4), 0), "iter"),
        (lambda: refine_by_self_attention(torch.rand(1, 1, 2, 2), AttentionMaps()), "self"),
    ],
)
def test_bad_input_is_named(call, said):
    with pytest.raises(MapError) as caught:
        call()
    assert said in str(caught.value)
