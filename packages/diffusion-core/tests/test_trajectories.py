"""Claims about partial trajectories: they are the pipeline's own, stopped on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unweave.diffusion_core.denoiser import Denoiser
from unweave.diffusion_core.errors import NonFiniteError, SelectionError
from unweave.diffusion_core.prompts import encode_conditions, encode_prompts
from unweave.diffusion_core.testing import tiny_pipeline
from unweave.diffusion_core.trajectories import TrajectoryBank, partial_trajectory

STEPS = 7


def _stopped(pipe: Any, noise: Tensor, stop_step: int, scale: float) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        states = encode_prompts(pipe, ["a cat", ""])
    return partial_trajectory(
        Denoiser.from_pipeline(pipe),
        pipe.scheduler,
        states[:1],
        states[1:],
        stop_step=stop_step,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        noise=noise,
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_every_step_is_that_of_the_pipeline(kind: Any, scale: float) -> None:
    pipe = tiny_pipeline(kind)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[Tensor, int]] = []

    def record(_: Any, __: int, t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((values["latents"].clone(), int(t)))
        return {}

    pipe(
        ["a cat"] * 2,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        latents=noise.clone(),
        output_type="latent",
        callback_on_step_end=record,
    )
    for stop_step in (1, 3, STEPS - 1):
        latents, t = _stopped(pipe, noise, stop_step, scale)
        torch.testing.assert_close(latents, seen[stop_step - 1][0], rtol=1e-4, atol=1e-4)
        assert t.tolist() == [seen[stop_step][1]] * 2


def test_stopped_before_the_first_step_the_latents_are_the_noise() -> None:
    noise = torch.randn(1, 4, 16, 16)
    latents, t = _stopped(tiny_pipeline("v_prediction"), noise, 0, 3.0)
    assert torch.equal(latents, noise)
    assert t.tolist() == [999]


def test_the_scheduler_and_gradients_are_left_alone() -> None:
    pipe = tiny_pipeline()
    pipe.scheduler.set_timesteps(3)
    before = pipe.scheduler.timesteps.clone()
    latents, _ = _stopped(pipe, torch.randn(1, 4, 16, 16), 2, 3.0)
    assert torch.equal(pipe.scheduler.timesteps, before)
    assert not latents.requires_grad


def test_a_scheduler_that_does_not_clip_stays_so_under_ddim() -> None:
    from diffusers import PNDMScheduler

    pipe = tiny_pipeline()
    noise = 10 * torch.randn(1, 4, 16, 16)
    expected, _ = _stopped(pipe, noise, 2, 3.0)
    pipe.scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    latents, _ = _stopped(pipe, noise, 2, 3.0)
    torch.testing.assert_close(latents, expected)


@pytest.mark.parametrize("stop_step", [-1, STEPS])
def test_a_step_out_of_range_is_named(stop_step: int) -> None:
    with pytest.raises(SelectionError, match=str(stop_step)):
        _stopped(tiny_pipeline(), torch.randn(1, 4, 16, 16), stop_step, 3.0)


def test_latents_that_are_not_finite_stop_at_once() -> None:
    with pytest.raises(NonFiniteError, match="timestep"):
        _stopped(tiny_pipeline(), torch.full((1, 4, 16, 16), float("inf")), 2, 3.0)


def _bank(pipe: Any, seed: int = 0) -> TrajectoryBank:
    with torch.no_grad():
        conditions, empty = (encode_conditions(pipe, list(p)) for p in (("a cat", "a dog"), ("",)))
    return TrajectoryBank.collect(
        Denoiser.from_pipeline(pipe),
        pipe.scheduler,
        conditions,
        empty,
        num_trajectories=3,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(seed),
        batch_size=2,
    )


def test_a_bank_holds_every_state_of_every_trajectory() -> None:
    pipe = tiny_pipeline()
    bank = _bank(pipe)
    assert len(bank) == 3 * STEPS and bank.noisy.shape == (3 * STEPS, 4, 16, 16)
    assert bank.condition.bincount().tolist() == [2 * STEPS, STEPS]
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    latents, t = _stopped(pipe, noise[:1], 4, 4.0)
    row = (bank.condition == 0) & (bank.t == t)
    nearest = (bank.noisy[row] - latents).flatten(1).norm(dim=1).min()
    assert nearest < 1e-3


def test_draws_from_a_bank_depend_on_the_generator_alone() -> None:
    bank = _bank(tiny_pipeline())
    first, again, other = (bank.draw(5, torch.Generator().manual_seed(n)) for n in (1, 1, 2))
    assert torch.equal(first.noisy, again.noisy) and torch.equal(first.t, again.t)
    assert not torch.equal(first.noisy, other.noisy)
    for noisy, t in zip(first.noisy, first.t, strict=True):
        assert any(torch.equal(noisy, kept) for kept in bank.noisy[bank.t == t])
