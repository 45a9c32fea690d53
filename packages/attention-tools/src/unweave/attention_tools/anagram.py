"""Anagram-MTL: one image that reads as another prompt under each view (arXiv 2412.02693).

Denoises all views at once, as visual anagrams do (Geng et al. 2024, arXiv 2311.17919), and treats
them as tasks: the weaker one weighs more, the mixed noise keeps its variance, and attention maps
of the concepts are drawn over one another. "The paper" is what its published code does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from unweave.attention_tools.errors import AttentionError
from unweave.attention_tools.mixing import Correlation
from unweave.attention_tools.multiview import (
    AnyScorer,
    MultiViewDenoiser,
    decoded,
    device_of,
    drawn_noise,
    encoded,
    require,
    seeds_of,
)
from unweave.attention_tools.segregation import concept_reader, last_word
from unweave.attention_tools.tokens import Word
from unweave.attention_tools.views import View, get_view


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

    @classmethod
    def of(cls, decoded: Tensor, views: tuple[View, ...], record: dict[str, Any]) -> Anagram:
        """Return the anagram of images (n, 3, H, W) about [-1, 1], which the views must fit."""
        pixels = (decoded / 2 + 0.5).clamp(0, 1).float()
        for view in views:
            view.check(*pixels.shape[1:])
        return cls(pixels, views, record)

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
        scorer: AnyScorer | None = None,
    ) -> None:
        require(pipe, config, scorer)
        if hasattr(pipe, "image_noising_scheduler") or hasattr(pipe, "low_res_scheduler"):
            raise AttentionError(
                f"{type(pipe).__name__} starts from a smaller image: make that with `AnagramMTL` "
                "and a pipeline such as IFPipeline, and give it to `AnagramUpscaler`"
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
        pipe, config = self.pipe, self.config
        chosen = tuple(get_view(view) for view in views)
        pipe.scheduler.set_timesteps(num_inference_steps, device=device_of(pipe))
        x = self._noise(num_images, generator)
        for view in chosen:
            view.check(*x.shape[1:])
        guidance = guidance_scale if guidance_scale > 1 else None
        text = encoded(pipe, prompts, guidance is not None)
        named = list(concepts) if concepts is not None else [last_word(one) for one in prompts]
        reader = None
        if config.anti_segregation and len(chosen) > 1:
            side = config.map_resolution
            grid = (x.shape[2] // 2, x.shape[3] // 2) if side is None else (side, side)
            reader = concept_reader(pipe, prompts, named, grid)
        denoiser = MultiViewDenoiser(
            pipe, config, self.scorer, chosen, prompts, text, guidance, reader=reader
        )
        x, steps = denoiser(x, generator)
        record = {
            "prompts": list(prompts),
            "views": [view.name for view in chosen],
            "concepts": [one if isinstance(one, str) else list(one) for one in named],
            "config": asdict(config),
            "seeds": seeds_of(generator),
            "steps": steps,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
        }
        return Anagram.of(decoded(pipe, x), chosen, record)

    def _noise(self, count: int, generator: Any) -> Tensor:
        unet = self.pipe.unet
        size = unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (count, unet.config.in_channels, height, width)
        noise = drawn_noise(self.pipe, shape, generator)
        return torch.as_tensor(noise * self.pipe.scheduler.init_noise_sigma)


def _picture(pixels: Tensor) -> Any:
    from PIL import Image

    array = (pixels * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
