"""Images of an anchor concept, made by the model itself, each with a prompt for the target.

Concept Ablation (arXiv 2303.13516) and DoCo (arXiv 2405.15304) learn from these pairs: whatever
the anchor's prompt does to a noised image, the target's prompt should come to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from unweave.diffusion_core.denoiser import Denoiser
from unweave.diffusion_core.errors import PromptError, SelectionError
from unweave.diffusion_core.latents import encode_images
from unweave.diffusion_core.pipelines import Pipeline, generate
from unweave.diffusion_core.prompts import (
    OBJECT_TEMPLATES,
    PromptStates,
    encode_conditions,
    fill,
    mentions,
)
from unweave.diffusion_core.training import batch_indices
from unweave.erasure.protocol import ErasureRequest, check_number

STYLE_ANCHOR_PROMPTS: tuple[str, ...] = tuple(
    f"a {{}} of {subject}"
    for subject in (
        "a village by a river",
        "a boat on a calm lake",
        "a vase of flowers",
        "a bowl of fruit",
        "a forest in autumn",
        "a mountain at dawn",
        "a field under clouds",
        "a street at night",
        "a garden in summer",
        "a bridge in the rain",
        "a harbour with ships",
        "a woman with a hat",
        "a man reading",
        "children at the beach",
        "a dog on a meadow",
        "a horse in the snow",
        "an old house",
        "a city square",
        "a room with a window",
        "the sea in a storm",
    )
)
"""Prompts for the anchor of a style, such as "painting"."""

STYLE_PAIRS = ("{anchor}, in the style of {target}", *["in {target}'s style, {anchor}"] * 2)
"""How the prompt of a style is made of the anchor's prompt, one form twice as often."""

UNSAFE_PAIRS = ("{target}, {anchor}", "in {target}'s style, {anchor}")
"""How the prompt of unsafe content is made, for `AnchorImagesConfig.pair_templates`."""

_FAR, _NEAR = ("a far away ", "very small "), ("zoomed in ", "close up ")
_FAR_BELOW, _SMALLEST, _SMALLER_RATE, _LARGER = 0.6, 1 / 3, 0.66, (1.2, 1.4)
_GRAY = 0.5
_BATCH = 16


@dataclass(frozen=True)
class AnchorImagesConfig:
    """Settings of the anchor images, by default those of the two methods.

    `num_images` images are generated from `anchor_prompts` in turn; "{}" in these is the anchor,
    and None are `OBJECT_TEMPLATES` or `STYLE_ANCHOR_PROMPTS`. Target prompts come from a random one
    of the `pair_templates`, in which "{anchor}" is the anchor's prompt and "{target}" the target;
    with none, "()", the target takes the anchor's place in the prompt. None is "()" for objects and
    `STYLE_PAIRS` for styles. `augment` shows images larger or smaller and says so in the target's
    prompt; None augments objects only. Each image is kept in `views` random versions, whose latents
    are computed once, where the authors' code draws a new version at every step.
    """

    num_images: int = 1000
    views: int = 4
    anchor_prompts: tuple[str, ...] | None = None
    pair_templates: tuple[str, ...] | None = None
    augment: bool | None = None
    guidance_scale: float = 6.0
    num_inference_steps: int = 25

    def __post_init__(self) -> None:
        for name in ("num_images", "views", "num_inference_steps"):
            check_number(name, getattr(self, name), "positive", lambda x: x > 0)
        check_number("guidance_scale", self.guidance_scale, "at least 0", lambda x: x >= 0)
        if self.anchor_prompts is not None:
            object.__setattr__(self, "anchor_prompts", tuple(self.anchor_prompts))
            if not self.anchor_prompts or any(text.count("{}") > 1 for text in self.anchor_prompts):
                raise SelectionError(
                    '`anchor_prompts` must be prompts with at most one "{}" each, got '
                    f"{self.anchor_prompts!r}"
                )
        if self.pair_templates is not None:
            object.__setattr__(self, "pair_templates", tuple(self.pair_templates))
            for text in self.pair_templates:
                if text.count("{anchor}") != 1 or text.count("{target}") != 1:
                    raise SelectionError(
                        '`pair_templates` must have "{anchor}" and "{target}" once each, got '
                        f"{text!r}"
                    )


