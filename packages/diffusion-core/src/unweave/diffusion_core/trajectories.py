"""Noisy latents as a model meets them while it generates: DDIM trajectories stopped on the way."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
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
    states = ddim_states(
        denoiser, scheduler, hidden_cond, hidden_uncond, num_inference_steps, guidance_scale, noise
    )
    latents, t = next(itertools.islice(states, stop_step, None))
    return latents, t.expand(len(noise))


def ddim_states(
    denoiser: Denoiser,
    scheduler: Any,
    hidden_cond: Tensor | PromptStates,
    hidden_uncond: Tensor | PromptStates,
    num_inference_steps: int,
    guidance_scale: float,
    noise: Tensor,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, before each step of `partial_trajectory`, the latents and the timestep ().

    Raises `NonFiniteError` when latents are NaN or infinite.
    """
    steps = _ddim(scheduler)
    steps.set_timesteps(num_inference_steps)
    latents = noise
    for t in steps.timesteps.to(noise.device):
        yield latents, t
        prediction = _guided(denoiser, latents, t, hidden_cond, hidden_uncond, guidance_scale)
        latents = steps.step(prediction.raw, t, latents, return_dict=False)[0].to(noise.dtype)
        if not bool(latents.isfinite().all()):
            raise NonFiniteError(
                f"the latents after timestep {int(t)} are not finite: lower `guidance_scale` "
                f"({guidance_scale}) or use float32"
            )


@dataclass(frozen=True)
class TrajectoryBank:
    """Latents of whole trajectories at all noise levels, from which training draws at will.

    A trajectory of N steps costs N calls of the model and serves any number of training steps,
    where `partial_trajectory` costs N / 2 calls for one. `noisy` is (n, C, h, w), `t` (n,), and
    `condition` (n,) says which of the prompts the trajectory followed.
    """

    noisy: Tensor
    t: Tensor
    condition: Tensor

    @classmethod
    @torch.no_grad()
    def collect(
        cls,
        denoiser: Denoiser,
        scheduler: Any,
        conditions: PromptStates,
        empty: PromptStates,
        *,
        num_trajectories: int,
        num_inference_steps: int,
        guidance_scale: float,
        generator: torch.Generator,
        batch_size: int = 8,
    ) -> TrajectoryBank:
        """Follow `num_trajectories` guided DDIM trajectories under the prompts, one after another.

        `conditions` are the states of k prompts, of which trajectory i takes number i modulo k;
        `empty` are those of one empty prompt. Noise comes from the CPU `generator`.
        """
        count = len(conditions.hidden_states)
        config: Any = denoiser.unet.config
        shape = (config.in_channels, *[config.sample_size] * 2)
        parts = []
        for first in range(0, num_trajectories, batch_size):
            chosen = torch.arange(first, min(first + batch_size, num_trajectories)) % count
            noise = torch.randn(len(chosen), *shape, generator=generator)
            states = ddim_states(
                denoiser,
                scheduler,
                conditions.select(chosen),
                empty,
                num_inference_steps,
                guidance_scale,
                noise.to(conditions.hidden_states),
            )
            parts += [(latents, t.expand(len(chosen)), chosen) for latents, t in states]
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def __len__(self) -> int:
        return len(self.t)

    def draw(self, count: int, generator: torch.Generator) -> TrajectoryBank:
        """Return `count` random entries, by the CPU `generator`, as a smaller bank."""
        rows = torch.randint(len(self), (count,), generator=generator)
        return TrajectoryBank(self.noisy[rows], self.t[rows], self.condition[rows])


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
