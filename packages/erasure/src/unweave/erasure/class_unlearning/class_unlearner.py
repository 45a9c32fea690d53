"""Class unlearning by concept poisoning (arXiv 2405.15662), for classifiers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unweave.diffusion_core.changes import Change, LowRank
from unweave.diffusion_core.errors import SelectionError
from unweave.erasure.class_unlearning.attribution import contrast
from unweave.erasure.class_unlearning.classifier import (
    ClassRequest,
    evaluating,
    features_of,
    live_features,
)
from unweave.erasure.class_unlearning.concept_bank import ConceptBank, ConceptSamples
from unweave.erasure.class_unlearning.explanation import Explanation, explain_class
from unweave.erasure.class_unlearning.fine_tuning import TrainingData, fine_tune
from unweave.erasure.class_unlearning.measures import probe_accuracy
from unweave.erasure.class_unlearning.poisoning import (
    blended_with_retain,
    counterfactual_labels,
    highest,
    random_labels,
    targeted_label,
)
from unweave.erasure.class_unlearning.result import ClassUnlearning, ConceptEntry, ConceptReport
from unweave.erasure.protocol import check_number

LABELS = ("random", "targeted", "per-sample")
"""How poisoned samples are labelled; see `ClassUnlearningConfig`."""


@dataclass(frozen=True)
class ClassUnlearningConfig:
    """Settings of class unlearning. The paper states few: most defaults are conventions.

    `mode="poison"` is the paper's: fine-tune on relabelled samples. "project", an extension,
    takes the directions of the class's concepts out of what the head, a linear layer, reads.

    `labels`: "random" draws another class for each sample, once or with `resample` each epoch;
    "targeted" gives all the class that is most alike without the class's own concepts;
    "per-sample" the best class of the bottleneck once these concepts are at the baseline.
    `concepts_by` says what the class's concepts are chosen by: their importance for the class, or
    the contrast to the most important of other classes; they cover `coverage` of the positive
    mass. `fraction` of the forget samples is poisoned, those with the highest score first.
    `protect` is the share of the retain samples that look most like the class, which are learnt
    with their own label, `oversample` times. `keep_pixels`, in (0, 1), has the poison keep only
    that share of pixels, where the concepts are, the rest being those of retain images.
    `retain_fraction` of the retain samples is learnt in batches of `batch_size` beside as many
    poisoned ones. `holdout` of both is watched: training stops once the class is recognised no
    more often than by chance or the others have lost `max_retain_drop`. `recovery_epochs`, an
    extension, go on after the class is forgotten, so that the others come back. `hybrid` adds a
    residual to the bottleneck, which must be at most `max_fidelity_gap` less accurate than the
    head.
    """

    mode: Literal["poison", "project"] = "poison"
    labels: Literal["random", "targeted", "per-sample"] = "targeted"
    resample: bool = False
    concepts_by: Literal["importance", "contrast"] = "importance"
    explain: Literal["probability", "logit"] = "probability"
    baseline: Literal["retain-mean", "zero"] = "retain-mean"
    num_ig_steps: int = 50
    coverage: float = 0.8
    fraction: float = 1.0
    protect: float = 0.0
    oversample: int = 2
    keep_pixels: float | None = None
    min_concept_accuracy: float = 0.7
    max_fidelity_gap: float = 0.15
    hybrid: bool = False
    strength: float = 1e-5
    l1_ratio: float = 0.99
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 1e-3
    momentum: float = 0.0
    epochs: int = 5
    recovery_epochs: int = 0
    batch_size: int = 128
    retain_fraction: float = 0.1
    holdout: float = 0.1
    max_retain_drop: float = 0.01

    def __post_init__(self) -> None:
        choices = {
            "mode": ("poison", "project"),
            "labels": LABELS,
            "concepts_by": ("importance", "contrast"),
            "explain": ("probability", "logit"),
            "baseline": ("retain-mean", "zero"),
            "optimizer": ("sgd", "adamw"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise SelectionError(
                    f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}"
                )
        for name in ("lr", "epochs", "batch_size", "num_ig_steps", "oversample", "strength"):
            check_number(name, getattr(self, name), "positive", lambda x: x > 0)
        for name in ("coverage", "fraction", "retain_fraction"):
            check_number(name, getattr(self, name), "in (0, 1]", lambda x: 0 < x <= 1)
        for name in ("protect", "l1_ratio", "min_concept_accuracy", "max_fidelity_gap"):
            check_number(name, getattr(self, name), "in [0, 1]", lambda x: 0 <= x <= 1)
        check_number("max_retain_drop", self.max_retain_drop, "in [0, 1]", lambda x: 0 <= x <= 1)
        check_number("recovery_epochs", self.recovery_epochs, "at least 0", lambda x: x >= 0)
        check_number("momentum", self.momentum, "in [0, 1)", lambda x: 0 <= x < 1)
        check_number("holdout", self.holdout, "in (0, 1)", lambda x: 0 < x < 1)
        if self.keep_pixels is not None:
            check_number("keep_pixels", self.keep_pixels, "in (0, 1)", lambda x: 0 < x < 1)


class ClassUnlearner:
    """Make a classifier forget one class, and say which concepts carried it.

    >>> ClassUnlearner(ClassUnlearningConfig(labels="random")).config.coverage
    0.8
    """

    name: ClassVar[str] = "class-unlearning"
    config_class: ClassVar[type[ClassUnlearningConfig]] = ClassUnlearningConfig

    def __init__(self, config: ClassUnlearningConfig | None = None) -> None:
        """Keep the settings."""
        self.config = config or ClassUnlearningConfig()

    def unlearn(
        self,
        model: nn.Module,
        request: ClassRequest,
        concepts: ConceptBank | Mapping[str, ConceptSamples],
        *,
        head: str,
        seed: int = 0,
        progress: bool = True,
    ) -> ClassUnlearning:
        """Work out the unlearning of `request`; `model` is left bit-identical until it is applied.

        `model` maps inputs to logits (n, classes), or to a transformers output with `logits`.
        `head` names its module that turns features into logits. `concepts` are inputs that show
        each concept and inputs that do not, or a ready bank. Raises `SelectionError` when concepts
        explain the classes too badly to be relied on, `PipelineError` unless weights are float32.
        """
        config = self.config
        forget = features_of(model, head, request.forget_inputs)
        retain = features_of(model, head, request.retain_inputs)
        found = self.explain(model, request, concepts, head=head, seed=seed)
        facts: dict[str, Any] = {
            "head_accuracy": found.head_accuracy,
            "bottleneck_accuracy": found.bottleneck_accuracy,
            "surrogate_data": request.surrogate,
            "probe_accuracy_before": probe_accuracy(forget, retain, seed=seed),
        }
        changes: Mapping[str, Change]
        poison: dict[str, Tensor] = {}
        answers: dict[str, int] = {}
        history: list[float] = []
        if config.mode == "project":
            changes = projected_head(model, head, found, retain.mean(0))
        else:
            generator = torch.Generator().manual_seed(seed)
            data, poison = self._poisoned(model, request, found, head, generator)
            tuned = fine_tune(model, data, config, seed=seed, progress=progress)
            changes, history = tuned.changes, tuned.history
            answers = _counts(poison["labels"], request.class_names)
            facts |= {"epochs": tuned.epochs, "stopped": tuned.stopped}
        report = _report(request, found, answers, facts)
        result = ClassUnlearning.from_changes(
            model,
            changes,
            report,
            method=self.name,
            settings=asdict(config),
            history=history,
            poison=poison,
        )
        with result.apply(model):
            after = features_of(model, head, request.forget_inputs)
            kept = features_of(model, head, request.retain_inputs)
        facts["probe_accuracy_after"] = probe_accuracy(after, kept, seed=seed)
        result.report = _report(request, found, answers, facts)
        return result

    def explain(
        self,
        model: nn.Module,
        request: ClassRequest,
        concepts: ConceptBank | Mapping[str, ConceptSamples],
        *,
        head: str,
        seed: int = 0,
    ) -> Explanation:
        """Return which concepts carry the class, without unlearning anything."""
        return explain_class(model, request, concepts, self.config, head=head, seed=seed)

    def _poisoned(
        self,
        model: nn.Module,
        request: ClassRequest,
        found: Explanation,
        head: str,
        generator: torch.Generator,
    ) -> tuple[TrainingData, dict[str, Tensor]]:
        config = self.config
        (learnt, held), (kept, watched) = split_data(request, config.holdout, generator)
        poisoned = learnt[highest(found.forget_scores[learnt], config.fraction)]
        protected = protected_samples(found.retain_scores, kept, config.protect)
        sample = kept[: max(1, round(config.retain_fraction * len(kept)))]
        retained = torch.cat([sample, protected.repeat(config.oversample)])
        labels = self._labels(model, request, found, head, poisoned, generator)
        inputs = request.forget_inputs[poisoned]
        if config.keep_pixels is not None:
            others = torch.randint(len(kept), (len(inputs),), generator=generator)
            backgrounds = request.retain_inputs[kept[others]]
            inputs = self._blended(model, head, found, inputs, backgrounds)
        device = request.retain_labels.device
        data = TrainingData(
            inputs,
            lambda epoch: labels(epoch).to(device),
            request.retain_inputs[retained],
            request.retain_labels[retained],
            request.forget_inputs[held],
            request.retain_inputs[watched],
            request.retain_labels[watched],
            request.index,
            request.num_classes,
        )
        return data, {"indices": poisoned, "labels": labels(0), "protected": protected}

    def _labels(
        self,
        model: nn.Module,
        request: ClassRequest,
        found: Explanation,
        head: str,
        poisoned: Tensor,
        generator: torch.Generator,
    ) -> Callable[[int], Tensor]:
        config, index, count = self.config, request.index, len(poisoned)
        if config.labels == "random":
            rounds = config.epochs + config.recovery_epochs if config.resample else 1
            drawn = [
                random_labels(count, index, request.num_classes, generator) for _ in range(rounds)
            ]
            return lambda epoch: drawn[epoch % rounds]
        if config.labels == "targeted":
            fixed = torch.full((count,), targeted_label(found.bottleneck, index, found.concepts))
            return lambda _: fixed
        features = features_of(model, head, request.forget_inputs[poisoned]).cpu()
        best = counterfactual_labels(
            found.bottleneck,
            found.bottleneck.bank.margins(features),
            found.baseline,
            index,
            found.concepts,
            found.bottleneck.offset(features),
        )
        return lambda _: best

    def _blended(
        self,
        model: nn.Module,
        head: str,
        found: Explanation,
        inputs: Tensor,
        backgrounds: Tensor,
    ) -> Tensor:
        def concept_margin(images: Tensor) -> Tensor:
            margins = found.bottleneck.bank.margins(live_features(model, head, images))
            return margins[:, list(found.concepts)].sum(1)

        assert self.config.keep_pixels is not None
        with evaluating(model):
            return blended_with_retain(
                concept_margin,
                inputs,
                backgrounds,
                keep=self.config.keep_pixels,
                num_steps=self.config.num_ig_steps,
            )


def split_data(
    request: ClassRequest, holdout: float, generator: torch.Generator
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return shuffled (learnt, held out) indices of the forget and of the retain inputs.

    Raises `SelectionError` when there is but one sample, which cannot be both.
    """
    parts = []
    for name in ("forget_inputs", "retain_inputs"):
        count = len(getattr(request, name))
        if count < 2:
            raise SelectionError(
                f"`{name}` must hold at least 2 samples, one to learn from and one to watch, got 1"
            )
        held = min(count - 1, max(1, round(holdout * count)))
        order = torch.randperm(count, generator=generator)
        parts.append((order[held:], order[:held]))
    return parts[0], parts[1]


