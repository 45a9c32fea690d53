"""Anagram-MTL: one image that reads as another prompt under each view (arXiv 2412.02693).

Denoises all views at once, as visual anagrams do (Geng et al. 2024, arXiv 2311.17919), and treats
them as tasks: the weaker one weighs more, the mixed noise keeps its variance, and attention maps
of the concepts are drawn over one another. "The paper" is what its published code does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from unweave.attention_tools.capture import MapReader
from unweave.attention_tools.errors import AttentionError, GuidanceError, MapError, TokenError
from unweave.attention_tools.guidance import frozen
from unweave.attention_tools.layers import AttentionLayer
from unweave.attention_tools.overlap import min_sum_ratio
from unweave.attention_tools.predictions import predicted_image, predicted_noise, scaled_noise
from unweave.attention_tools.scores import Scorer
from unweave.attention_tools.tokens import Word, find_tokens
from unweave.attention_tools.views import View, get_view

Correlation = Literal["pearson", "raw"]
LARGEST_SCALE = 10.0
"""The most that rectification multiplies noise by; own addition for views that cancel."""


@dataclass(frozen=True)
class AnagramConfig:
    """Settings of Anagram-MTL; defaults are those of the paper's code."""

    balancing: bool = True
    """Whether the noise of views is weighted by how far each is behind, else alike."""

    rectification: Correlation | None = "pearson"
    """Which correlation the mixed noise is scaled by; "raw" is that of the paper's code, without
    centring and division by standard deviations; None leaves it."""

    anti_segregation: bool = True
    """Whether latents are moved so that the concepts' attention maps overlap."""

    score_on: Literal["predicted", "noisy"] = "predicted"
    """What the scorer gets: the predicted clean image of each view, in [-1, 1], decoded where the
    model is latent; or x as it is, which the paper gives to a CLIP that knows noise."""

    smallest_score: float = 0.01
    """Scores below count as this; own addition, for a cosine can be negative."""

    lr: float = 5.0
    """How far anti-segregation goes along the gradient."""

    inner_steps: int = 1
    """Gradient steps after each denoising step."""

    segregation_share: float = 26 / 30
    """The share of denoising steps, from the first, that anti-segregation follows."""

    map_resolution: int | None = None
    """Side of the attention maps; None is half that of x, the paper's 32 of 64."""

    def __post_init__(self) -> None:
        if self.rectification not in ("pearson", "raw", None):
            raise AttentionError(
                f'`rectification` must be "pearson", "raw" or None, got {self.rectification!r}'
            )
        if self.score_on not in ("predicted", "noisy"):
            raise AttentionError(
                f'`score_on` must be "predicted" or "noisy", got {self.score_on!r}'
            )
        if not 0 < self.smallest_score <= 1:
            raise AttentionError(f"`smallest_score` must be in (0, 1], got {self.smallest_score}")
        if self.lr < 0 or self.inner_steps < 1 or not 0 <= self.segregation_share <= 1:
            raise AttentionError(
                "`lr` must be at least 0, `inner_steps` at least 1 and `segregation_share` in "
                f"[0, 1], got {self.lr}, {self.inner_steps} and {self.segregation_share}"
            )


AVERAGING = AnagramConfig(balancing=False, rectification=None, anti_segregation=False)
"""The baseline: visual anagrams by the mean over views."""


@dataclass(frozen=True)
class Anagram:
    """Images made for views, and how they came about."""

    pixels: Tensor = field(repr=False)
    """The images (n, 3, H, W) in [0, 1]."""

    views: tuple[View, ...]

    record: dict[str, Any] = field(repr=False)
    """Prompts, views, settings and, for each step, `t` and for each image the scores `s`, the
    weights `alpha`, the scale `c` and the anti-segregation loss `L`; ready for JSON."""

    @property
    def image(self) -> Any:
        """The first image as a picture of PIL."""
        return _picture(self.pixels[0])

    @property
    def images(self) -> list[Any]:
        """All images as pictures."""
        return [_picture(one) for one in self.pixels]

    def seen(self) -> Tensor:
        """Return the views of all images, (T, n, 3, H, W), in [0, 1]."""
        shown = torch.stack([view.view(2 * self.pixels - 1) for view in self.views])
        return ((shown + 1) / 2).clamp(0, 1)

    def strip(self, index: int = 0) -> Any:
        """Return one picture of all views of an image, side by side."""
        return _picture(torch.cat(list(self.seen()[:, index]), dim=2))


