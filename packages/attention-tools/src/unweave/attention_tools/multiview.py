"""The denoising loop of visual anagrams: one x, of which each view follows its own prompt.

All stages use it, with or without the smaller image that super-resolution starts from. Mean over
views: Geng et al. 2024, arXiv 2311.17919; as multi-task learning: arXiv 2412.02693.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unweave.attention_tools.capture import MapReader
from unweave.attention_tools.errors import AttentionError, GuidanceError
from unweave.attention_tools.guidance import frozen
from unweave.attention_tools.mixing import balancing_weights, rectifying_scale
from unweave.attention_tools.predictions import predicted_image, predicted_noise, scaled_noise
from unweave.attention_tools.scores import Scorer
from unweave.attention_tools.segregation import anti_segregation_loss, concept_maps, desegregated
from unweave.attention_tools.views import View

if TYPE_CHECKING:
    from unweave.attention_tools.anagram import AnagramConfig

AnyScorer = Scorer | Callable[[Tensor, float, Sequence[str]], Tensor]


@dataclass(frozen=True)
class Condition:
    """What a super-resolution U-Net reads beside x."""

    image: Tensor
    """The smaller image at the size of x, (n, C', H, W), with noise of `noise_level`."""

    noise_level: Tensor
    """The step of the noising scheduler for each image, (n,), the U-Net's class label."""


@dataclass(frozen=True)
class MultiViewDenoiser:
    """Denoises x for T views at once, with a pipeline's U-Net and scheduler."""

    pipe: Any
    config: AnagramConfig
    scorer: AnyScorer | None
    views: tuple[View, ...]
    prompts: Sequence[str]

    text: Tensor
    """Embeddings (T, L, D), under guidance (2 T, L, D) after those of the empty prompt."""

    guidance: float | None = None
    condition: Condition | None = None

    reader: MapReader | None = None
    """Of the concepts' attention maps; None is without anti-segregation."""

    def __call__(self, x: Tensor, generator: Any) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return x (n, C, H, W) denoised by the scheduler's timesteps, and notes on each step.

        Raises `GuidanceError` when x is not finite.
        """
        scheduler, notes = self.pipe.scheduler, []
        timesteps, extra = scheduler.timesteps, _step_arguments(scheduler, generator)
        last = min(round(self.config.segregation_share * len(timesteps)), len(timesteps) - 1)
        for index, t in enumerate(timesteps):
            output, note = self.mixed(x, index)
            x = scheduler.step(output, t, x, **extra, return_dict=False)[0]
            if self.reader is not None and index < last:
                x, note["L"] = self._desegregated(x, timesteps[index + 1], self.reader)
            if not x.isfinite().all():
                raise GuidanceError(
                    f"the latents are not finite after step {index}: lower `guidance_scale` or "
                    "`lr`, or use float32"
                )
            notes.append({"t": float(t)} | {key: _numbers(value) for key, value in note.items()})
        return x, notes

    def mixed(self, x: Tensor, index: int) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Return what the scheduler gets in the place of a U-Net's output, and notes on it."""
        scheduler, count = self.pipe.scheduler, len(self.pipe.scheduler.timesteps)
        t, scale = scheduler.timesteps[index], None
        scaled = scheduler.scale_model_input(x, t)
        seen = self._seen(scaled)
        output, variance = self._predict(seen, t)
        scores = self._scores(seen, output, t)
        alpha = self._weights(scores, index, count, seen)
        pairs = zip(self.views, output, strict=True)
        output = torch.stack([view.inverse_view(own) for view, own in pairs])
        mixed = torch.einsum("nt,tnchw->nchw", alpha, output)
        if self.config.rectification is not None:
            noise = self._at(t, predicted_noise, scaled, output)
            scale = rectifying_scale(noise.transpose(0, 1), alpha, self.config.rectification)
            mixed = self._at(t, scaled_noise, scaled, mixed, scale)
        if variance is not None:
            pairs = zip(self.views, variance, strict=True)
            variance = torch.stack([view.inverse_map(own) for view, own in pairs])
            mixed = torch.cat([mixed, torch.einsum("nt,tnchw->nchw", alpha, variance)], dim=1)
        done = None if scores is None else scores.diagonal(dim1=1, dim2=2)
        return mixed, {"s": done, "alpha": alpha, "c": scale, "L": None}

    def _seen(self, images: Tensor) -> Tensor:
        return torch.stack([view.view(images) for view in self.views])

    def _predict(self, seen: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return guided outputs (T, n, C, H, W) over the views, and variances if the model has."""
        tasks, count, channels = seen.shape[:3]
        copies = 1 if self.guidance is None else 2
        given, labels = seen, {}
        if self.condition is not None:
            given = torch.cat([seen, self._seen(self.condition.image)], dim=2)
            labels = {"class_labels": self.condition.noise_level.repeat(copies * tasks)}
        output = self.pipe.unet(
            given.flatten(0, 1).repeat(copies, 1, 1, 1),
            t,
            encoder_hidden_states=self.text.repeat_interleave(count, 0),
            **labels,
            return_dict=False,
        )[0]
        mean, rest = output[:, :channels], output[:, channels:]
        if self.guidance is not None:
            without, with_prompt = mean.chunk(2)
            mean = without + self.guidance * (with_prompt - without)
            rest = rest[rest.shape[0] // 2 :]
        learned = getattr(self.pipe.scheduler.config, "variance_type", None)
        uses = rest.shape[1] > 0 and learned in ("learned", "learned_range")
        return mean.unflatten(0, (tasks, count)), (
            rest.unflatten(0, (tasks, count)) if uses else None
        )

    def _scores(self, seen: Tensor, output: Tensor, t: Tensor) -> Tensor | None:
        """Return cosines (n, T, T) of views and prompts, where they are wanted."""
        if not self.config.balancing or len(self.prompts) == 1:
            return None
        assert self.scorer is not None
        shown = seen
        if self.config.score_on == "predicted":
            clean = self._at(t, predicted_image, seen, output)
            shown = decoded(self.pipe, clean.flatten(0, 1)).clamp(-1, 1)
            shown = shown.unflatten(0, seen.shape[:2])
        scores = torch.stack(
            [torch.as_tensor(self.scorer(own, float(t), self.prompts)) for own in shown.unbind(1)]
        )
        tasks = len(self.prompts)
        if scores.shape[1:] != (tasks, tasks) or not scores.isfinite().all():
            raise AttentionError(
                f"the scorer must give finite cosines ({tasks}, {tasks}) of views "
                f"and prompts, got {tuple(scores.shape[1:])}"
            )
        return scores

    def _weights(self, scores: Tensor | None, index: int, count: int, seen: Tensor) -> Tensor:
        """Return the weights (n, T) of the views."""
        if scores is None:
            return seen.new_full((seen.shape[1], seen.shape[0]), 1 / seen.shape[0])
        done = scores.diagonal(dim1=1, dim2=2)
        return balancing_weights(done, index, count, self.config.smallest_score).to(seen)

    def _at(self, t: Tensor, formula: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Return a formula of tensors with the prediction type and the signal and noise at `t`."""
        scheduler = self.pipe.scheduler
        kind = getattr(scheduler.config, "prediction_type", "epsilon")
        known = getattr(scheduler, "alphas_cumprod", None)
        if known is None or kind not in ("epsilon", "v_prediction", "sample"):
            raise AttentionError(
                f"{type(scheduler).__name__} has no `alphas_cumprod`, or its prediction type "
                f"{kind!r} is not known; use a scheduler such as DDPMScheduler or DDIMScheduler"
            )
        share = float(known[round(float(t))])
        return formula(*tensors, share**0.5, (1 - share) ** 0.5, kind)

    def _desegregated(self, x: Tensor, t: Tensor, reader: MapReader) -> tuple[Tensor, Tensor]:
        """Return x after the gradient steps, and the loss (n,) before the first."""
        unet, own = self.pipe.unet, self.text[-len(self.views) :]

        def loss(x: Tensor) -> Tensor:
            scaled = self.pipe.scheduler.scale_model_input(x, t)
            return anti_segregation_loss(concept_maps(unet, scaled, t, own, self.views, reader))

        with frozen(unet):
            return desegregated(x, loss, self.config.lr, self.config.inner_steps)


def require(pipe: Any, config: AnagramConfig, scorer: AnyScorer | None) -> None:
    """Raise `AttentionError` for a pipeline without the parts, or balancing without a scorer."""
    for name in ("unet", "scheduler", "encode_prompt"):
        if getattr(pipe, name, None) is None:
            raise AttentionError(
                f"{type(pipe).__name__} has no `{name}`: anagrams need a pipeline such as "
                "IFPipeline or StableDiffusionPipeline"
            )
    if config.balancing and scorer is None:
        raise AttentionError(
            "balancing needs a `scorer`, a function of views, time and prompts such as "
            "`CLIPScorer`; or set `balancing=False`"
        )


def device_of(pipe: Any) -> torch.device:
    """Return where the pipeline computes, which under offloading is not where its weights are."""
    found = getattr(pipe, "_execution_device", None)
    return torch.device(pipe.unet.device if found is None else found)


def drawn_noise(pipe: Any, shape: tuple[int, ...], generator: Any) -> Tensor:
    """Return noise (n, C, H, W) of the U-Net's type from one generator, or from one an image."""
    from diffusers.utils.torch_utils import randn_tensor

    if isinstance(generator, list) and len(generator) != shape[0]:
        raise AttentionError(
            f"`generator` must be one, or one for each of {shape[0]} images, got {len(generator)}"
        )
    return torch.as_tensor(randn_tensor(shape, generator, device_of(pipe), pipe.unet.dtype))


def encoded(pipe: Any, prompts: Sequence[str], guided: bool) -> Tensor:
    """Return the prompts' embeddings (T, L, D), under guidance (2 T, L, D) after the empty."""
    encoded = pipe.encode_prompt(
        prompt=list(prompts),
        device=device_of(pipe),
        num_images_per_prompt=1,
        do_classifier_free_guidance=guided,
    )
    if not isinstance(encoded, tuple) or len(encoded) != 2:
        raise AttentionError(
            f"`encode_prompt` of {type(pipe).__name__} gives more than embeddings with "
            "and without the prompt; such models are not supported"
        )
    return torch.cat([encoded[1], encoded[0]]) if guided else torch.as_tensor(encoded[0])


def decoded(pipe: Any, x: Tensor) -> Tensor:
    """Return images (n, 3, H, W) about [-1, 1] of latents, or of x itself without a decoder."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return x
    return torch.as_tensor(vae.decode(x / vae.config.scaling_factor, return_dict=False)[0])


def seeds_of(generator: Any) -> list[int | None]:
    """Return the seeds of one generator or a list of them, for the record."""
    used = generator if isinstance(generator, list) else [generator]
    return [None if one is None else one.initial_seed() for one in used]


def _step_arguments(scheduler: Any, generator: Any) -> dict[str, Any]:
    takes = "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": generator} if takes else {}


def _numbers(values: Tensor | None) -> Any:
    return None if values is None else values.float().cpu().tolist()
