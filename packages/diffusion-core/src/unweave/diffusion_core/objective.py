"""The denoising loss that diffusion models are trained with, whatever they predict."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from unweave.diffusion_core.denoiser import Denoiser
from unweave.diffusion_core.errors import ImageError, SelectionError
from unweave.diffusion_core.prompts import PromptStates


def denoising_loss(
    denoiser: Denoiser,
    clean_latents: Tensor,
    hidden_states: Tensor | PromptStates,
    t: Tensor,
    noise: Tensor,
    *,
    mask: Tensor | None = None,
    min_snr_gamma: float | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Return the mean squared error of the raw prediction, in float32 or better.

    `clean_latents` and `noise` are (n, C, h, w) and `t` is (n,); `hidden_states` of n prompts or
    one are as in `Denoiser.predict`. The weights `mask`, (n or 1, 1 or C, h, w) and not negative,
    make each sample's error a weighted mean over its positions. `min_snr_gamma` weighs samples as
    in arXiv 2303.09556. With `reduction="none"` the losses of the samples come back, (n,). Raises
    `ImageError` for a mask of another shape or without any weight.
    """
    if reduction not in ("mean", "none"):
        raise SelectionError(f'`reduction` must be "mean" or "none", got {reduction!r}')
    noisy = denoiser.add_noise(clean_latents, noise, t)
    raw = denoiser.predict(noisy, t, hidden_states).raw
    precision = torch.promote_types(raw.dtype, torch.float32)
    target = denoiser.target(clean_latents, noise, t)
    errors = (raw.to(precision) - target.to(precision)).square()
    losses = errors.flatten(1).mean(1) if mask is None else _weighted_mean(errors, mask)
    if min_snr_gamma is not None:
        losses = losses * min_snr_weights(denoiser, t, losses, min_snr_gamma)
    return losses.mean() if reduction == "mean" else losses


def min_snr_weights(denoiser: Denoiser, t: Tensor, like: Tensor, gamma: float) -> Tensor:
    """Return the min-SNR weights (n,) of timesteps `t` in the type of `like` (n,).

    min(SNR, gamma) divided by SNR for noise, by SNR + 1 for velocity, by 1 for samples: the same
    weighting of the clean latent's error each time. At zero signal the weight of noise is 1.
    """
    if not gamma > 0:
        raise SelectionError(f"`min_snr_gamma` must be positive, got {gamma}")
    alpha, sigma = denoiser.rates(t, like)
    snr = (alpha / sigma).square()
    if denoiser.prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    if denoiser.prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return snr.clamp(max=gamma)


def _weighted_mean(errors: Tensor, mask: Tensor) -> Tensor:
    try:
        weights = mask.to(errors).expand_as(errors).flatten(1)
    except RuntimeError as error:
        raise ImageError(
            f"`mask` must be (n or 1, 1 or C, h, w) for latents {tuple(errors.shape)}, got "
            f"{tuple(mask.shape)}"
        ) from error
    totals = weights.sum(1)
    if not bool((totals > 0).all()) or bool((weights < 0).any()):
        raise ImageError(
            "`mask` must not be negative and must have weight in every sample, got the sums "
            f"{totals.tolist()}"
        )
    return (errors.flatten(1) * weights).sum(1) / totals
