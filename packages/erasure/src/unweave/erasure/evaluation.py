"""What an erasure removed, what it kept and how far it moved the rest, before against after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unweave.diffusion_core.errors import PromptError, UnweaveError
from unweave.diffusion_core.keys import base_parameters
from unweave.diffusion_core.metrics import bootstrap_interval, kid
from unweave.diffusion_core.originals import edits_of
from unweave.diffusion_core.pipelines import generate
from unweave.diffusion_core.prompts import fill, mentions
from unweave.erasure.evaluation_result import ConceptRate, ErasureEvaluation, Examples, Rate

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from unweave.erasure.protocol import Erasure

Judge = Callable[[Tensor, str], Tensor]
"""Says for images (n, 3, H, W) in [0, 1] which of them show a concept: a bool Tensor (n,)."""

Features = Callable[[Tensor], Tensor]
"""Maps images (n, 3, H, W) in [0, 1] to features (n, d)."""

NEUTRAL_PROMPTS = (
    "a rocket",
    "a pizza",
    "a house",
    "a tree",
    "a car",
    "a flower",
    "a book",
    "a bicycle",
)
"""Prompts for the drift unless others are given; those that name the target are left out."""


def evaluate_erasure(
    pipe: StableDiffusionPipeline,
    erasure: Erasure,
    judge: Judge,
    *,
    target: str,
    preserve: Sequence[str],
    related: Sequence[str] = (),
    templates: Sequence[str] = ("a {}",),
    styles: Sequence[str] = (),
    neutral_prompts: Sequence[str] = NEUTRAL_PROMPTS,
    features: Features | None = None,
    seeds: Sequence[int] = range(8),
    strength: float = 1.0,
    num_inference_steps: int = 25,
    guidance_scale: float = 4.0,
    batch_size: int = 16,
    num_examples: int = 8,
) -> ErasureEvaluation:
    """Generate images without and with `erasure` from the same seeds and compare them.

    The pipe is left as it was found, also after an error: if the erasure was applied, it is
    applied again with its old strength. Other edits of the pipe stay in place throughout.

    Args:
        pipe: the pipeline the erasure was made for.
        erasure: what to evaluate.
        judge: says which images show a concept; see `recogniser_judge`.
        target: the erased concept.
        preserve: concepts that should survive.
        related: concepts to watch without counting them as preserved.
        templates: prompts of a concept, with "{}" in the place of its name.
        styles: each prompt is used once per style, as "<prompt>, <style> style".
        neutral_prompts: prompts whose images should not move; () to leave the drift out.
        features: what the drift is measured in; pooled pixels when absent (see `pooled_pixels`).
        seeds: every prompt is drawn once per seed.
        strength: of the erasure in the images after.
        num_inference_steps: as in `generate`.
        guidance_scale: as in `generate`.
        batch_size: as in `generate`.
        num_examples: images kept per concept for the report.

    Raises `PromptError` for unusable prompts and `UnweaveError` for a judge or features of the
    wrong shape.
    """
    concepts = _checked_concepts(target, preserve, related)
    if len(seeds) == 0 or num_examples < 1:
        raise UnweaveError(
            "`seeds` needs at least one seed and `num_examples` must be at least 1, "
            f"got {list(seeds)} and {num_examples}"
        )
    prompts = {concept: _prompts(concept, templates, styles) for concept in concepts}
    neutral = _neutral(neutral_prompts, target)
    observer = _Observer(
        pipe=pipe,
        judge=judge,
        features=features or pooled_pixels,
        prompts=prompts,
        neutral=neutral,
        seeds=tuple(seeds),
        num_examples=num_examples,
        settings={
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "batch_size": batch_size,
        },
    )
    with _left_as_found(pipe, erasure):
        before = observer.observe()
        erasure.apply(pipe, strength=strength)
        after = observer.observe()
    return _compare(before, after, observer, target, preserve, related, strength, erasure)


def pooled_pixels(images: Tensor) -> Tensor:
    """Return mean colours on an 8x8 grid, (n, 192): features that need no network.

    They see layout and colour, not content. Pass the image features of a CLIP model, the same in
    every comparison, where content matters.
    """
    return torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(start_dim=1)


def recogniser_judge(recogniser: Any) -> Judge:
    """Return a judge from a classifier with `.concepts` and `.detect(images) -> bool (n, k)`."""
    index = {concept: column for column, concept in enumerate(recogniser.concepts)}

    def judge(images: Tensor, concept: str) -> Tensor:
        if concept not in index:
            raise UnweaveError(
                f"the recogniser does not know {concept!r}; it knows {', '.join(index)}"
            )
        detected: Tensor = recogniser.detect(images)[:, index[concept]]
        return detected

    return judge


@dataclass(frozen=True)
class _Observation:
    detected: dict[str, Tensor]
    examples: dict[str, Tensor]
    features: Tensor | None


@dataclass(frozen=True)
class _Observer:
    """Draws and judges the same images each time it is asked."""

    pipe: StableDiffusionPipeline
    judge: Judge
    features: Features
    prompts: Mapping[str, tuple[str, ...]]
    neutral: tuple[str, ...]
    seeds: tuple[int, ...]
    num_examples: int
    settings: Mapping[str, Any]

    def observe(self) -> _Observation:
        detected, examples = {}, {}
        for concept, prompts in self.prompts.items():
            images = self._draw(prompts)
            detected[concept] = self._judged(images, concept)
            examples[concept] = images[: self.num_examples].clone()
        features = None
        if self.neutral:
            images = self._draw(self.neutral)
            features = self._featured(images)
            examples["neutral"] = images[:: len(self.seeds)][: self.num_examples].clone()
        return _Observation(detected, examples, features)

    def labels(self, concept: str) -> tuple[str, ...]:
        if concept == "neutral":
            return self.neutral[: self.num_examples]
        return tuple(
            f"{prompt} (seed {seed})" for prompt in self.prompts[concept] for seed in self.seeds
        )[: self.num_examples]

    def _draw(self, prompts: Sequence[str]) -> Tensor:
        pairs = [(prompt, seed) for prompt in prompts for seed in self.seeds]
        return generate(
            self.pipe,
            [prompt for prompt, _ in pairs],
            seeds=[seed for _, seed in pairs],
            **self.settings,
        )

    @torch.no_grad()
    def _judged(self, images: Tensor, concept: str) -> Tensor:
        detected = self.judge(images, concept)
        shape, dtype = getattr(detected, "shape", None), getattr(detected, "dtype", None)
        if shape != (len(images),) or dtype != torch.bool:
            raise UnweaveError(
                f"`judge` must return a bool Tensor of shape ({len(images)},), got "
                f"{type(detected).__name__} of shape {shape and tuple(shape)} and type {dtype}"
            )
        return detected.cpu()

    @torch.no_grad()
    def _featured(self, images: Tensor) -> Tensor:
        features = self.features(images)
        if features.ndim != 2 or len(features) != len(images):
            raise UnweaveError(
                f"`features` must return a Tensor ({len(images)}, d), got {tuple(features.shape)}"
            )
        return features.cpu()


@contextmanager
def _left_as_found(pipe: StableDiffusionPipeline, erasure: Erasure) -> Iterator[None]:
    """Take the erasure out of `pipe` inside the block and restore weights bit for bit after it."""
    delta = erasure.delta
    modules = {component: getattr(pipe, component) for component in delta.deltas}
    active = {component: list(edits_of(module).active) for component, module in modules.items()}
    strengths = [how for edits in active.values() for edit, how in edits if edit is delta]
    if not strengths:
        try:
            yield
        finally:
            if delta.is_applied(pipe):
                delta.revert(pipe)
        return
    weights = {
        component: {
            name: base_parameters(component, module)[name].detach().clone()
            for name in delta.deltas[component]
        }
        for component, module in modules.items()
    }
    try:
        delta.revert(pipe)
        yield
    finally:
        if delta.is_applied(pipe):
            delta.revert(pipe)
        delta.apply(pipe, strengths[0], strict=False)
        for component, module in modules.items():
            # Re-applying put the delta last; with others applied, order decides the last bits.
            edits_of(module).active = active[component]
            _write(base_parameters(component, module), weights[component])


@torch.no_grad()
def _write(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)


def _compare(
    before: _Observation,
    after: _Observation,
    observer: _Observer,
    target: str,
    preserve: Sequence[str],
    related: Sequence[str],
    strength: float,
    erasure: Erasure,
) -> ErasureEvaluation:
    rates = {
        concept: ConceptRate(_rate(before.detected[concept]), _rate(after.detected[concept]))
        for concept in observer.prompts
    }
    drop, drop_interval = _mean_drop(before.detected, after.detected, preserve)
    drift, drift_std = _drift(before.features, after.features)
    return ErasureEvaluation(
        target=target,
        target_rate=rates[target],
        preserved={concept: rates[concept] for concept in preserve},
        related={concept: rates[concept] for concept in related},
        mean_preserved_drop=drop,
        mean_preserved_drop_interval=drop_interval,
        drift_kid=drift,
        drift_kid_std=drift_std,
        settings={
            "method": erasure.delta.meta.method,
            "strength": strength,
            "prompts": {concept: list(prompts) for concept, prompts in observer.prompts.items()},
            "neutral_prompts": list(observer.neutral),
            "seeds": list(observer.seeds),
            "features": getattr(observer.features, "__name__", type(observer.features).__name__),
            **observer.settings,
        },
        examples={
            concept: Examples(
                before.examples[concept], after.examples[concept], observer.labels(concept)
            )
            for concept in before.examples
        },
    )


def _rate(detected: Tensor) -> Rate:
    return Rate(int(detected.sum()), len(detected))


def _mean_drop(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], preserve: Sequence[str]
) -> tuple[float | None, tuple[float, float] | None]:
    if not preserve:
        return None, None
    drops = torch.cat([before[name].double() - after[name].double() for name in preserve])
    return drops.mean().item(), bootstrap_interval(drops, seed=0)


def _drift(before: Tensor | None, after: Tensor | None) -> tuple[float | None, float | None]:
    if before is None or after is None or len(before) < 2:
        return None, None
    return kid(
        before, after, subsets=50, subset_size=min(50, max(2, len(before) // 2)), paired=True
    )


def _checked_concepts(
    target: str, preserve: Sequence[str], related: Sequence[str]
) -> tuple[str, ...]:
    for name, value in (("preserve", preserve), ("related", related)):
        if isinstance(value, str):
            raise PromptError(f"`{name}` must be a sequence of concepts, got the text {value!r}")
    concepts = (target, *preserve, *related)
    for concept in concepts:
        if not concept.strip():
            raise PromptError(f"every concept needs a name, got {concept!r} in {concepts}")
        if concept == "neutral":
            raise PromptError('"neutral" names the drift images; call the concept differently')
        if concepts.count(concept) > 1:
            raise PromptError(
                f"{concept!r} is given more than once among target, preserve and related"
            )
    return concepts


def _prompts(concept: str, templates: Sequence[str], styles: Sequence[str]) -> tuple[str, ...]:
    if isinstance(templates, str) or not templates:
        raise PromptError(f"`templates` must be a sequence of templates, got {templates!r}")
    prompts = [fill(template, concept) for template in templates]
    if styles:
        prompts = [f"{prompt}, {style} style" for prompt in prompts for style in styles]
    return tuple(prompts)


def _neutral(neutral_prompts: Sequence[str], target: str) -> tuple[str, ...]:
    naming = [prompt for prompt in neutral_prompts if mentions(prompt, target)]
    if naming and neutral_prompts is not NEUTRAL_PROMPTS:
        raise PromptError(
            f"`neutral_prompts` must not name the target {target!r}, got {naming}; leave them out"
        )
    return tuple(prompt for prompt in neutral_prompts if prompt not in naming)
