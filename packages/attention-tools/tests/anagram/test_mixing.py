"""Mixed noises keep their variance, and what is behind weighs more: cases made by hand."""

from __future__ import annotations

import pytest
import torch

from unweave.attention_tools.mixing import balancing_weights, rectifying_scale
from unweave.attention_tools.predictions import predicted_image, predicted_noise, scaled_noise

NOISE = 12288


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(rho: float, tasks: int, generator: torch.Generator, pixels: int = NOISE):
    """Noises (T, pixels) of mean 0 and variance 1 whose correlations are about `rho`."""
    matrix = torch.full((tasks, tasks), float(rho)).fill_diagonal_(1.0)
    noises = torch.linalg.cholesky(matrix) @ torch.randn(tasks, pixels, generator=generator)
    return (noises - noises.mean(1, keepdim=True)) / noises.std(1, keepdim=True)


@pytest.mark.parametrize("rho", (-0.2, 0, 0.3, 0.7, 0.95))
@pytest.mark.parametrize("tasks", (2, 3, 4))
def test_rectified_noise_has_variance_one(rho, tasks):
    generator = seeded(tasks)
    for _ in range(10):
        noises = correlated(rho, tasks, generator)
        spacings = torch.rand(tasks, generator=generator).log()
        weights = spacings / spacings.sum()  # Dirichlet(1, ..., 1)
        mixed = weights @ noises
        scale = rectifying_scale(noises[:, None, None], weights)
        assert abs(float((scale * mixed).var()) - 1) < 0.03


@pytest.mark.parametrize("rho", (-0.2, 0, 0.3, 0.7, 0.95))
@pytest.mark.parametrize("tasks", (2, 3, 4))
def test_averaged_noise_shrinks(rho, tasks):
    mixed = correlated(rho, tasks, seeded(tasks)).mean(0)
    expected = (1 + (tasks - 1) * rho) / tasks
    assert abs(float(mixed.var()) - expected) < 0.03
    assert 0.09 < expected < 0.98
    if tasks == 2 and rho == 0:
        assert abs(float(mixed.var()) - 0.5) < 0.03


def test_pearson_keeps_a_variance_of_four_and_raw_does_not():
    noises = 2 * correlated(0.4, 2, seeded(0), 400_000)
    weights = torch.tensor([0.4, 0.6])
    scales = {
        kind: rectifying_scale(noises[:, None, None], weights, kind) for kind in ("pearson", "raw")
    }
    found = {kind: float((scale * (weights @ noises)).var()) for kind, scale in scales.items()}
    assert abs(found["pearson"] - 4) < 0.1
    assert abs(found["raw"] - 2.2) < 0.1


def test_noises_that_cancel_give_a_finite_scale():
    noise = torch.randn(1, 3, 8, 8, generator=seeded(0))
    scale = rectifying_scale(torch.cat([noise, -noise])[None], torch.tensor([[0.5, 0.5]]))
    assert scale.tolist() == pytest.approx([10.0])


@pytest.mark.parametrize("kind", ("epsilon", "v_prediction", "sample"))
def test_scaling_an_output_scales_its_noise(kind):
    x, output = torch.randn(2, 2, 3, 8, 8, generator=seeded(0), dtype=torch.float64)
    signal, noise = 0.6, 0.8
    scale = torch.tensor([1.3, 0.7])
    new = scaled_noise(x, output, scale, signal, noise, kind)
    before = predicted_noise(x, output, signal, noise, kind)
    after = predicted_noise(x, new, signal, noise, kind)
    torch.testing.assert_close(after, scale.double().reshape(2, 1, 1, 1) * before)
    image = predicted_image(x, new, signal, noise, kind)
    torch.testing.assert_close(signal * image + noise * after, x)


@pytest.mark.parametrize("kind", ("v_prediction", "sample"))
def test_without_signal_there_is_nothing_to_scale(kind):
    x, output = torch.randn(2, 1, 3, 8, 8, generator=seeded(0))
    assert torch.equal(scaled_noise(x, output, torch.tensor([1.3]), 0.0, 1.0, kind), output)


def test_weights_are_those_of_the_paper():
    scores = torch.tensor([0.30, 0.15])
    torch.testing.assert_close(balancing_weights(scores, 0, 30), torch.tensor([1 / 3, 2 / 3]))
    late = balancing_weights(scores, 29, 30)
    torch.testing.assert_close(late, torch.tensor([0.204, 0.796]), atol=5e-4, rtol=0)


def test_permuting_tasks_permutes_weights():
    scores = torch.tensor([0.3, 0.15, 0.2, 0.4])
    order = torch.tensor([2, 0, 3, 1])
    weights = balancing_weights(scores, 7, 30)
    torch.testing.assert_close(balancing_weights(scores[order], 7, 30), weights[order])


def test_scores_of_zero_and_less_give_finite_weights():
    weights = balancing_weights(torch.tensor([[0.3, 0.0], [-0.2, -0.1]]), 29, 30)
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2))
    torch.testing.assert_close(weights[1], torch.tensor([0.5, 0.5]))
