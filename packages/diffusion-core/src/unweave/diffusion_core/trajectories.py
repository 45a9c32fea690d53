"""Noisy latents as a model meets them while it generates: DDIM trajectories stopped on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unweave.diffusion_core.denoiser import Denoiser, Prediction, classifier_free
from unweave.diffusion_core.errors import NonFiniteError, SelectionError
from unweave.diffusion_core.prompts import PromptStates


@torch.no_grad()
def partial_trajectory(
    denoiser: Denoiser,
    scheduler: Any,
    hidden_cond: Tensor | PromptStates,
    hidden_uncond: Tensor | PromptStates,
    *,
    stop_step: int,
    num_inference_steps: int,
    guidance_scale: float,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """Take `stop_step` of `num_inference_steps` deterministic DDIM steps (arXiv 2010.02502).

    `noise` is (n, C, h, w); states of n prompts or one are as in `Denoiser.predict`. Returns the
    latents and the timestep (n,) at which the model would look at them next; stopped at step 0
    they are `noise`. The timesteps are those of `scheduler`'s settings under DDIM; `scheduler` is
    not changed. Raises `SelectionError` unless 0 <= stop_step < num_inference_steps.
    """
    if not 0 <= stop_step < num_inference_steps:
        raise SelectionError(
            f"`stop_step` must be in [0, num_inference_steps = {num_inference_steps}), got "
            f"{stop_step}"
        )
    steps = _ddim(scheduler)
    steps.set_timesteps(num_inference_steps)
    timesteps = steps.timesteps.to(noise.device)
    latents = noise
    for t in timesteps[:stop_step]:
        prediction = _guided(denoiser, latents, t, hidden_cond, hidden_uncond, guidance_scale)
        latents = steps.step(prediction.raw, t, latents, return_dict=False)[0].to(noise.dtype)
        if not bool(latents.isfinite().all()):
            raise NonFiniteError(
                f"the latents after timestep {int(t)} are not finite: lower `guidance_scale` "
                f"({guidance_scale}) or use float32"
            )
    return latents, timesteps[stop_step].expand(len(noise))


def _ddim(scheduler: Any) -> Any:
    """Return a DDIM scheduler with the settings of `scheduler`, clipping only if those say so."""
    from diffusers import DDIMScheduler

    config = dict(scheduler.config)
    config.setdefault("clip_sample", False)
    config.setdefault("set_alpha_to_one", False)
    return DDIMScheduler.from_config(config)


def _guided(
    denoiser: Denoiser,
    latents: Tensor,
    t: Tensor,
    hidden_cond: Tensor | PromptStates,
    hidden_uncond: Tensor | PromptStates,
    guidance_scale: float,
) -> Prediction:
    if guidance_scale == 1:
        return denoiser.predict(latents, t, hidden_cond)
    states = PromptStates.cat(
        [PromptStates.of(given).expand(len(latents)) for given in (hidden_uncond, hidden_cond)]
    )
    both = denoiser.predict(torch.cat([latents] * 2), t, states)
    uncond, cond = (
        Prediction(noisy, alpha, sigma, raw, both.prediction_type)
        for noisy, alpha, sigma, raw in zip(
            both.noisy.chunk(2),
            both.alpha.chunk(2),
            both.sigma.chunk(2),
            both.raw.chunk(2),
            strict=True,
        )
    )
    return classifier_free(uncond, cond, guidance_scale)