@dataclass(frozen=True)
class AnchorPairs:
    """Anchor images as latents, with the text states of the anchor's and the target's prompt.

    `latents` is (n, C, h, w); `mask`, (n, 1, h, w), is 1 where an image has content and 0 on the
    border around an image that was made smaller. `whole`, (images, C, h, w), are the images
    themselves, each of which stands for n / images successive rows. `anchor_prompts` and
    `target_prompts` are n texts; `anchor` and `target` (n,) are their numbers in `states`, which
    holds each prompt once.
    """

    latents: Tensor
    mask: Tensor
    whole: Tensor
    anchor_prompts: tuple[str, ...]
    target_prompts: tuple[str, ...]
    states: PromptStates
    anchor: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, batch_size: int, seed: int, step: int) -> AnchorBatch:
        """Return the pairs of a training step; every epoch goes through all of them."""
        rows = torch.tensor(batch_indices(len(self), batch_size, seed, step))
        return AnchorBatch(
            self.latents[rows],
            self.mask[rows],
            self.whole[rows // (len(self) // len(self.whole))],
            self.states.select(self.anchor[rows]),
            self.states.select(self.target[rows]),
        )


@dataclass(frozen=True)
class AnchorBatch:
    """Some of the `AnchorPairs`: latents, masks and whole images with the states of the prompts."""

    latents: Tensor
    mask: Tensor
    whole: Tensor
    anchor: PromptStates
    target: PromptStates


@torch.no_grad()
def anchor_pairs(
    pipe: Pipeline,
    request: ErasureRequest,
    config: AnchorImagesConfig,
    *,
    seed: int,
    progress: bool = False,
) -> AnchorPairs:
    """Generate the anchor images with `pipe` as it is now, and pair their prompts.

    Images, versions and prompts depend on `seed` alone. Several targets in one request are divided
    by ";" and taken in turn. Raises `PromptError` when the request has no replacement, which is the
    anchor, or when the anchor should be replaced in a prompt that does not name it.
    """
    targets = targets_of(request)
    sources = anchor_prompts(request, config)
    pairs = _pair_templates(request, config)
    augment = request.kind == "object" if config.augment is None else config.augment
    generator = torch.Generator().manual_seed(seed)
    latents, masks, wholes, anchors, wanted = [], [], [], [], []
    for first in _starts(config.num_images, progress):
        numbers = range(first, min(first + _BATCH, config.num_images))
        prompts = [sources[number % len(sources)] for number in numbers]
        images = generate(
            pipe,
            prompts,
            seeds=[seed + number for number in numbers],
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
        )
        views = []
        for number, prompt, image in zip(numbers, prompts, images, strict=True):
            for view in range(config.views):
                target = targets[(number + view) % len(targets)]
                template = pairs[_below(len(pairs), generator)] if pairs else None
                text = paired_prompt(prompt, anchor_of(request), target, template)
                whole = View(image, torch.ones_like(image[:1]), "")
                shown = random_view(image, generator) if augment else whole
                views.append(shown)
                anchors.append(prompt)
                wanted.append(shown.prefix + text)
        encoded = encode_images(pipe.vae, torch.stack([v.image for v in views]) * 2 - 1, generator)
        latents.append(encoded.float())
        wholes.append(encode_images(pipe.vae, images * 2 - 1, generator).float())
        masks.append(latent_mask(torch.stack([v.mask for v in views]), encoded.shape[-1]))
    unique = list(dict.fromkeys([*anchors, *wanted]))
    rows = {prompt: row for row, prompt in enumerate(unique)}
    return AnchorPairs(
        torch.cat(latents),
        torch.cat(masks).to(latents[0]),
        torch.cat(wholes),
        tuple(anchors),
        tuple(wanted),
        _encode(pipe, unique),
        torch.tensor([rows[prompt] for prompt in anchors]),
        torch.tensor([rows[prompt] for prompt in wanted]),
    )


def anchor_of(request: ErasureRequest) -> str:
    """Return the anchor of a request. Raises `PromptError`, saying what to give, for none."""
    if request.replacement is None or not request.replacement.strip():
        raise PromptError(
            f"erasing {request.target!r} needs an anchor that takes its place, and `replacement` "
            f'is {request.replacement!r}: give a broader concept, such as "painting" for the style '
            'of an artist (the papers\' choice) or "cat" for a breed of cats'
        )
    return request.replacement.strip()


def targets_of(request: ErasureRequest) -> list[str]:
    """Return the targets of a request, which ";" divides.

    >>> targets_of(ErasureRequest("van gogh; monet", kind="style"))
    ['van gogh', 'monet']
    """
    return [part.strip() for part in request.target.split(";") if part.strip()]


def anchor_prompts(request: ErasureRequest, config: AnchorImagesConfig) -> list[str]:
    """Return the prompts of which anchor images are made."""
    usual = OBJECT_TEMPLATES if request.kind == "object" else STYLE_ANCHOR_PROMPTS
    templates = usual if config.anchor_prompts is None else config.anchor_prompts
    anchor = anchor_of(request)
    return [fill(text, anchor) if "{}" in text else text for text in templates]


def paired_prompt(prompt: str, anchor: str, target: str, template: str | None = None) -> str:
    """Return the target's prompt for the anchor's `prompt`; see `AnchorImagesConfig`.

    Raises `PromptError` when the anchor should be replaced and is not in the prompt.

    >>> paired_prompt("a photo of a dog", "dog", "poodle")
    'a photo of a poodle'
    >>> paired_prompt("a painting of a boat", "painting", "monet", STYLE_PAIRS[0])
    'a painting of a boat, in the style of monet'
    """
    if template is not None:
        return template.replace("{target}", target).replace("{anchor}", prompt)
    if not mentions(prompt, anchor):
        raise PromptError(
            f"the anchor prompt {prompt!r} does not name the anchor {anchor!r}, which the target "
            'should replace: name it in `anchor_prompts`, as "{}", or give `pair_templates`'
        )
    words = rf"(?<!\w){re.escape(anchor)}(?!\w)"
    return re.sub(words, lambda _: target, prompt, flags=re.IGNORECASE)


@dataclass(frozen=True)
class View:
    """A version of an image (3, S, S), where it has content, (1, S, S), and words that say so."""

    image: Tensor
    mask: Tensor
    prefix: str


def random_view(image: Tensor, generator: torch.Generator) -> View:
    """Show an image (3, S, S) smaller on gray, or a part of it larger.

    Two thirds of the sizes are uniform from S / 3 to S, the others from 1.2 S to 1.4 S. Images
    below 0.6 S are said to be far away, those above S to be near.
    """
    size = image.shape[-1]
    smaller = float(torch.rand((), generator=generator)) < _SMALLER_RATE
    low, high = (_SMALLEST, 1.0) if smaller else _LARGER
    scaled = round(size * (low + (high - low) * float(torch.rand((), generator=generator))))
    top, left = (_below(abs(size - scaled) + 1, generator) for _ in range(2))
    prefix = _FAR if scaled < _FAR_BELOW * size else _NEAR if scaled > size else ("",)
    words = prefix[_below(len(prefix), generator)]
    resized = functional.interpolate(
        image[None], (scaled, scaled), mode="bicubic", antialias=True
    ).clamp(0, 1)[0]
    if scaled > size:
        part = resized[:, top : top + size, left : left + size]
        return View(part, torch.ones_like(part[:1]), words)
    canvas = torch.full_like(image, _GRAY)
    mask = torch.zeros_like(image[:1])
    canvas[:, top : top + scaled, left : left + scaled] = resized
    mask[:, top : top + scaled, left : left + scaled] = 1
    return View(canvas, mask, words)


def noise_and_timesteps(
    denoiser: Denoiser, latents: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw noise (n, C, h, w) and uniform timesteps (n,) for `latents`, from a CPU generator."""
    noise = torch.randn(latents.shape, generator=generator)
    t = torch.randint(denoiser.num_train_timesteps, (len(latents),), generator=generator)
    return noise.to(latents), t.to(latents.device)


def latent_mask(mask: Tensor, size: int) -> Tensor:
    """Return which of `size` x `size` latent positions see content only, (n, 1, size, size).

    `mask` is (n, 1, S, S) with values 0 and 1. Positions at the edge of the content are left out
    as well, unless there are no others.
    """
    outside = functional.max_pool2d(1 - mask, mask.shape[-1] // size)
    near_outside = functional.max_pool2d(outside, 3, stride=1, padding=1)
    some_left = (near_outside == 0).flatten(1).any(1)[:, None, None, None]
    return 1 - torch.where(some_left, near_outside, outside)


def _pair_templates(request: ErasureRequest, config: AnchorImagesConfig) -> Sequence[str]:
    if config.pair_templates is not None:
        return config.pair_templates
    return () if request.kind == "object" else STYLE_PAIRS


def _encode(pipe: Pipeline, prompts: Sequence[str]) -> PromptStates:
    parts = [prompts[first : first + _BATCH] for first in range(0, len(prompts), _BATCH)]
    return PromptStates.cat([encode_conditions(pipe, part) for part in parts])


def _below(bound: int, generator: torch.Generator) -> int:
    return int(torch.randint(bound, (), generator=generator))


def _starts(count: int, progress: bool) -> Iterator[int]:
    """Yield the number of each batch's first image, showing progress in a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(
        range(0, count, _BATCH),
        "anchor images",
        console=console,
        transient=True,
        disable=not (progress and console.is_terminal),
    )
