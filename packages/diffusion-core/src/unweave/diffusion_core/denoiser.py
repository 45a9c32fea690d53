"""One view of noise-, velocity- and sample-predicting models: raw outputs and what they imply."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from unweave.diffusion_core.errors import PipelineError, SelectionError
from unweave.diffusion_core.pipelines import Pipeline
from unweave.diffusion_core.prompts import PromptStates

PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True)
class Prediction:
    """A model's output for `noisy` = `alpha` clean + `sigma` epsilon, in each of its three forms.

    Tensors are (n, C, h, w); `alpha` and `sigma` are (n, 1, 1, 1). With v = alpha epsilon - sigma
    clean (Salimans and Ho, arXiv 2202.00512), the forms follow from one another. What `noisy` says
    nothing about is 0: the clean latent of a noise prediction where `alpha` is 0, and the noise of
    a sample prediction where `sigma` is 0.
    """

    noisy: Tensor
    alpha: Tensor
    sigma: Tensor
    raw: Tensor
    prediction_type: PredictionType

    @property
    def epsilon(self) -> Tensor:
        """The predicted noise."""
        if self.prediction_type == "epsilon":
            return self.raw
        if self.prediction_type == "v_prediction":
            return self.sigma * self.noisy + self.alpha * self.raw
        return _divide(self.noisy - self.alpha * self.raw, self.sigma)

    @property
    def clean(self) -> Tensor:
        """The predicted clean latent."""
        if self.prediction_type == "sample":
            return self.raw
        if self.prediction_type == "v_prediction":
            return self.alpha * self.noisy - self.sigma * self.raw
        return _divide(self.noisy - self.sigma * self.raw, self.alpha)

    @property
    def velocity(self) -> Tensor:
        """The predicted velocity."""
        if self.prediction_type == "v_prediction":
            return self.raw
        return self.alpha * self.epsilon - self.sigma * self.clean


@dataclass(frozen=True)
class Denoiser:
    """A U-Net with the noise schedule and the kind of prediction it was trained for.

    `vae_scale_factor` is the number of pixels along a side of an image for each position of the
    latents: U-Nets of XL are told the size of the image.

    >>> from unweave.diffusion_core.testing import tiny_pipeline
    >>> denoiser = Denoiser.from_pipeline(tiny_pipeline("v_prediction"))
    >>> noisy = torch.randn(2, 4, 16, 16)
    >>> prediction = denoiser.predict(noisy, torch.tensor([10, 999]), torch.randn(2, 77, 32))
    >>> prediction.clean.shape
    torch.Size([2, 4, 16, 16])

    Raises `PipelineError` for schedulers without `alphas_cumprod`, such as flow matching.
    """

    unet: nn.Module
    scheduler: Any
    vae_scale_factor: int = 8

    def __post_init__(self) -> None:
        if getattr(self.scheduler, "alphas_cumprod", None) is None:
            raise PipelineError(
                f"the scheduler {type(self.scheduler).__name__} has no `alphas_cumprod`: expected "
                "one of diffusers' discrete schedulers, such as DDIMScheduler"
            )
        kind = self.scheduler.config.prediction_type
        if kind not in get_args(PredictionType):
            raise PipelineError(
                f"the scheduler's `prediction_type` must be one of {get_args(PredictionType)}, "
                f"got {kind!r}"
            )

    @classmethod
    def from_pipeline(cls, pipe: Pipeline) -> Denoiser:
        """Return the denoiser made of the U-Net and the scheduler of `pipe`, shared, not copied."""
        return cls(pipe.unet, pipe.scheduler, pipe.vae_scale_factor)

    @property
    def prediction_type(self) -> PredictionType:
        """What the raw output of the model is."""
        return cast(PredictionType, self.scheduler.config.prediction_type)

    @property
    def num_train_timesteps(self) -> int:
        """The number of timesteps; `t` is in [0, num_train_timesteps)."""
        return len(self.scheduler.alphas_cumprod)

    @property
    def alphas_cumprod(self) -> Tensor:
        """The share of the clean latent in the variance by timestep, (num_train_timesteps,)."""
        return cast(Tensor, self.scheduler.alphas_cumprod)

    def rates(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma) of timesteps `t` in the type of `like`, shaped to multiply it.

        `t` holds integers, () or (1,) or (n,). Raises `SelectionError` when one is out of range.
        """
        t = _expand(t, like)
        if t.numel() and not 0 <= int(t.min()) <= int(t.max()) < self.num_train_timesteps:
            raise SelectionError(
                f"`t` must be in [0, {self.num_train_timesteps}), got {t.flatten().tolist()}"
            )
        precision = torch.promote_types(like.dtype, torch.float32)
        shares = self.alphas_cumprod.to(t.device, precision)[t]
        shares = shares.reshape(-1, *[1] * (like.ndim - 1))
        return shares.sqrt().to(like.dtype), (1 - shares).sqrt().to(like.dtype)

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return alpha_t clean + sigma_t noise for `clean` and `noise` (n, C, h, w)."""
        alpha, sigma = self.rates(t, clean)
        return alpha * clean + sigma * noise

    def predict(self, noisy: Tensor, t: Tensor, hidden_states: Tensor | PromptStates) -> Prediction:
        """Run the U-Net on `noisy` (n, C, h, w) at `t` under the states of n prompts or of one.

        `hidden_states` is (n or 1, tokens, width), or what `encode_conditions` returns: U-Nets of
        XL need the pooled states too, and are told that the image is whole and not resized. Raises
        `PipelineError` when pooled states are missing.
        """
        alpha, sigma = self.rates(t, noisy)
        states = PromptStates.of(hidden_states).expand(len(noisy))
        raw = self.unet(
            noisy,
            _expand(t, noisy),
            states.hidden_states,
            return_dict=False,
            **self._added_conditions(noisy, states),
        )[0]
        return Prediction(noisy, alpha, sigma, raw, self.prediction_type)

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the raw output should equal: noise, velocity or `clean`, (n, C, h, w)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return clean
        alpha, sigma = self.rates(t, clean)
        return alpha * noise - sigma * clean

    def _added_conditions(self, noisy: Tensor, states: PromptStates) -> dict[str, Any]:
        """Return the further arguments of XL's U-Nets: pooled states, original and target size."""
        config = getattr(self.unet, "config", None)
        if getattr(config, "addition_embed_type", None) != "text_time":
            return {}
        if states.pooled is None:
            raise PipelineError(
                "the U-Net of Stable Diffusion XL reads pooled states beside the hidden states: "
                "give what encode_conditions(pipe, prompts) returns, not a tensor"
            )
        height, width = (side * self.vae_scale_factor for side in noisy.shape[-2:])
        time_ids = states.hidden_states.new_tensor([height, width, 0, 0, height, width])
        time_ids = time_ids.expand(len(noisy), -1)
        return {"added_cond_kwargs": {"text_embeds": states.pooled, "time_ids": time_ids}}


def classifier_free(uncond: Prediction, cond: Prediction, scale: float) -> Prediction:
    """Return uncond + scale (cond - uncond), classifier-free guidance (arXiv 2207.12598).

    Both must be predictions for the same noisy latents. The combination is the same whichever of
    the three forms it is taken in.
    """
    return replace(cond, raw=uncond.raw + scale * (cond.raw - uncond.raw))


def _expand(t: Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(t, device=like.device).reshape(-1).expand(len(like))


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    known = denominator != 0
    quotient = numerator / torch.where(known, denominator, 1)
    return torch.where(known, quotient, 0)
