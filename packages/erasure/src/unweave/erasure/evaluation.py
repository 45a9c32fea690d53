"""What an erasure removed, what it kept and how far it moved the rest, before against after."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unweave.diffusion_core.errors import PromptError, UnweaveError
from unweave.diffusion_core.keys import base_parameters
from unweave.diffusion_core.metrics import bootstrap_interval, kid, wilson_interval
from unweave.diffusion_core.originals import edits_of
from unweave.diffusion_core.pipelines import generate
from unweave.diffusion_core.prompts import fill
from unweave.diffusion_core.report import Report, image_grid

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

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


@dataclass(frozen=True)
class Rate:
    """A share of images with its 95 % Wilson interval."""

    successes: int
    total: int

    @property
    def value(self) -> float:
        """The share, in [0, 1]."""
        return self.successes / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the share."""
        return wilson_interval(self.successes, self.total)

    def __str__(self) -> str:
        """Show percent, interval and counts: `25 % [7, 59] (2/8)`."""
        low, high = self.interval
        return (
            f"{100 * self.value:.0f} % [{100 * low:.0f}, {100 * high:.0f}] "
            f"({self.successes}/{self.total})"
        )


@dataclass(frozen=True)
class ConceptRate:
    """How often the judge sees a concept in images of it, without and with the erasure."""

    before: Rate
    after: Rate

    @property
    def drop(self) -> float:
        """Rate before minus rate after."""
        return self.before.value - self.after.value


@dataclass(frozen=True)
class Examples:
    """The first images of a concept with the same prompts and seeds, both (n, 3, H, W)."""

    before: Tensor
    after: Tensor
    labels: tuple[str, ...]


@dataclass(frozen=True)
class ErasureEvaluation:
    """The result of `evaluate_erasure`."""

    target: str
    target_rate: ConceptRate
    preserved: Mapping[str, ConceptRate]
    """Concepts that the erasure should keep."""
    related: Mapping[str, ConceptRate]
    """Concepts close to the target that are watched, not promised."""
    mean_preserved_drop: float | None
    """Mean of rate before minus rate after over preserved images; `None` without any."""
    mean_preserved_drop_interval: tuple[float, float] | None
    """95 % bootstrap interval of the mean drop over images, each paired with itself."""
    drift_kid: float | None
    """Paired kernel distance of neutral images before and after; `None` below two images."""
    drift_kid_std: float | None
    """Standard deviation of the drift over random subsets."""
    settings: Mapping[str, Any]
    """How the images were made: method, prompts, seeds, steps, guidance, strength."""
    examples: Mapping[str, Examples] = field(repr=False)
    """Images of every concept, and of the neutral prompts under "neutral"."""

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers and settings, without images, as plain JSON values."""
        return {
            "target": {self.target: _rates(self.target_rate)},
            "preserved": {name: _rates(rate) for name, rate in self.preserved.items()},
            "related": {name: _rates(rate) for name, rate in self.related.items()},
            "mean_preserved_drop": self.mean_preserved_drop,
            "mean_preserved_drop_interval": _listed(self.mean_preserved_drop_interval),
            "drift_kid": self.drift_kid,
            "drift_kid_std": self.drift_kid_std,
            "settings": dict(self.settings),
        }

    def to_json(self) -> str:
        """Return `to_dict` as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def example_grid(self, concept: str, scale: int = 2) -> Image:
        """Return the examples of a concept (or "neutral"): before in the top row, after below."""
        if concept not in self.examples:
            raise UnweaveError(
                f"no examples of {concept!r}; there are some of {', '.join(self.examples)}"
            )
        pair = self.examples[concept]
        return image_grid(torch.cat([pair.before, pair.after]), len(pair.before), scale)

    def to_report(self, path: str | Path) -> Path:
        """Write `report.html`, `grid.png` and `numbers.json` into folder `path`.

        Returns the path of the HTML file, which holds all images and needs no other file.
        """
        report = Report(f"Erasing {self.target!r}")
        report.add_text(self._summary())
        report.add_table(
            ["concept", "role", "before", "after", "drop"],
            [
                [name, role, str(rate.before), str(rate.after), rate.drop]
                for role, rates in self._by_role().items()
                for name, rate in rates.items()
            ],
            title="Images in which the judge sees the concept",
        )
        for name, pair in self.examples.items():
            report.add_images(f"{name}: before", pair.before, pair.labels)
            report.add_images(f"{name}: after", pair.after, pair.labels)
        return report.add_numbers(self.to_dict()).save(path)

    def _by_role(self) -> dict[str, Mapping[str, ConceptRate]]:
        return {
            "target": {self.target: self.target_rate},
            "preserve": self.preserved,
            "related": self.related,
        }

    def _summary(self) -> str:
        before, after = self.target_rate.before, self.target_rate.after
        parts = [
            f"The judge sees {self.target!r} in {before} of its images before and in {after} "
            "after the erasure. Brackets are 95 % Wilson intervals; before and after share "
            "prompts and seeds."
        ]
        if before.value < 0.5:
            parts.append(
                "The judge misses the target in most images even before the erasure, so its rate "
                "after says little: check the prompts and the judge."
            )
        if self.mean_preserved_drop is not None and self.mean_preserved_drop_interval is not None:
            low, high = self.mean_preserved_drop_interval
            parts.append(
                f"Preserved concepts lose {100 * self.mean_preserved_drop:.1f} points on average "
                f"(95 % bootstrap interval {100 * low:.1f} to {100 * high:.1f})."
            )
        if self.drift_kid is not None:
            parts.append(
                f"Images of neutral prompts moved by a paired KID of {self.drift_kid:.4g} "
                f"(standard deviation over subsets {self.drift_kid_std:.2g}; 0 is no change)."
            )
        return "\n\n".join(parts)


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
    word = re.compile(rf"(?<!\w){re.escape(target.strip())}(?!\w)", re.IGNORECASE)
    naming = [prompt for prompt in neutral_prompts if word.search(prompt)]
    if naming and neutral_prompts is not NEUTRAL_PROMPTS:
        raise PromptError(
            f"`neutral_prompts` must not name the target {target!r}, got {naming}; leave them out"
        )
    return tuple(prompt for prompt in neutral_prompts if prompt not in naming)


def _rates(rate: ConceptRate) -> dict[str, Any]:
    return {
        moment: {
            "rate": value.value,
            "interval": list(value.interval),
            "successes": value.successes,
            "total": value.total,
        }
        for moment, value in (("before", rate.before), ("after", rate.after))
    } | {"drop": rate.drop}


def _listed(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)