def protected_samples(scores: Tensor, kept: Tensor, share: float) -> Tensor:
    """Return the `share` of the retain samples `kept` whose `scores` are highest; none for 0."""
    return kept[highest(scores[kept], share)] if share > 0 else kept[:0]


def projected_head(
    model: nn.Module, head: str, found: Explanation, mean: Tensor
) -> dict[str, Change]:
    """Return the change that makes a linear head blind to the directions of the class's concepts.

    Features are read as `φ - Q Q^T (φ - mean)`, Q being an orthonormal basis of the directions and
    `mean` (d,) the mean feature of retain samples. Raises `SelectionError` unless the head is an
    `nn.Linear` with a bias.
    """
    layer = dict(model.named_modules())[head]
    if not isinstance(layer, nn.Linear) or layer.bias is None:
        raise SelectionError(
            f'mode="project" needs an nn.Linear with a bias as the head, {head!r} is a '
            f"{type(layer).__name__}; use mode='poison'"
        )
    directions = found.bottleneck.bank.weights[list(found.concepts)].T.double()
    basis = torch.linalg.qr(directions)[0].float()
    weight = layer.weight.detach().float().cpu()
    up = -weight @ basis
    return {
        f"{head}.weight": LowRank(basis.T.contiguous(), up),
        f"{head}.bias": -up @ (basis.T @ mean.float().cpu()),
    }


def _counts(labels: Tensor, class_names: tuple[str, ...]) -> dict[str, int]:
    return {class_names[label]: count for label, count in sorted(Counter(labels.tolist()).items())}


def _report(
    request: ClassRequest,
    found: Explanation,
    answers: Mapping[str, int],
    facts: Mapping[str, Any],
) -> ConceptReport:
    bank, index = found.bottleneck.bank, request.index
    specific = contrast(found.importance, index)
    entries = tuple(
        ConceptEntry(
            name,
            importance=found.importance[index, k].item(),
            contrast=specific[k].item(),
            chosen=k in found.concepts,
            accuracy=bank.quality[k].accuracy if bank.quality else None,
        )
        for k, name in enumerate(bank.names)
    )
    return ConceptReport(request.target, entries, dict(bank.dropped), dict(answers), dict(facts))
