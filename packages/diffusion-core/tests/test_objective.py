"""Claims about the denoising loss: what it averages, how it weighs, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave.diffusion_core.denoiser import Denoiser
from unweave.diffusion_core.errors import ImageError, SelectionError
from unweave.diffusion_core.objective import denoising_loss, min_snr_weights
from unweave.diffusion_core.testing import tiny_pipeline

STATES = torch.zeros(1, 1, 1)


class _Zero(torch.nn.Module):
    def forward(self, sample: Tensor, *_: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (torch.zeros_like(sample),)


def _denoiser(kind: str, shares: tuple[float, ...] = (0.8, 0.5, 0.0)) -> Denoiser:
    scheduler: Any = SimpleNamespace(
        alphas_cumprod=torch.tensor(shares, dtype=torch.float64),
        config=SimpleNamespace(prediction_type=kind),
    )
    return Denoiser(_Zero(), scheduler)


def _inputs(count: int = 3) -> tuple[Tensor, Tensor]:
    clean, noise = torch.randn(2, count, 4, 2, 2, dtype=torch.float64)
    return clean, noise


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_the_mean_square_of_target_minus_raw(kind: str) -> None:
    denoiser, (clean, noise), t = _denoiser(kind), _inputs(), torch.tensor([0, 1, 2])
    expected = denoiser.target(clean, noise, t).square().mean((1, 2, 3))
    losses = denoising_loss(denoiser, clean, STATES, t, noise, reduction="none")
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(denoising_loss(denoiser, clean, STATES, t, noise), expected.mean())


def test_the_loss_has_gradients_for_text_states() -> None:
    denoiser = Denoiser.from_pipeline(tiny_pipeline("v_prediction"))
    states = torch.randn(2, 77, 32, requires_grad=True)
    clean, noise = torch.randn(2, 2, 4, 16, 16)
    denoising_loss(denoiser, clean, states, torch.tensor([3, 999]), noise).backward()
    assert states.grad is not None and states.grad.isfinite().all() and states.grad.any()


def test_half_precision_losses_are_taken_in_float32() -> None:
    clean, noise = torch.zeros(1, 4, 2, 2).half(), torch.full((1, 4, 2, 2), 300.0).half()
    loss = denoising_loss(_denoiser("epsilon"), clean, STATES, torch.tensor([0]), noise)
    assert loss.dtype == torch.float32
    assert loss == 90_000


def test_a_mask_makes_a_weighted_mean_over_its_area() -> None:
    denoiser, (clean, noise), t = _denoiser("epsilon"), _inputs(2), torch.tensor([0, 1])
    mask = torch.zeros(2, 1, 2, 2)
    mask[0, 0, 0, 1] = 1
    mask[1] = 0.5
    losses = denoising_loss(denoiser, clean, STATES, t, noise, mask=mask, reduction="none")
    torch.testing.assert_close(losses[0], noise[0, :, 0, 1].square().mean())
    torch.testing.assert_close(losses[1], noise[1].square().mean())


@pytest.mark.parametrize(
    "mask", [torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 3, 3), -torch.ones(1, 1, 2, 2)]
)
def test_an_unusable_mask_is_refused(mask: Tensor) -> None:
    clean, noise = _inputs(1)
    with pytest.raises(ImageError, match="mask"):
        denoising_loss(_denoiser("epsilon"), clean, STATES, torch.tensor([0]), noise, mask=mask)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("epsilon", [0.5, 1.0, 1.0]),
        ("v_prediction", [2 / 5, 1 / 2, 0.0]),
        ("sample", [2.0, 1.0, 0.0]),
    ],
)
def test_min_snr_weights_have_the_values_worked_out_by_hand(
    kind: str, weights: list[float]
) -> None:
    """Shares 0.8, 0.5 and 0 are signal-to-noise ratios of 4, 1 and 0; gamma is 2."""
    like = torch.zeros(3, dtype=torch.float64)
    found = min_snr_weights(_denoiser(kind), torch.tensor([0, 1, 2]), like, 2.0)
    torch.testing.assert_close(found, torch.tensor(weights, dtype=torch.float64))


def test_min_snr_weighs_the_loss_of_each_sample() -> None:
    denoiser, (clean, noise), t = _denoiser("epsilon"), _inputs(), torch.tensor([0, 1, 2])
    plain = denoising_loss(denoiser, clean, STATES, t, noise, reduction="none")
    weighted = denoising_loss(denoiser, clean, STATES, t, noise, min_snr_gamma=2, reduction="none")
    torch.testing.assert_close(weighted, plain * torch.tensor([0.5, 1, 1]))


def test_an_unknown_reduction_or_gamma_is_refused() -> None:
    clean, noise = _inputs(1)
    arguments = (_denoiser("epsilon"), clean, STATES, torch.tensor([0]), noise)
    with pytest.raises(SelectionError, match="'sum'"):
        denoising_loss(*arguments, reduction="sum")  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="min_snr_gamma"):
        denoising_loss(*arguments, min_snr_gamma=0)