class AnagramMTL:
    """Makes visual anagrams with a diffusers pipeline.

    The pipeline needs `unet`, `scheduler` and `encode_prompt`: `IFPipeline` and others whose x is
    the image, or, with a `vae`, `StableDiffusionPipeline`. Predictions may be of noise, of v or of
    the clean image, with or without learned variances. A view mixes what a U-Net says linearly, so
    models of v are guided and averaged as they are; correlations are taken of the noise that they
    imply, and the scaled noise is put in terms of v again.

    The paper uses pixel models only. A latent is not a small image: views of latents leave
    artefacts, `negate` of latents is no negative image, and views that cut finer than a latent's
    pixel do not commute with the decoder. Flips and rotations fare best.

    Args:
        pipe: the pipeline; nothing of it is changed.
        config: the settings; `AVERAGING` is the baseline.
        scorer: rates views for balancing, such as a `CLIPScorer`.

    Raises `AttentionError` for balancing without a scorer, or for a pipeline without those parts.
    """

    def __init__(
        self,
        pipe: Any,
        config: AnagramConfig = AnagramConfig(),
        *,
        scorer: Scorer | Callable[[Tensor, float, Sequence[str]], Tensor] | None = None,
    ) -> None:
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
        self.pipe, self.config, self.scorer = pipe, config, scorer

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        views: Sequence[str | View],
        *,
        concepts: Sequence[Word] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_images: int = 1,
        num_inference_steps: int = 30,
        guidance_scale: float = 10.0,
    ) -> Anagram:
        """Return images that read as prompt k under view k.

        Args:
            prompts: one for each view.
            views: names from `VIEWS`, or views; "identity" is the image itself.
            concepts: a word or phrase of each prompt, whose attention anti-segregation reads; by
                default the last words.
            generator: one, or a list with one for each image.
            num_images: how many images, made together.
            num_inference_steps: steps of the scheduler.
            guidance_scale: as in the pipeline; 1 and less is without guidance.

        Raises `AttentionError` for prompts and views of different number, `ViewError` for a view
        that does not fit the size, `TokenError` for a concept that its prompt lacks, `MapError`
        when no layer has maps of the resolution, and `GuidanceError` when x is not finite.
        """
        if isinstance(prompts, str) or not prompts or len(prompts) != len(views):
            raise AttentionError(
                f"`prompts` and `views` must be lists of one length, got {prompts!r} and {views!r}"
            )
        config, scheduler = self.config, self.pipe.scheduler
        chosen = tuple(get_view(view) for view in views)
        scheduler.set_timesteps(num_inference_steps, device=self._device)
        x = self._noise(num_images, generator)
        for view in chosen:
            view.check(*x.shape[1:])
        guidance = guidance_scale if guidance_scale > 1 else None
        text = self._text(prompts, guidance is not None)
        named = list(concepts) if concepts is not None else [last_word(one) for one in prompts]
        desegregates = config.anti_segregation and len(chosen) > 1
        reader = self._reader(prompts, named, x) if desegregates else None
        extra = _step_arguments(scheduler, generator)
        record = self._record(prompts, chosen, named, generator)
        record |= {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        timesteps = scheduler.timesteps
        last = min(round(config.segregation_share * len(timesteps)), len(timesteps) - 1)
        for index, t in enumerate(timesteps):
            output, notes = self._mixed(x, index, chosen, prompts, text, guidance)
            x = scheduler.step(output, t, x, **extra, return_dict=False)[0]
            if reader is not None and index < last:
                x, loss = self._desegregated(x, timesteps[index + 1], chosen, text, reader)
                notes["L"] = loss
            if not x.isfinite().all():
                raise GuidanceError(
                    f"the latents are not finite after step {index}: lower `guidance_scale` or "
                    "`lr`, or use float32"
                )
            record["steps"].append({"t": float(t)} | {k: _numbers(v) for k, v in notes.items()})
        pixels = (self._decoded(x) / 2 + 0.5).clamp(0, 1).float()
        for view in chosen:
            view.check(*pixels.shape[1:])
        return Anagram(pixels, chosen, record)

    def _mixed(
        self,
        x: Tensor,
        index: int,
        views: tuple[View, ...],
        prompts: Sequence[str],
        text: Tensor,
        guidance: float | None,
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Return what the scheduler gets in the place of a U-Net's output, and notes on it."""
        scheduler, count = self.pipe.scheduler, len(self.pipe.scheduler.timesteps)
        t, scale = scheduler.timesteps[index], None
        scaled = scheduler.scale_model_input(x, t)
        seen = torch.stack([view.view(scaled) for view in views])
        output, variance = self._predict(seen, t, text, guidance)
        scores = self._scores(seen, output, t, prompts)
        alpha = self._weights(scores, index, count, seen)
        pairs = zip(views, output, strict=True)
        output = torch.stack([view.inverse_view(own) for view, own in pairs])
        mixed = torch.einsum("nt,tnchw->nchw", alpha, output)
        if self.config.rectification is not None:
            noise = self._at(t, predicted_noise, scaled, output)
            scale = rectifying_scale(noise.transpose(0, 1), alpha, self.config.rectification)
            mixed = self._at(t, scaled_noise, scaled, mixed, scale)
        if variance is not None:
            pairs = zip(views, variance, strict=True)
            variance = torch.stack([view.inverse_map(own) for view, own in pairs])
            mixed = torch.cat([mixed, torch.einsum("nt,tnchw->nchw", alpha, variance)], dim=1)
        done = None if scores is None else scores.diagonal(dim1=1, dim2=2)
        return mixed, {"s": done, "alpha": alpha, "c": scale, "L": None}

    @property
    def _device(self) -> torch.device:
        found = getattr(self.pipe, "_execution_device", None)
        return torch.device(self.pipe.unet.device if found is None else found)

    def _noise(self, count: int, generator: Any) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        unet = self.pipe.unet
        size = unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (count, unet.config.in_channels, height, width)
        if isinstance(generator, list) and len(generator) != count:
            raise AttentionError(
                f"`generator` must be one, or one for each of {count} images, got {len(generator)}"
            )
        noise = randn_tensor(shape, generator, self._device, unet.dtype)
        return torch.as_tensor(noise * self.pipe.scheduler.init_noise_sigma)

    def _text(self, prompts: Sequence[str], guided: bool) -> Tensor:
        """Return the prompts' embeddings (T, L, D), under guidance (2 T, L, D) after the empty."""
        encoded = self.pipe.encode_prompt(
            prompt=list(prompts),
            device=self._device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
        )
        if not isinstance(encoded, tuple) or len(encoded) != 2:
            raise AttentionError(
                f"`encode_prompt` of {type(self.pipe).__name__} gives more than embeddings with "
                "and without the prompt; such models are not supported"
            )
        return torch.cat([encoded[1], encoded[0]]) if guided else torch.as_tensor(encoded[0])

    def _predict(
        self, seen: Tensor, t: Tensor, text: Tensor, guidance: float | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return guided outputs (T, n, C, H, W) over the views, and variances if the model has."""
        tasks, count, channels = seen.shape[:3]
        flat, context = seen.flatten(0, 1), text.repeat_interleave(count, 0)
        if guidance is not None:
            flat = torch.cat([flat, flat])
        output = self.pipe.unet(flat, t, encoder_hidden_states=context, return_dict=False)[0]
        mean, rest = output[:, :channels], output[:, channels:]
        if guidance is not None:
            without, with_prompt = mean.chunk(2)
            mean = without + guidance * (with_prompt - without)
            rest = rest[rest.shape[0] // 2 :]
        learned = getattr(self.pipe.scheduler.config, "variance_type", None)
        uses = rest.shape[1] > 0 and learned in ("learned", "learned_range")
        return mean.unflatten(0, (tasks, count)), (
            rest.unflatten(0, (tasks, count)) if uses else None
        )

    def _scores(
        self, seen: Tensor, output: Tensor, t: Tensor, prompts: Sequence[str]
    ) -> Tensor | None:
        """Return cosines (n, T, T) of views and prompts, where they are wanted."""
        if not self.config.balancing or len(prompts) == 1:
            return None
        assert self.scorer is not None
        shown = seen
        if self.config.score_on == "predicted":
            clean = self._at(t, predicted_image, seen, output)
            shown = self._decoded(clean.flatten(0, 1)).clamp(-1, 1).unflatten(0, seen.shape[:2])
        scores = torch.stack(
            [torch.as_tensor(self.scorer(own, float(t), prompts)) for own in shown.unbind(1)]
        )
        if scores.shape[1:] != (len(prompts), len(prompts)) or not scores.isfinite().all():
            raise AttentionError(
                f"the scorer must give finite cosines ({len(prompts)}, {len(prompts)}) of views "
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

    def _decoded(self, x: Tensor) -> Tensor:
        vae = getattr(self.pipe, "vae", None)
        if vae is None:
            return x
        return torch.as_tensor(vae.decode(x / vae.config.scaling_factor, return_dict=False)[0])

    def _reader(self, prompts: Sequence[str], concepts: Sequence[Word], x: Tensor) -> MapReader:
        side = self.config.map_resolution
        grid = (x.shape[2] // 2, x.shape[3] // 2) if side is None else (side, side)
        spans = concept_spans(self.pipe, prompts, concepts)
        # Halves of a batch of views can be equal, which must not be taken for guidance.
        plain = SimpleNamespace(unet=self.pipe.unet, do_classifier_free_guidance=False)
        return MapReader(plain, tokens=spans, layers=_is_outer, resolution=grid)

    def _desegregated(
        self, x: Tensor, t: Tensor, views: tuple[View, ...], text: Tensor, reader: MapReader
    ) -> tuple[Tensor, Tensor]:
        """Return x after the gradient steps, and the loss (n,) before the first."""
        own, before = text[-len(views) :], None
        with frozen(self.pipe.unet), torch.enable_grad():
            for _ in range(self.config.inner_steps):
                x = x.detach().requires_grad_()
                scaled = self.pipe.scheduler.scale_model_input(x, t)
                loss = anti_segregation_loss(
                    concept_maps(self.pipe.unet, scaled, t, own, views, reader)
                )
                (gradient,) = torch.autograd.grad(loss.sum(), x)
                x = (x - self.config.lr * gradient).detach()
                before = loss.detach() if before is None else before
        assert before is not None
        return x, before

    def _record(
        self,
        prompts: Sequence[str],
        views: tuple[View, ...],
        concepts: Sequence[Word],
        generator: Any,
    ) -> dict[str, Any]:
        used = generator if isinstance(generator, list) else [generator]
        return {
            "prompts": list(prompts),
            "views": [view.name for view in views],
            "concepts": [one if isinstance(one, str) else list(one) for one in concepts],
            "config": asdict(self.config),
            "seeds": [None if one is None else one.initial_seed() for one in used],
            "steps": [],
        }


def balancing_weights(
    scores: Tensor, index: int, count: int, smallest_score: float = 0.01
) -> Tensor:
    """Return alpha_k = s_k^-(1 + i/N) / sum_j s_j^-(1 + i/N) of scores (..., T).

    Section 3.3: the less a task is done, the more it weighs, and more sharply in later steps.

    >>> balancing_weights(torch.tensor([0.30, 0.15]), 0, 30)
    tensor([0.3333, 0.6667])
    """
    logs = scores.clamp_min(smallest_score).log()
    return (-(1 + index / count) * logs).softmax(-1)


def rectifying_scale(
    noises: Tensor, weights: Tensor, correlation: Correlation = "pearson"
) -> Tensor:
    """Return c = D^(-1/2), D = sum_jk alpha_j alpha_k rho_jk with rho_kk = 1 (section 3.4).

    `noises` are (..., T, C, H, W) and `weights` (..., T); c is (...). Multiplied by c, the
    weighted sum of noises has the variance of one of them. c is at most 10, which only noises
    that cancel reach.

    >>> rectifying_scale(torch.randn(2, 3, 64, 64), torch.tensor([0.5, 0.5])).round(decimals=1)
    tensor(1.4000)
    """
    flat = noises.flatten(-3).float()
    if correlation == "pearson":
        flat = flat - flat.mean(-1, keepdim=True)
        flat = flat / flat.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
        rho = flat @ flat.transpose(-2, -1)
    else:
        rho = flat @ flat.transpose(-2, -1) / flat.shape[-1]
    same = torch.eye(rho.shape[-1], dtype=torch.bool, device=rho.device)
    rho = torch.where(same, torch.ones_like(rho), rho)
    alpha = weights.to(rho)
    variance = (alpha[..., :, None] * alpha[..., None, :] * rho).sum((-2, -1))
    return variance.clamp_min(LARGEST_SCALE**-2).rsqrt()


def anti_segregation_loss(maps: Tensor) -> Tensor:
    """Return L, the mean over pairs of |phi_T - R_jk|, of maps (..., T, h, w) (section 3.2).

    R_jk = sum min(A_j, A_k) / sum (A_j + A_k), and phi_T = 0.5 - 0.05 (T - 1) is less than the
    overlap of equal maps, so full overlap is not forced.

    >>> anti_segregation_loss(torch.eye(2).reshape(2, 1, 2))
    tensor(0.4500)
    """
    tasks = maps.shape[-3]
    if tasks < 2:
        raise MapError(f"anti-segregation needs the maps of two views or more, got {tasks}")
    first, second = torch.triu_indices(tasks, tasks, 1).tolist()
    overlap = min_sum_ratio(maps[..., first, :, :], maps[..., second, :, :])
    return (0.5 - 0.05 * (tasks - 1) - overlap).abs().mean(-1)


def concept_maps(
    unet: Any, x: Tensor, t: Any, text: Tensor, views: Sequence[View], reader: MapReader
) -> Tensor:
    """Return the map A_k of each concept in the frame of the image, (n, T, h, w).

    `x` (n, C, H, W) is scaled for the U-Net and `text` (T, L, D) has the prompts alone. A_k is the
    mean over heads and layers, summed over the concept's tokens; the loss is the same for sums.
    """
    count, tasks = x.shape[0], len(views)
    flat = torch.cat([view.view(x) for view in views])
    context = text.repeat_interleave(count, 0)
    maps = reader(lambda: unet(flat, t, encoder_hidden_states=context, return_dict=False))
    if not maps.layers:
        raise MapError(
            f"no cross-attention of down and up blocks has maps of {reader.resolution}: set "
            "`map_resolution`, or `anti_segregation=False`"
        )
    every = maps.aggregate(reader.resolution).unflatten(0, (tasks, count))
    size = (x.shape[2], x.shape[3])
    return torch.stack(
        [view.inverse_map(every[at, :, at], size) for at, view in enumerate(views)], dim=1
    )


def concept_spans(pipe: Any, prompts: Sequence[str], concepts: Sequence[Word]) -> list[list[int]]:
    """Return the token positions of each prompt's concept, as the pipeline writes the prompt.

    Raises `TokenError` for a concept that is not in its prompt, or too few of them.
    """
    if len(concepts) != len(prompts):
        raise TokenError(f"{len(prompts)} prompts need as many `concepts`, got {list(concepts)}")
    written = getattr(pipe, "_text_preprocessing", None)
    texts = list(prompts) if written is None else written(list(prompts))
    return [
        list(find_tokens(pipe, text, [concept]).positions[0])
        for text, concept in zip(texts, concepts, strict=True)
    ]


def last_word(prompt: str) -> str:
    """Return the last word of a prompt, without punctuation around it.

    >>> last_word("an oil painting of a Red Fox.")
    'Fox'
    """
    words = [word.strip(".,;:!?\"'()[]") for word in prompt.split()]
    return next((word for word in reversed(words) if word), "")


def _is_outer(layer: AttentionLayer) -> bool:
    return layer.kind == "cross" and layer.place != "mid_block"


def _step_arguments(scheduler: Any, generator: Any) -> dict[str, Any]:
    takes = "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": generator} if takes else {}


def _numbers(values: Tensor | None) -> Any:
    return None if values is None else values.float().cpu().tolist()


def _picture(pixels: Tensor) -> Any:
    from PIL import Image

    array = (pixels * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
