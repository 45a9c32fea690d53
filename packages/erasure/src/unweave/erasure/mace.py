"""MACE (arXiv 2403.06135): refine in closed form, silence by a LoRA for each concept, fuse all.

Written from the equations of the paper. Its code has not been looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from unweave.diffusion_core.denoiser import Denoiser
from unweave.diffusion_core.errors import ImageError, SelectionError
from unweave.diffusion_core.latents import encode_images, load_images
from unweave.diffusion_core.lora import LoraLayers, add_lora
from unweave.diffusion_core.parameters import select_parameters, train_only
from unweave.diffusion_core.pipelines import Pipeline, base_model_hash, generate, text_encoders
from unweave.diffusion_core.prompts import (
    OBJECT_TEMPLATES,
    STYLE_TEMPLATES,
    PromptStates,
    encode_conditions,
    subject_token_positions,
)
from unweave.diffusion_core.training import run_training
from unweave.diffusion_core.weight_delta import DeltaMeta, WeightDelta
from unweave.erasure.fusion import Fusion, fuse, gram_of
from unweave.erasure.many import (
    ClosedFormRows,
    about,
    combined_request,
    compact,
    encode_in_batches,
    guide_of,
    kept_states,
    key_value_weights,
    written,
)
from unweave.erasure.protocol import (
    Erasure,
    ErasureRequest,
    base_name,
    check_number,
    check_pipeline,
    check_trainable,
)
from unweave.erasure.uce import UCEConfig

if TYPE_CHECKING:
    from unweave.attention_tools import AttentionMaps

Masks = Callable[[Tensor, str], Tensor]
"""Says for images (n, 3, H, W) in [0, 1] where they show a concept: a bool Tensor (n, H, W)."""

Factors = dict[str, tuple[Tensor, Tensor]]
"""Factors of one LoRA, {parameter name in the U-Net: (down (r, in), up (out, r))}."""

_TEMPLATES = {"object": OBJECT_TEMPLATES, "style": STYLE_TEMPLATES}
_MASK_TIMESTEPS = 5


@dataclass(frozen=True)
class MACEConfig:
    """Settings of MACE, by default those of the paper for objects where they are known.

    `regularisation` is lambda of the refinement; `scale_to_norm` is as in `UCEConfig`.
    `preserve_scale` weighs the states of `anchors` and of the concepts that a request preserves,
    in refinement and fusion. Each concept gets a LoRA of `rank`, trained for `num_steps` on
    `num_images` of its images, at timesteps of `timestep_density` with `density`. None for
    `templates` takes those of textual inversion for the kind of concept. `fusion_ridge` keeps the
    refined weights where no prompt says anything, relative to the mean square of the states.
    """

    regularisation: float = 1e3
    preserve_scale: float = 1.0
    scale_to_norm: bool = False
    templates: tuple[str, ...] | None = None
    anchors: tuple[str, ...] = ()
    rank: int = 1
    lr: float = 1e-5
    num_steps: int = 50
    batch_size: int = 8
    num_images: int = 8
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    density: tuple[float, float, float] = (200.0, 400.0, 0.05)
    fusion_ridge: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "anchors", tuple(self.anchors))
        object.__setattr__(self, "density", tuple(self.density))
        if self.templates is not None:
            object.__setattr__(self, "templates", tuple(self.templates))
            if not self.templates or any(text.count("{}") != 1 for text in self.templates):
                raise SelectionError(
                    f'`templates` must be texts with one "{{}}" each, got {self.templates!r}'
                )
        for name in ("regularisation", "lr", "fusion_ridge"):
            check_number(name, getattr(self, name), "positive", lambda x: x > 0)
        check_number("preserve_scale", self.preserve_scale, "at least 0", lambda x: x >= 0)
        for name in ("rank", "batch_size", "num_images", "num_inference_steps"):
            check_number(name, getattr(self, name), "at least 1", lambda x: x >= 1)
        check_number("num_steps", self.num_steps, "at least 0", lambda x: x >= 0)
        start, stop, slope = self.density
        check_number("density", slope, "(start, stop, slope) with slope > 0", lambda x: x > 0)
        check_number("density", stop, "(start, stop, slope) with start < stop", lambda x: x > start)


class MACE:
    """Erase one or many concepts by refinement, attention suppression and fusion.

    Refinement takes from all other words of a prompt what they know of the concept. A LoRA of keys
    and values then takes attention off the concept's own words where images show it, and fusion
    finds the weights that do for each concept's prompts what its LoRA does. Without training steps
    it is the refinement alone.

    `masks` says where images show a concept. Without it, it is where the original model attends to
    the concept's words more than Otsu's threshold, and everywhere for styles; the paper segments
    images with another model. Reconstructed: that refinement covers the end tokens and padding
    too, that maps are averaged over heads, the guidance that images are made with, and that fusion
    takes all token states of the templates.

    >>> MACE(MACEConfig(num_steps=120)).config.rank
    1
    """

    name: ClassVar[str] = "mace"
    config_class: ClassVar[type[MACEConfig]] = MACEConfig

    def __init__(self, config: MACEConfig | None = None, masks: Masks | None = None) -> None:
        """Keep the settings and what finds concepts in images."""
        self.config = config or MACEConfig()
        self.masks = masks

    def erase(
        self,
        pipe: Pipeline,
        request: ErasureRequest,
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> Erasure:
        """Erase the target; it is learnt from `request.images`, or from images of the model."""
        return self.erase_many(pipe, [request], seed=seed, progress=progress)

    def erase_many(
        self,
        pipe: Pipeline,
        requests: Sequence[ErasureRequest],
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> Erasure:
        """Erase the concepts of all `requests`: one refinement, a LoRA each, one fusion."""
        config = self.config
        check_pipeline(pipe)
        request = combined_request(requests)
        parameters = select_parameters(pipe.unet, "cross-attention-kv")
        check_trainable(parameters)
        base_hash = base_model_hash(pipe)
        prior = preserved_states(pipe, requests, config)
        rows = refinement_rows(pipe, requests, config, prior)
        refinement = compact(rows.solve(_refining(config)))
        weights = key_value_weights(pipe)
        if config.num_steps:
            lessons = [self._lesson(pipe, one, seed) for one in requests]
            edits = {name: refinement.low_rank(weight) for name, weight in weights.items()}
            refined = WeightDelta({"unet": edits}, DeltaMeta(base_hash, self.name))
            with refined.apply(pipe):
                trained = [self._silence(pipe, lesson, seed, progress) for lesson in lessons]
            grams = [gram_of(lesson.all_states) for lesson in lessons]
            fusion = fuse(
                refinement, grams, prior, config.preserve_scale, ridge=config.fusion_ridge
            )
        else:
            trained, fusion = [], Fusion(refinement, ())
        changes = {
            name: fusion.change(weight, [factors[name] for factors, _ in trained])
            for name, weight in weights.items()
        }
        settings = {**asdict(config), **about(requests), "masks": self._mask_name()}
        delta = WeightDelta({"unet": changes}, DeltaMeta(base_hash, self.name, settings))
        return Erasure(delta, request, history=[loss for _, losses in trained for loss in losses])

    def _mask_name(self) -> str:
        if self.masks is None:
            return "attention"
        return str(getattr(self.masks, "__name__", type(self.masks).__name__))

    def _lesson(self, pipe: Pipeline, request: ErasureRequest, seed: int) -> Lesson:
        """Gather, on the model as it is, the images of a concept and where they show it."""
        config = self.config
        templates = templates_for(request, config)
        count = config.num_images
        if request.images is not None:
            size = pipe.unet.config.sample_size * pipe.vae_scale_factor
            images = (load_images(request.images, size) + 1) / 2
            count = len(images)
        prompts = [written(templates[row % len(templates)], request.target) for row in range(count)]
        if request.images is None:
            images = generate(
                pipe,
                prompts,
                seeds=[seed + row for row in range(count)],
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                batch_size=config.batch_size,
            )
        with torch.no_grad():
            latents = encode_images(pipe.vae, images * 2 - 1, None)
            states = encode_conditions(pipe, prompts)
        positions = torch.tensor(
            [subject_token_positions(pipe.tokenizer, text, request.target) for text in prompts]
        ).to(latents.device)
        if self.masks is not None:
            masks = _checked_masks(self.masks(images, request.target), images)
        elif request.kind == "style":
            masks = torch.ones(count, *latents.shape[-2:], dtype=torch.bool)
        else:
            masks = attention_masks(
                Denoiser.from_pipeline(pipe), latents, states, positions, config.density, seed
            )
        every = encode_in_batches(pipe, [written(text, request.target) for text in templates])
        return Lesson(latents, states, positions, masks.to(latents.device), every.flatten(0, 1))

    def _silence(
        self, pipe: Pipeline, lesson: Lesson, seed: int, progress: bool
    ) -> tuple[Factors, list[float]]:
        """Train the LoRA of one concept on the refined model."""
        config = self.config
        denoiser = Denoiser.from_pipeline(pipe)
        density = timestep_density(denoiser.num_train_timesteps, *config.density)
        count = min(config.batch_size, len(lesson.latents))

        def step_fn(_: int, generator: torch.Generator) -> Tensor:
            rows = torch.randperm(len(lesson.latents), generator=generator)[:count]
            t = torch.multinomial(density, count, replacement=True, generator=generator)
            noise = torch.randn(lesson.latents[rows].shape, generator=generator)
            clean = lesson.latents[rows]
            noisy = denoiser.add_noise(clean, noise.to(clean), t.to(clean.device))
            with _captured(pipe, lesson.positions[rows]) as maps:
                denoiser.predict(noisy, t, lesson.states.select(rows))
            return masked_attention_loss(maps, lesson.masks[rows])

        names = [
            name
            for name, weight in select_parameters(pipe.unet, "cross-attention-kv").items()
            if weight.ndim == 2
        ]
        generator = torch.Generator().manual_seed(seed)
        paths = {name.removesuffix(".weight"): base_name(name) for name in names}
        with add_lora(pipe.unet, paths, config.rank, generator=generator) as lora:
            losses = _train(pipe, lora, step_fn, config, seed, progress)
            factors = lora.factors()
        return {paths[path]: pair for path, pair in factors.items()}, losses


@dataclass(frozen=True)
class Lesson:
    """What the LoRA of one concept is trained on.

    `latents` (n, C, h, w) are those of images whose prompts have `states`, with the concept's
    words at `positions` (n, k); `masks` (n, H, W) say where they show it. `all_states` (m, width)
    are those of all tokens of all templates, for the fusion.
    """

    latents: Tensor
    states: PromptStates
    positions: Tensor
    masks: Tensor
    all_states: Tensor


def refinement_rows(
    pipe: Pipeline,
    requests: Sequence[ErasureRequest],
    config: MACEConfig,
    prior: Tensor | None,
) -> ClosedFormRows:
    """Return the rows of the refinement (paper, closed-form refinement of cross-attention).

    Of each template with the concept in it, every state but those of the concept itself should
    give the keys and values of its like in the template with the replacement. What stands before
    the concept has the same state in both, so it is kept. End tokens and padding are among them.
    """
    sources, targets = [], []
    for request in requests:
        guide = guide_of(request)
        templates = templates_for(request, config)
        named = [written(template, request.target) for template in templates]
        guided = [written(template, guide) for template in templates]
        pairs = zip(
            named, encode_in_batches(pipe, named), encode_in_batches(pipe, guided), strict=True
        )
        length = len(subject_token_positions(pipe.tokenizer, guide, guide)) if guide.strip() else 0
        for prompt, concept, other in pairs:
            places = subject_token_positions(pipe.tokenizer, prompt, request.target)
            before, after = concept[: places[0]], concept[places[-1] + 1 :]
            like = other[places[0] + length :]
            count = min(len(after), len(like))
            sources += [before, after[:count]]
            targets += [before, like[:count]]
    return ClosedFormRows(torch.cat(sources), torch.cat(targets), prior)


def preserved_states(
    pipe: Pipeline, requests: Sequence[ErasureRequest], config: MACEConfig
) -> Tensor | None:
    """Return all states (n, width) of anchors and of prompts of preserved concepts, if any."""
    prompts = dict.fromkeys(
        written(template, concept)
        for request in requests
        for concept in request.preserve
        for template in templates_for(request, config)
    )
    states = kept_states(pipe, [*config.anchors, *prompts], requests)
    return states[0] if states else None


def templates_for(request: ErasureRequest, config: MACEConfig) -> tuple[str, ...]:
    """Return the settings' templates, or those for the kind of concept."""
    return _TEMPLATES[request.kind] if config.templates is None else config.templates


