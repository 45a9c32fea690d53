"""Claims about the denoiser: its three forms follow from one another and are never NaN."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave.diffusion_core.denoiser import Denoiser, Prediction, PredictionType, classifier_free
from unweave.diffusion_core.errors import PipelineError, SelectionError
from unweave.diffusion_core.testing import tiny_pipeline

KINDS: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
FORMS = {"epsilon": "epsilon", "v_prediction": "velocity", "sample": "clean"}


def _scheduler(kind: str, shares: list[float]) -> Any:
    return SimpleNamespace(
        alphas_cumprod=torch.tensor(shares, dtype=torch.float64),
        config=SimpleNamespace(prediction_type=kind),
    )


def _single(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


class _Constant(torch.nn.Module):
    """A U-Net that answers the same whatever it is asked."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, sample: Tensor, *_: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (self.answer.expand_as(sample),)


@pytest.mark.parametrize("kind", KINDS)
def test_the_three_forms_have_the_values_worked_out_by_hand(kind: PredictionType) -> None:
    """alpha 0.6, sigma 0.8, clean 2 and noise 5 give noisy 5.2 and velocity 3 - 1.6 = 1.4."""
    raw = _single({"epsilon": 5.0, "v_prediction": 1.4, "sample": 2.0}[kind])
    prediction = Prediction(_single(5.2), _single(0.6), _single(0.8), raw, kind)
    torch.testing.assert_close(prediction.epsilon, _single(5.0))
    torch.testing.assert_close(prediction.velocity, _single(1.4))
    torch.testing.assert_close(prediction.clean, _single(2.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_conversions_are_inverse_of_one_another(
    kind: PredictionType, other: PredictionType
) -> None:
    generator = torch.Generator().manual_seed(0)
    alpha = torch.rand(8, 1, 1, 1, generator=generator, dtype=torch.float64) * 0.98 + 0.01
    sigma = (1 - alpha.square()).sqrt()
    noisy, raw = torch.randn(2, 8, 4, 3, 5, generator=generator, dtype=torch.float64)
    there = Prediction(noisy, alpha, sigma, raw, kind)
    converted = getattr(there, FORMS[other])
    back = Prediction(noisy, alpha, sigma, converted, other)
    torch.testing.assert_close(getattr(back, FORMS[kind]), raw, rtol=0, atol=1e-10)
    rebuilt = alpha * back.clean + sigma * back.epsilon
    torch.testing.assert_close(rebuilt, noisy, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_form_is_nan_without_signal_or_without_noise(kind: PredictionType, share: float) -> None:
    denoiser = Denoiser(_Constant(_single(0.5)), _scheduler(kind, [share]))
    noisy = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    prediction = denoiser.predict(noisy, torch.tensor(0), torch.zeros(1, 1, 1))
    for form in FORMS.values():
        assert getattr(prediction, form).isfinite().all()


def test_the_last_step_of_a_zero_terminal_schedule_is_finite_and_pure_noise() -> None:
    denoiser = Denoiser.from_pipeline(tiny_pipeline("v_prediction"))
    last = torch.tensor([denoiser.num_train_timesteps - 1])
    clean, noise = torch.randn(2, 1, 4, 16, 16)
    assert denoiser.alphas_cumprod[-1] == 0
    assert torch.equal(denoiser.add_noise(clean, noise, last), noise)
    assert torch.equal(denoiser.target(clean, noise, last), -clean)
    prediction = denoiser.predict(noise, last, torch.randn(1, 77, 32))
    torch.testing.assert_close(prediction.clean, -prediction.raw)
    torch.testing.assert_close(prediction.epsilon, noise)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_hits_its_target_recovers_the_clean_latent_and_the_noise(
    kind: PredictionType,
) -> None:
    scheduler = _scheduler(kind, [0.9, 0.5, 0.1])
    clean, noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    t = torch.tensor([2, 0, 1])
    target = Denoiser(torch.nn.Identity(), scheduler).target(clean, noise, t)
    denoiser = Denoiser(_Constant(target), scheduler)
    prediction = denoiser.predict(denoiser.add_noise(clean, noise, t), t, torch.zeros(1, 1, 1))
    torch.testing.assert_close(prediction.clean, clean)
    torch.testing.assert_close(prediction.epsilon, noise)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_and_targets_are_those_of_the_scheduler(kind: Any) -> None:
    pipe = tiny_pipeline(kind)
    denoiser = Denoiser.from_pipeline(pipe)
    clean, noise = torch.randn(2, 3, 4, 16, 16)
    t = torch.tensor([0, 400, 998])
    torch.testing.assert_close(
        denoiser.add_noise(clean, noise, t), pipe.scheduler.add_noise(clean, noise, t)
    )
    velocity = pipe.scheduler.get_velocity(clean, noise, t)
    expected = velocity if kind == "v_prediction" else noise
    torch.testing.assert_close(denoiser.target(clean, noise, t), expected)


@pytest.mark.parametrize("form", FORMS.values())
def test_guidance_is_the_same_combination_in_every_form(form: str) -> None:
    noisy, first, second = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64)
    rates = _single(0.6), _single(0.8)
    uncond = Prediction(noisy, *rates, first, "v_prediction")
    cond = Prediction(noisy, *rates, second, "v_prediction")
    before, after = getattr(uncond, form), getattr(cond, form)
    guided = getattr(classifier_free(uncond, cond, 7.5), form)
    torch.testing.assert_close(guided, before + 7.5 * (after - before))


def test_one_prompt_and_one_timestep_serve_for_all_latents() -> None:
    denoiser = Denoiser.from_pipeline(tiny_pipeline())
    noisy, states = torch.randn(3, 4, 16, 16), torch.randn(1, 77, 32)
    together = denoiser.predict(noisy, torch.tensor(5), states).raw
    alone = denoiser.predict(noisy[1:2], torch.tensor([5]), states).raw
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("t", [-1, 1000])
def test_a_timestep_out_of_range_is_named(t: int) -> None:
    denoiser = Denoiser.from_pipeline(tiny_pipeline())
    with pytest.raises(SelectionError, match=rf"\[0, 1000\).*{t}"):
        denoiser.add_noise(*torch.randn(2, 1, 4, 2, 2), torch.tensor([t]))


def test_a_flow_matching_scheduler_is_refused_by_name() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    with pytest.raises(PipelineError, match="FlowMatchEulerDiscreteScheduler"):
        Denoiser(torch.nn.Identity(), FlowMatchEulerDiscreteScheduler())


def test_an_unknown_prediction_type_is_named() -> None:
    with pytest.raises(PipelineError, match="'flow'"):
        Denoiser(torch.nn.Identity(), _scheduler("flow", [0.5]))
