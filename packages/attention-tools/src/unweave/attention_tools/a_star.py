"""A-STAR: concepts of a prompt kept apart in attention, and kept once they are there.

Agarwal et al., "A-STAR: Test-time Attention Segregation and Retention for Text-to-image
Synthesis", ICCV 2023, arXiv 2306.14544. No code was published: what the paper leaves open follows
Attend-and-Excite, its closest sibling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from unweave.attention_tools.capture import capture_attention
from unweave.attention_tools.errors import GuidanceError, MapError
from unweave.attention_tools.guidance import DenoisingStep, guide_latents
from unweave.attention_tools.latent_update import (
    ConceptMaps,
    ConceptReader,
    LatentUpdate,
    Preprocess,
    find_resolution,
    step_sizes,
)
from unweave.attention_tools.maps import AttentionMaps
from unweave.attention_tools.masks import to_mask
from unweave.attention_tools.overlap import min_sum_ratio
from unweave.attention_tools.tokens import Concepts, TokenSpans, find_concepts

Masks = Tensor | Sequence[Tensor]
"""Masks (concepts, H, W) for all images alike, (n, concepts, H, W), or one tensor an image."""


@dataclass(frozen=True)
class AStarConfig:
    """Settings of `AStar`; the defaults are the paper's, and where it has none its sibling's."""

    w_seg: float = 1.0
    """Weight of the segregation loss (equation 4)."""

    w_ret: float = 1.0
    """Weight of the retention loss (equation 4)."""

    alpha: float = 20.0
    """Step size of the first step; not given in the paper."""

    alpha_range: tuple[float, float] = (1.0, 0.5)
    """What `alpha` times the square root of falls from and to over all steps."""

    max_iter_to_alter: int | None = None
    """How many steps are altered, counted from the first; None is all, as stopping early loses
    concepts again (figure 11e)."""

    resolution: int | tuple[int, int] | None = None
    """Positions of the maps; None is a quarter of the latents a side: 16 for 512 pixels."""

    preprocess: Preprocess = "aae"
    """"aae": maps after a softmax over the prompt's tokens, and a blur; "raw": probabilities."""

    normalize: bool | None = None
    """Whether each map is divided by its maximum; None is only for `preprocess="raw"`."""

    sigma: float = 0.5
    """Standard deviation of the blur in positions."""

    binarize: Literal["relative", "otsu", "mean"] = "relative"
    """What is a region of high activation: where a map reaches `threshold` of its maximum, its
    Otsu threshold, or its mean."""

    threshold: float = 0.5
    """The share of the maximum, for `binarize="relative"`."""

    mask_from: Literal["pre", "post"] = "post"
    """Whether masks come from the maps before the update, or from those of the guided pass."""

    def __post_init__(self) -> None:
        _one_of("preprocess", self.preprocess, ("aae", "raw"))
        _one_of("binarize", self.binarize, ("relative", "otsu", "mean"))
        _one_of("mask_from", self.mask_from, ("pre", "post"))
        if not 0 < self.threshold <= 1:
            raise GuidanceError(f"`threshold` must be in (0, 1], got {self.threshold}")
        if self.max_iter_to_alter is not None and self.max_iter_to_alter < 1:
            raise GuidanceError(
                f"`max_iter_to_alter` must be at least 1, got {self.max_iter_to_alter}"
            )


@dataclass(frozen=True)
class AStarStep:
    """What was seen at one step, before its update."""

    loss_seg: Tensor
    """Segregation loss (n,)."""

    loss_ret: Tensor
    """Retention loss (n,); 0 where there are no masks yet."""

    maps: Tensor = field(repr=False)
    """Maps of the concepts (n, concepts, h, w)."""

    masks: Tensor | None = field(repr=False)
    """What the retention loss held them to: boolean, of the same shape."""


