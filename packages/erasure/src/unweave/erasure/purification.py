"""Purifying an image: invert it by DDIM under its caption, and sample it again without a concept.

All but One (arXiv 2312.12807) does this with an edited model; number of steps and guidance of the
inversion are unconfirmed. DDIM and its inversion: arXiv 2010.02502.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unweave.diffusion_core.denoiser import Denoiser
from unweave.diffusion_core.errors import NonFiniteError, PromptError
from unweave.diffusion_core.latents import ImageSource, encode_images, load_images
from unweave.diffusion_core.pipelines import Pipeline
from unweave.diffusion_core.prompts import PromptStates, encode_conditions
from unweave.erasure.protocol import Erasure, check_number, check_pipeline

_SPACINGS = ("leading", "trailing")


@dataclass(frozen=True)
class Purified:
    """Images (n, 3, H, W) in [0, 1], and the noise (n, C, h, w) from which they were sampled."""

    images: Tensor
    latents: Tensor


@torch.no_grad()
def purify(
    pipe: Pipeline,
    images: ImageSource | Sequence[ImageSource],
    captions: str | Sequence[str],
    *,
    erasure: Erasure | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
) -> Purified:
    """Return `images` as the edited model makes them from the noise that it finds behind them.

    Each image needs a caption that names what it shows, the erased concept among it; one caption
    serves all. `pipe` is the edited model, or the original with an `erasure` to apply meanwhile.
    Images are as for `load_images`, cut to a square and resized to the size the model makes. With
    the original model alone the images come back, except for what guidance and steps cost: compare
    with that. Raises `PromptError` when captions and images differ in number.

    >>> from unweave.diffusion_core.testing import tiny_pipeline
    >>> image = torch.rand(1, 3, 32, 32)
    >>> purify(tiny_pipeline(), image, "a cat", num_inference_steps=2).images.shape
    torch.Size([1, 3, 32, 32])
    """
    check_pipeline(pipe)
    check_number("num_inference_steps", num_inference_steps, "at least 1", lambda x: x >= 1)
    check_number("guidance_scale", guidance_scale, "at least 0", lambda x: x >= 0)
    pixels = load_images(images, pipe.unet.config.sample_size * pipe.vae_scale_factor)
    texts = [captions] * len(pixels) if isinstance(captions, str) else list(captions)
    if len(texts) != len(pixels):
        raise PromptError(
            f"`captions` must be one text or one for each of the {len(pixels)} images, got "
            f"{len(texts)}"
        )
    with contextlib.ExitStack() as stack:
        if erasure is not None:
            stack.enter_context(erasure.apply(pipe))
        scheduler = stack.enter_context(_deterministic(pipe))
        clean = encode_images(pipe.vae, pixels, generator=None).to(pipe.unet.device)
        latents = ddim_inversion(
            Denoiser(pipe.unet, scheduler, pipe.vae_scale_factor),
            scheduler,
            clean.to(pipe.unet.dtype),
            encode_conditions(pipe, texts),
            num_inference_steps,
        )
        resampled = pipe(
            texts,
            latents=latents,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="pt",
        ).images
    return Purified(resampled.float().cpu(), latents)


@torch.no_grad()
def ddim_inversion(
    denoiser: Denoiser,
    scheduler: Any,
    clean: Tensor,
    states: Tensor | PromptStates,
    num_inference_steps: int,
) -> Tensor:
    """Return the noise (n, C, h, w) from which DDIM makes the latents `clean` (n, C, h, w).

    Steps are those of `scheduler`'s settings, taken backwards without guidance under the states of
    n prompts or one. The scheduler's spacing of timesteps must be "leading" or "trailing". Raises
    `NonFiniteError` when latents become NaN or infinite.
    """
    from diffusers import DDIMInverseScheduler

    steps = DDIMInverseScheduler.from_config(scheduler.config)
    steps.set_timesteps(num_inference_steps)
    latents = clean
    for t in steps.timesteps.to(clean.device):
        raw = denoiser.predict(latents, t, states).raw
        latents = steps.step(raw, t, latents, return_dict=False)[0].to(clean.dtype)
    if not bool(latents.isfinite().all()):
        raise NonFiniteError(
            "the inverted latents are not finite: load the pipeline with dtype=torch.float32"
        )
    return latents


@contextlib.contextmanager
def _deterministic(pipe: Pipeline) -> Iterator[Any]:
    """Let `pipe` sample by DDIM without clipping while the block runs; yield the scheduler."""
    from diffusers import DDIMScheduler

    own = pipe.scheduler
    config = {"set_alpha_to_one": False, **own.config, "clip_sample": False}
    if config.get("timestep_spacing") not in _SPACINGS:
        config["timestep_spacing"] = "leading"
    pipe.scheduler = DDIMScheduler.from_config(config)
    try:
        yield pipe.scheduler
    finally:
        pipe.scheduler = own
