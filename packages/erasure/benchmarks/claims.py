"""What unweave-erasure says about erasing from the embedded pipeline, measured."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from claims_runner import ROOT, Claim, Measure
from unweave.diffusion_core import bootstrap_interval, fingerprint, generate, load_pipeline
from unweave.diffusion_core.pipelines import Pipeline
from unweave.emoji_world import World, load_recogniser, pipeline_path
from unweave.erasure import Eraser, Erasure, ErasureRequest, make_eraser
from unweave.erasure.erase_run import EVALUATION_SEED, STYLE_TEMPLATES

SOURCES = {"few-shot": "arXiv 2405.07288", "uce": "arXiv 2308.14761", "esd": "arXiv 2303.07345"}
TUNED_ON = ("cat face", "pizza", "rocket", "guitar")
TARGETS = (
    *("panda", "frog", "turtle", "strawberry", "doughnut"),
    *("bicycle", "soccer ball", "star", "penguin", "sunflower"),
)
STYLES = ("openmoji", "fluent")
MISSED = "settings are one recipe for all targets of a small model"
PLAIN_DIFFUSERS = ROOT / "integration" / "plain_diffusers.py"
OTHER_TEMPLATES = {
    "object": ("{} on a black background, noto style", "openmoji style picture of {} on purple"),
    "style": ("a turtle on a purple background, {} style", "{} style picture of a car on green"),
}


@dataclass(frozen=True)
class Trial:
    """How targets are erased: method, kind and what differs from the recipe.

    With `half_listed` every second other concept is neither preserved nor an anchor, and those
    are the ones that are judged.
    """

    method: str
    kind: str = "object"
    settings: tuple[tuple[str, float], ...] = ()
    half_listed: bool = False

    def eraser(self, target: str) -> Eraser:
        """The eraser for `target`."""
        settings: dict[str, Any] = dict(self.settings)
        if self.half_listed:
            settings["anchors"] = ("", *map(World.phrase, self.listed(target)))
        return make_eraser(self.method, "emoji-world", self.kind, **settings)  # type: ignore[arg-type]

    def request(self, target: str) -> ErasureRequest:
        """The request, which preserves all listed others."""
        return ErasureRequest(target, preserve=self.listed(target), kind=self.kind)  # type: ignore[arg-type]

    def listed(self, target: str) -> tuple[str, ...]:
        """The concepts that the eraser is told to keep."""
        return _others(target, self.kind)[:: 2 if self.half_listed else 1]

    def judged(self, target: str) -> tuple[str, ...]:
        """The concepts whose drop is measured."""
        others = _others(target, self.kind)
        return others[1::2] if self.half_listed else others


@dataclass(frozen=True)
class Outcome:
    """Rates of one erasure: the target before and after, and the drop of each other concept.

    `elsewhere` is the target's rate before and after in prompts that no recipe has.
    """

    target: str
    before: float
    after: float
    drops: tuple[float, ...]
    elsewhere: tuple[float, float]
    seconds: float

    @property
    def drop(self) -> float:
        """Mean drop over the others."""
        return mean(self.drops)

    def __str__(self) -> str:
        return f"{self.target} {self.before:.0%} to {self.after:.0%}, others {-self.drop:+.1%}"


def target_rate(method: str, kind: str, seed: int, quick: bool) -> Claim:
    """Mean recognition of the targets after their erasure."""
    results = outcomes(Trial(method, kind), seed, quick)
    before = mean(result.before for result in results)
    return mean_at_most(
        15,
        "%",
        [result.after for result in results],
        id=f"{method}-{kind}-target",
        text=f"{method}: an erased {kind} is no longer recognised in images of its prompts, "
        "on average",
        source=SOURCES[method],
        setting=f"{_setting(results, quick)}; {before:.0%} before",
    )


def others_drop(method: str, kind: str, seed: int, quick: bool) -> Claim:
    """Mean drop of recognition of everything that was not erased."""
    results = outcomes(Trial(method, kind), seed, quick)
    return mean_at_most(
        5,
        "points",
        [result.drop for result in results],
        id=f"{method}-{kind}-others",
        text=f"{method}: the mean rate of other {kind}s drops little (below 0: it rises)",
        source=SOURCES[method],
        setting=_setting(results, quick),
    )


def other_prompts(method: str, seed: int, quick: bool) -> Claim:
    """Mean recognition of erased objects under templates that no recipe has."""
    results = outcomes(Trial(method), seed, quick)
    before = mean(result.elsewhere[0] for result in results)
    return mean_at_most(
        15,
        "%",
        [result.elsewhere[1] for result in results],
        id=f"{method}-other-prompts",
        text=f"{method}: an erased object stays away in prompts that the recipe does not have",
        source=SOURCES[method],
        setting=f"{len(results)} targets, prompts with style and background; {before:.0%} before",
    )


def unlisted_others(method: str, seed: int, quick: bool) -> Claim:
    """Mean drop of objects that the eraser was not told to keep."""
    results = outcomes(Trial(method, half_listed=True), seed, quick, TUNED_ON)
    after = mean(result.after for result in results)
    return mean_at_most(
        5,
        "points",
        [result.drop for result in results],
        id=f"{method}-unlisted-others",
        text=f"{method}: objects that nobody asked to keep drop little too",
        source=SOURCES[method],
        setting=f"{_setting(results, quick)}: every second object, the rest being preserved; "
        f"target {after:.0%} after",
        note="what is to stay should be named in `preserve`",
    )


def mean_at_most(
    limit: float, unit: str, shares: Sequence[float], *, note: str = MISSED, **words: str
) -> Claim:
    """A claim that the mean of `shares`, one a target, is at most `limit` percent or points."""
    values = [100 * share for share in shares]
    interval = _interval(values)
    return Claim.at_most(
        **words, value=mean(values), limit=limit, unit=unit, interval=interval, note=note
    )


def as_published(seed: int, quick: bool) -> Claim:
    """Few-shot erasing as in its paper, which has no term that keeps other concepts."""
    published = (("preserve_weight", 0.0), ("lr", 5e-4), ("epochs", 4))
    results = outcomes(Trial("few-shot", settings=published), seed, quick, TUNED_ON)
    after = 100 * mean(result.after for result in results)
    drop = 100 * mean(result.drop for result in results)
    holds = after <= 15 and drop <= 5
    return Claim(
        id="few-shot-as-published",
        text="few-shot without the preserving term, which is an extension of ours",
        source=SOURCES["few-shot"],
        setting=f"{_setting(results, quick)}; lr 5e-4, 4 epochs",
        aim="<= 15 % and others within 5 points",
        measured=f"{after:.1f} %, others {-drop:+.1f} points",
        interval=None,
        holds=holds,
        note="" if holds else "; ".join(map(str, results)),
    )


def esd_margin(seed: int, quick: bool) -> Claim:
    """ESD lowers its target much more than the rest."""
    results = outcomes(Trial("esd"), seed, quick, TUNED_ON)
    fall = 100 * mean(result.before - result.after for result in results)
    drop = 100 * mean(result.drop for result in results)
    holds = fall >= 50 and drop <= 20
    return Claim(
        id="esd-margin",
        text="esd: the target falls by far more than the others",
        source=SOURCES["esd"],
        setting=f"{_setting(results, quick)}, slowest {max(r.seconds for r in results):.0f} s",
        aim=">= 50 points, others <= 20",
        measured=f"{fall:.1f} points, others {drop:.1f}",
        interval=None,
        holds=holds,
        note="; ".join(map(str, results)),
    )


def each_target(method: str, seed: int, quick: bool) -> Claim:
    """Every number behind the means."""
    results = _all_outcomes(method, seed, quick)
    good = [result for result in results if result.after <= 0.15 and result.drop <= 0.05]
    return Claim(
        id=f"{method}-each",
        text=f"{method}: every target alone, with the mean change of the others",
        source=SOURCES[method],
        setting="as above",
        aim="each <= 15 % and others within 5 points",
        measured=f"{len(good)} of {len(results)}",
        interval=None,
        holds=len(good) == len(results),
        note="; ".join(map(str, results)),
    )


def seconds_taken(method: str, seed: int, quick: bool) -> Claim:
    """The slowest erasure, images it draws for itself included."""
    results = _all_outcomes(method, seed, quick)
    slowest = max(result.seconds for result in results)
    return Claim.at_most(
        f"{method}-seconds",
        f"{method}: one erasure is quick, on a CPU",
        SOURCES[method],
        f"slowest of {len(results)}",
        value=slowest,
        limit=60,
        unit="s",
        note="the machine was busy, or has less than two common cores",
    )


def plain_diffusers(method: str, seed: int, quick: bool) -> Claim:
    """A script that imports only diffusers and transformers draws the same images."""
    with tempfile.TemporaryDirectory() as folder:
        saved, out = Path(folder) / "erasure", Path(folder) / "images.safetensors"
        pipe = load_pipeline("emoji-world")
        erasure = _cat_erasure(method, pipe)
        erasure.save(saved)
        with erasure.apply(pipe):
            ours = generate(pipe, ["a cat face"] * 4, seeds=range(4), batch_size=4)
        arguments = [str(pipeline_path()), str(saved), str(out), "a cat face"]
        subprocess.run([sys.executable, str(PLAIN_DIFFUSERS), *arguments], check=True)
        difference = (load_file(out)["images"] - ours).abs().max().item()
    return Claim.at_most(
        f"{method}-plain-diffusers",
        f"{method}: the saved erasure draws the same in plain diffusers, without unweave",
        SOURCES[method],
        "largest difference of a pixel in [0, 1] over 4 images of one prompt",
        value=difference,
        limit=0.002,
        digits=".2g",
        note="a defect",
    )


def bit_exact_revert(method: str, seed: int, quick: bool) -> Claim:
    """Weights before applying and after reverting have the same bits."""
    pipe = load_pipeline("emoji-world")
    modules = {name: getattr(pipe, name) for name in ("unet", "text_encoder", "vae")}
    erasure = _cat_erasure(method, pipe)
    before = {name: fingerprint(module) for name, module in modules.items()}
    with erasure.apply(pipe):
        changed = [n for n, module in modules.items() if fingerprint(module) != before[n]]
    same = {name: fingerprint(module) for name, module in modules.items()} == before
    return Claim.identical(
        f"{method}-revert",
        f"{method}: reverting restores every bit of every weight",
        SOURCES[method],
        f"SHA-256 of all weights; the erasure changes the {' and '.join(changed)}",
        same=same and bool(changed),
        note="a defect",
    )


@cache
def outcomes(
    trial: Trial, seed: int, quick: bool, targets: tuple[str, ...] = ()
) -> tuple[Outcome, ...]:
    """Erase each target from the fresh pipeline and judge it and the others."""
    names = targets or (TARGETS if trial.kind == "object" else STYLES)
    return tuple(_outcome(trial, name, seed, quick) for name in names[: 1 if quick else None])


def _all_outcomes(method: str, seed: int, quick: bool) -> tuple[Outcome, ...]:
    return outcomes(Trial(method), seed, quick) + outcomes(Trial(method, "style"), seed, quick)


def _outcome(trial: Trial, target: str, seed: int, quick: bool) -> Outcome:
    pipe, kind = load_pipeline("emoji-world"), trial.kind
    start = time.perf_counter()
    erasure = trial.eraser(target).erase(pipe, trial.request(target), seed=seed, progress=False)
    seconds = time.perf_counter() - start
    many, few = _seeds(seed, quick), _few_seeds(seed, kind)
    others = trial.judged(target)[: 3 if quick else None]
    with erasure.apply(pipe):
        after = _rate(pipe, target, kind, many)
        elsewhere = _rate(pipe, target, kind, many, OTHER_TEMPLATES[kind])
        kept = {name: _rate(pipe, name, kind, few) for name in others}
    return Outcome(
        target,
        before=_plain_rate(target, kind, many),
        after=after,
        drops=tuple(_plain_rate(name, kind, few) - rate for name, rate in kept.items()),
        elsewhere=(_plain_rate(target, kind, many, OTHER_TEMPLATES[kind]), elsewhere),
        seconds=seconds,
    )


@cache
def _plain_rate(name: str, kind: str, seeds: range, templates: tuple[str, ...] = ()) -> float:
    return _rate(load_pipeline("emoji-world"), name, kind, seeds, templates)


def _rate(
    pipe: Pipeline, name: str, kind: str, seeds: range, templates: tuple[str, ...] = ()
) -> float:
    words = World.phrase(name) if kind == "object" else name
    templates = templates or (("{}",) if kind == "object" else STYLE_TEMPLATES)
    prompts = [template.replace("{}", words) for template in templates for _ in seeds]
    images = generate(pipe, prompts, seeds=list(seeds) * len(templates))
    return _recognised(images, name, kind).float().mean().item()


def _recognised(images: Tensor, name: str, kind: str) -> Tensor:
    recogniser = load_recogniser()
    if kind == "object":
        return recogniser.detect(images)[:, recogniser.concepts.index(name)]
    return recogniser.styles(images) == World.styles.index(name)


def _cat_erasure(method: str, pipe: Pipeline) -> Erasure:
    trial = Trial(method)
    return trial.eraser("cat face").erase(pipe, trial.request("cat face"), progress=False)


def _others(target: str, kind: str) -> tuple[str, ...]:
    names = World.trained if kind == "object" else World.styles
    return tuple(name for name in names if name != target)


def _seeds(seed: int, quick: bool) -> range:
    return range(EVALUATION_SEED + seed, EVALUATION_SEED + seed + (2 if quick else 16))


def _few_seeds(seed: int, kind: str) -> range:
    return range(EVALUATION_SEED + seed, EVALUATION_SEED + seed + (2 if kind == "object" else 4))


def _setting(results: tuple[Outcome, ...], quick: bool) -> str:
    images, others = len(_seeds(0, quick)), len(results[0].drops)
    return f"{len(results)} targets, {images} images a prompt, {others} others with fewer"


def _interval(values: list[float]) -> tuple[float, float] | None:
    if len(values) < 3:
        return None
    low, high = bootstrap_interval(torch.tensor(values))
    return round(low, 1), round(high, 1)


MEASURED = ("few-shot", "uce")
CLAIMS: dict[str, Measure] = {}
for _method in MEASURED:
    for _kind in ("object", "style"):
        CLAIMS[f"{_method}-{_kind}-target"] = partial(target_rate, _method, _kind)
        CLAIMS[f"{_method}-{_kind}-others"] = partial(others_drop, _method, _kind)
    CLAIMS[f"{_method}-other-prompts"] = partial(other_prompts, _method)
    CLAIMS[f"{_method}-unlisted-others"] = partial(unlisted_others, _method)
    CLAIMS[f"{_method}-each"] = partial(each_target, _method)
    CLAIMS[f"{_method}-seconds"] = partial(seconds_taken, _method)
    CLAIMS[f"{_method}-plain-diffusers"] = partial(plain_diffusers, _method)
    CLAIMS[f"{_method}-revert"] = partial(bit_exact_revert, _method)
CLAIMS["few-shot-as-published"] = as_published
CLAIMS["esd-margin"] = esd_margin