def timestep_density(
    num_train_timesteps: int, start: float = 200.0, stop: float = 400.0, slope: float = 0.05
) -> Tensor:
    """Return p(t) ~ sigmoid(slope (t - start)) - sigmoid(slope (t - stop)), (timesteps,), float64.

    With the paper's values nearly all of it lies between 150 and 450, where objects take shape.

    >>> round(timestep_density(1000)[150:451].sum().item(), 2)
    0.98
    """
    t = torch.arange(num_train_timesteps, dtype=torch.float64)
    density = torch.sigmoid(slope * (t - start)) - torch.sigmoid(slope * (t - stop))
    return density / density.sum()


def masked_attention_loss(maps: AttentionMaps, masks: Tensor) -> Tensor:
    """Return the sum over layers of || A inside the mask ||_F, as a mean over images.

    `maps` hold the probabilities (n, h * w, tokens) of the concept's words by layer; `masks`
    (n, H, W) are reduced to each layer's grid, a place of which is inside if any of its pixels is.
    """
    total = masks.new_zeros((), dtype=torch.float32)
    for (layer, _), values in maps.values.items():
        inside = nn.functional.adaptive_max_pool2d(masks[:, None].float(), maps.grids[layer])
        attended = values * inside.flatten(2).transpose(1, 2)
        total = total + torch.linalg.vector_norm(attended.flatten(1), dim=1).mean()
    return total


