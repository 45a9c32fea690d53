"""Metrics against closed forms, hand-computed values and an independent implementation."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from unweave.diffusion_core.errors import UnweaveError
from unweave.diffusion_core.metrics import (
    bootstrap_interval,
    clip_score,
    fid,
    kid,
    perceptual_distance,
    wilson_interval,
)


def gaussian(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


class MeanColourScorer:
    """Features in R^3: the mean colour of an image, the colour a prompt names."""

    colours: ClassVar = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "not red": (-1.0, 0, 0)}

    def image_features(self, images: Tensor) -> Tensor:
        return torch.nn.functional.normalize(images.mean(dim=(2, 3)), dim=-1)

    def text_features(self, prompts: list[str]) -> Tensor:
        return torch.tensor([self.colours[prompt] for prompt in prompts])


def red_images(n: int) -> Tensor:
    images = torch.zeros(n, 3, 4, 4)
    images[:, 0] = 1
    return images


def test_kid_of_identical_sets_is_within_three_standard_errors_of_zero() -> None:
    features = gaussian(2000, 16, seed=0)
    mean, std = kid(features, features.clone(), subsets=50, subset_size=100)
    assert abs(mean) < 3 * std / math.sqrt(50)


def test_kid_of_two_samples_of_one_distribution_is_within_three_standard_errors_of_zero() -> None:
    mean, std = kid(gaussian(2000, 16, 1), gaussian(2000, 16, 2), subsets=20, subset_size=100)
    assert abs(mean) < 3 * std / math.sqrt(20)


def test_kid_grows_with_the_shift() -> None:
    a, b = gaussian(300, 8, 1), gaussian(300, 8, 2)
    distances = [kid(a, b + shift, subsets=10, subset_size=100)[0] for shift in (0.0, 0.5, 1.0)]
    assert distances == sorted(distances)
    assert distances[1] > 0.1


def test_kid_of_two_rows_matches_the_hand_computed_value() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    b = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    # k(a1, a2) = 1, k(b1, b2) = 1, every k(a, b) = 1: 2/2 + 2/2 - 2 = 0
    assert kid(a, b, subsets=3, subset_size=2) == (pytest.approx(0.0), pytest.approx(0.0))
    b = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    # k(b1, b2) = (4/2 + 1)^3 = 27, k(a1, b) = (2/2 + 1)^3 = 8, k(a2, b) = 1
    assert kid(a, b, subsets=1, subset_size=2)[0] == pytest.approx(1 + 27 - 2 * (8 + 1) / 2)


def test_kid_agrees_with_torchmetrics() -> None:
    poly_mmd = pytest.importorskip("torchmetrics.image.kid").poly_mmd
    a, b = gaussian(60, 8, 1), gaussian(60, 8, 2) + 0.3
    expected = poly_mmd(a, b).item()
    assert kid(a, b, subsets=2, subset_size=60)[0] == pytest.approx(expected, rel=1e-10)


def test_paired_kid_of_identical_sets_is_exactly_zero() -> None:
    features = gaussian(40, 8, 0)
    assert kid(features, features.clone(), subsets=5, subset_size=20, paired=True) == (0.0, 0.0)


def test_paired_kid_is_unbiased_for_correlated_pairs() -> None:
    a = gaussian(2000, 16, 1)
    b = (a + gaussian(2000, 16, 2)) / math.sqrt(2)
    mean, std = kid(a, b, subsets=50, subset_size=40, paired=True)
    assert abs(mean) < 3 * std / math.sqrt(50)


def test_paired_kid_refuses_sets_of_different_size() -> None:
    with pytest.raises(UnweaveError, match="got 4 and 5 rows"):
        kid(gaussian(4, 2, 0), gaussian(5, 2, 0), 1, 2, paired=True)


def test_kid_repeats_and_follows_its_generator() -> None:
    a, b = gaussian(50, 4, 1), gaussian(50, 4, 2)
    assert kid(a, b, 5, 10) == kid(a, b, 5, 10)
    assert kid(a, b, 5, 10, torch.Generator().manual_seed(1)) != kid(a, b, 5, 10)


@pytest.mark.parametrize("subset_size", [1, 11])
def test_kid_refuses_a_subset_that_does_not_fit(subset_size: int) -> None:
    with pytest.raises(UnweaveError, match=f"from 2 to .* \\(10\\), got {subset_size}"):
        kid(gaussian(10, 2, 0), gaussian(20, 2, 1), subsets=1, subset_size=subset_size)


def test_fid_of_identical_sets_is_zero() -> None:
    features = gaussian(100, 8, 0)
    assert fid(features, features) == pytest.approx(0.0, abs=1e-9)


def test_fid_of_fewer_rows_than_features_is_still_zero_for_identical_sets() -> None:
    features = gaussian(10, 64, 0)
    assert fid(features, features) == pytest.approx(0.0, abs=1e-9)


def test_fid_of_shifted_and_scaled_gaussians_matches_the_closed_form() -> None:
    d, shift, scale = 4, 3.0, 2.0
    a, b = gaussian(20_000, d, 1), scale * gaussian(20_000, d, 2) + shift
    closed_form = d * shift**2 + d * (1 - scale) ** 2
    assert fid(a, b) == pytest.approx(closed_form, rel=0.02)


def test_fid_of_non_commuting_covariances_agrees_with_the_matrix_square_root() -> None:
    a, b = gaussian(200, 5, 1) @ gaussian(5, 5, 3), gaussian(150, 5, 2) @ gaussian(5, 5, 4)
    eigenvalues = torch.linalg.eigvals(torch.cov(a.T) @ torch.cov(b.T))
    spread = torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * eigenvalues.sqrt().real.sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + spread
    assert fid(a, b) == pytest.approx(expected.item(), rel=1e-8)


def test_features_with_nan_or_other_widths_are_refused() -> None:
    bad = gaussian(4, 2, 0)
    bad[0, 0] = float("nan")
    with pytest.raises(UnweaveError, match="finite"):
        fid(bad, gaussian(4, 2, 1))
    with pytest.raises(UnweaveError, match=r"\(4, 2\) and \(4, 3\)"):
        kid(gaussian(4, 2, 0), gaussian(4, 3, 0), 1, 2)


def test_clip_score_is_100_for_agreement_and_0_for_the_unrelated_and_the_opposite() -> None:
    scores = clip_score(red_images(3), ["red", "green", "not red"], MeanColourScorer())
    torch.testing.assert_close(scores, torch.tensor([100.0, 0.0, 0.0]))


def test_clip_score_refuses_another_number_of_prompts() -> None:
    with pytest.raises(UnweaveError, match="2 images and 1 prompts"):
        clip_score(red_images(2), ["red"], MeanColourScorer())


def test_perceptual_distance_is_zero_for_equal_images_and_two_for_orthogonal_features() -> None:
    green = red_images(2).roll(1, dims=1)
    images = torch.cat([red_images(1), green[:1]])
    distances = perceptual_distance(red_images(2), images, lambda x: x.mean(dim=(2, 3)))
    torch.testing.assert_close(distances, torch.tensor([0.0, 2.0]))


def test_perceptual_distance_averages_over_positions_and_layers() -> None:
    half = red_images(1)
    half[..., :2] = half[..., :2].roll(1, dims=1)
    # Half the positions are orthogonal (distance 2) in the first layer, none in the second.
    distance = perceptual_distance(red_images(1), half, lambda x: [x, torch.ones_like(x)])
    torch.testing.assert_close(distance, torch.tensor([0.5]))


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # z = 1.959964: z^2 = 3.841459
        (5, 10, 0.236593, 0.763407),  # 0.5 -+ 0.5 sqrt(c / (1 + c)), c = z^2/n
        (0, 10, 0.0, 0.277533),  # high = (z^2/n) / (1 + z^2/n)
        (10, 10, 0.722467, 1.0),
        (1, 1, 0.206549, 1.0),  # low = 1 / (1 + z^2)
    ],
)
def test_wilson_interval_matches_hand_computed_values(
    successes: int, n: int, low: float, high: float
) -> None:
    assert wilson_interval(successes, n) == (
        pytest.approx(low, abs=2e-6),
        pytest.approx(high, abs=2e-6),
    )


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_interval_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(UnweaveError, match=f"got {successes} of {n}"):
        wilson_interval(successes, n)


def test_bootstrap_interval_is_near_the_normal_interval_and_repeats() -> None:
    values = gaussian(400, 1, 0).flatten()
    low, high = bootstrap_interval(values, seed=1)
    half = 1.96 * values.std().item() / math.sqrt(400)
    assert low == pytest.approx(values.mean().item() - half, abs=0.015)
    assert high == pytest.approx(values.mean().item() + half, abs=0.015)
    assert bootstrap_interval(values, seed=1) == (low, high)
    assert bootstrap_interval(values, seed=2) != (low, high)


def test_bootstrap_interval_of_equal_values_is_that_value() -> None:
    assert bootstrap_interval([0.25, 0.25, 0.25], seed=0) == (0.25, 0.25)


def test_bootstrap_interval_refuses_nothing_and_nan() -> None:
    with pytest.raises(UnweaveError, match="at least one"):
        bootstrap_interval([], seed=0)
    with pytest.raises(UnweaveError, match="finite"):
        bootstrap_interval([1.0, float("nan")], seed=0)