class AStar:
    """Runs a pipeline so that its concepts stay apart, stay there, or stay where masks say.

    After a call, `record` has one `AStarStep` a step that was altered.
    """

    def __init__(self, pipe: Any, config: AStarConfig | None = None) -> None:
        self.pipe, self.config = pipe, config or AStarConfig()
        self.record: list[AStarStep] = []

    def __call__(
        self,
        prompt: str | Sequence[str],
        concepts: Concepts,
        masks: Masks | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return what the pipeline returns for `prompt` and its other arguments.

        `concepts` are words of the prompt, or for several prompts one list of words each. `masks`
        say where they should be: one of any size a concept, in that order, scaled to the maps.

        Raises `TokenError` for words that are not there or share a token, `MapError` for masks
        that do not fit or are empty, and `GuidanceError` when the denoiser has no cross-attention
        of the resolution.
        """
        config, pipe = self.config, self.pipe
        spans = find_concepts(pipe, prompt, concepts, kwargs.get("num_images_per_prompt") or 1)
        size = (kwargs.get(name) for name in ("height", "width", "latents"))
        resolution = find_resolution(pipe, config.resolution, *size)
        normalize = config.preprocess == "raw" if config.normalize is None else config.normalize
        maps = ConceptMaps(spans, config.preprocess, normalize, config.sigma)
        reader = ConceptReader(pipe, maps, resolution)
        fixed = None if masks is None else fit_masks(masks, spans, resolution)
        run = _Run(config, reader, fixed)
        self.record = run.record
        altered = None if config.max_iter_to_alter is None else range(config.max_iter_to_alter)
        with guide_latents(pipe, run.update, steps=altered):
            if fixed is not None or config.mask_from == "pre" or not config.w_ret:
                return pipe(prompt, **kwargs)
            with capture_attention(
                pipe, tokens=maps.columns, resolution=resolution, steps=altered
            ) as run.guided:
                return pipe(prompt, **kwargs)


class _Run:
    """One call of `AStar`: the masks, which change from step to step."""

    def __init__(self, config: AStarConfig, reader: ConceptReader, masks: Tensor | None) -> None:
        self.config, self.reader, self.masks = config, reader, masks
        self.fixed = masks is not None
        self.guided: AttentionMaps | None = None
        self.record: list[AStarStep] = []
        self.descend = LatentUpdate(
            reader,
            {
                "seg": (config.w_seg, attention_segregation_loss),
                "ret": (config.w_ret, self.retention),
            },
            step_sizes(config.alpha, config.alpha_range),
        )

    def update(self, step: DenoisingStep) -> Tensor:
        """Return the updated latents; the masks are those of the step before."""
        if not self.fixed:
            self.masks = self.earlier_masks()
        latents = self.descend(step)
        seen = self.descend.record[-1]
        self.record.append(AStarStep(seen.losses["seg"], seen.losses["ret"], seen.maps, self.masks))
        return latents

    def earlier_masks(self) -> Tensor | None:
        if not self.record or not self.config.w_ret:
            return None
        if self.guided is None:
            return binarize(self.record[-1].maps, self.config)
        maps = self.reader.of(self.guided)
        self.guided.values.clear()
        self.guided.counts.clear()
        return binarize(maps, self.config)

    def retention(self, maps: Tensor) -> Tensor:
        if self.masks is None:
            return maps.new_zeros(maps.shape[0])
        return attention_retention_loss(maps, self.masks.to(maps.device))


def attention_segregation_loss(maps: Tensor) -> Tensor:
    """Return L_seg (n,) of maps (n, concepts, h, w): the overlap summed over pairs (equation 2).

    Sum over pairs of sum min(A_m, A_n) / sum (A_m + A_n): each is from 0, apart, to 0.5, equal.

    >>> attention_segregation_loss(torch.ones(1, 3, 4, 4))
    tensor([1.5000])
    """
    first, second = torch.triu_indices(maps.shape[1], maps.shape[1], 1, device=maps.device)
    return min_sum_ratio(maps[:, first], maps[:, second]).sum(1)


def attention_retention_loss(maps: Tensor, masks: Tensor) -> Tensor:
    """Return L_ret (n,) of maps and boolean masks (n, concepts, h, w) (equation 3).

    Sum over concepts of 1 - sum min(A, B) / sum (A + B): each is from 0.5, equal, to 1, apart. A
    mask without any position has nothing to retain and does not count.

    >>> masks = torch.tensor([[[[True, False]]]])
    >>> attention_retention_loss(masks.float(), masks)
    tensor([0.5000])
    """
    masks = masks.detach()
    lost = 1 - min_sum_ratio(maps, masks.to(maps))
    return torch.where(masks.flatten(2).any(2), lost, torch.zeros_like(lost)).sum(1)


def binarize(maps: Tensor, config: AStarConfig) -> Tensor:
    """Return the regions of high activation of maps: booleans, which pass no gradient."""
    share = config.threshold if config.binarize == "relative" else None
    return to_mask(maps, config.binarize, share)


def fit_masks(masks: Masks, spans: Sequence[TokenSpans], resolution: tuple[int, int]) -> Tensor:
    """Return a user's masks as booleans (n, concepts, h, w): resized by area, cut at 0.5.

    Raises `MapError` for masks that are not one for each concept of each image, or of which nothing
    is left at the resolution.
    """
    images = len(spans)
    if isinstance(masks, Tensor):
        own = list(masks) if masks.dim() == 4 else [masks] * images
    else:
        own = list(masks)
    if len(own) != images:
        raise MapError(f"`masks` must be for {images} images, got {len(own)}")
    fitted = torch.zeros(images, max(map(len, spans)), *resolution, dtype=torch.bool)
    for image, (one, words) in enumerate(zip(own, spans, strict=True)):
        one = torch.as_tensor(one)
        if one.dim() != 3 or one.shape[0] != len(words) or not one.numel():
            raise MapError(
                f"`masks` must be ({len(words)}, H, W), one for each of {list(words.words)}, got "
                f"{tuple(one.shape)}"
            )
        small = interpolate(one[None].float(), resolution, mode="area")[0] >= 0.5
        for word, mask in zip(words.words, small, strict=True):
            if not mask.any():
                raise MapError(
                    f"the mask of {word!r} is empty at {resolution[0]}x{resolution[1]} positions: "
                    "draw it larger"
                )
        fitted[image, : len(words)] = small
    return fitted


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise GuidanceError(f"`{name}` must be one of {known}, got {value!r}")