@torch.no_grad()
def attention_masks(
    denoiser: Denoiser,
    latents: Tensor,
    states: PromptStates,
    positions: Tensor,
    density: tuple[float, float, float],
    seed: int = 0,
) -> Tensor:
    """Return where the model attends to the words at `positions` (n, k), bool (n, h, w).

    Cross-attention of `latents` (n, C, h, w), noised to five timesteps between the first two
    numbers of `density`, is averaged over layers, summed over words and cut at Otsu's threshold.
    """
    from unweave.attention_tools import to_mask

    generator = torch.Generator().manual_seed(seed)
    last = denoiser.num_train_timesteps - 1
    with _captured(denoiser.unet, positions, differentiable=False) as maps:
        for t in torch.linspace(*density[:2], _MASK_TIMESTEPS).long().clamp(0, last):
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            timesteps = t.to(latents.device).expand(len(latents))
            denoiser.predict(denoiser.add_noise(latents, noise, timesteps), timesteps, states)
    return to_mask(maps.aggregate().sum(1))


def _train(
    pipe: Pipeline,
    lora: LoraLayers,
    step_fn: Callable[[int, torch.Generator], Tensor],
    config: MACEConfig,
    seed: int,
    progress: bool,
) -> list[float]:
    parameters = lora.parameters
    optimizer = torch.optim.Adam(parameters.values(), lr=config.lr)
    holder = nn.ParameterList(parameters.values())
    modules = [pipe.unet, *text_encoders(pipe).values(), pipe.vae, holder]
    with train_only(modules, holder.parameters()):
        return run_training(
            step_fn, parameters, optimizer, num_steps=config.num_steps, seed=seed, progress=progress
        )


def _captured(
    pipe: Pipeline | nn.Module, positions: Tensor, differentiable: bool = True
) -> AbstractContextManager[AttentionMaps]:
    from unweave.attention_tools import capture_attention

    return capture_attention(pipe, tokens=positions, differentiable=differentiable)


def _refining(config: MACEConfig) -> UCEConfig:
    return UCEConfig(
        regularisation=config.regularisation,
        preserve_scale=config.preserve_scale,
        scale_to_norm=config.scale_to_norm,
    )


def _checked_masks(masks: Tensor, images: Tensor) -> Tensor:
    wanted = (len(images), *images.shape[-2:])
    shape, dtype = getattr(masks, "shape", None), getattr(masks, "dtype", None)
    if shape != wanted or dtype != torch.bool:
        raise ImageError(
            f"`masks` must return a bool Tensor of shape {wanted}, got {type(masks).__name__} of "
            f"shape {shape and tuple(shape)} and type {dtype}"
        )
    return masks
