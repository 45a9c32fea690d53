"""Which concepts carry a class, and how much of them is in each sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from unweave.diffusion_core.errors import SelectionError
from unweave.erasure.class_unlearning.attribution import (
    attribution_scores,
    class_importance,
    concept_attributions,
    contrast,
    covering_concepts,
)
from unweave.erasure.class_unlearning.bottleneck import ConceptBottleneck, fit_bottleneck
from unweave.erasure.class_unlearning.classifier import ClassRequest, all_logits, features_of
from unweave.erasure.class_unlearning.concept_bank import (
    ConceptBank,
    ConceptSamples,
    fit_concept_bank,
)

if TYPE_CHECKING:
    from unweave.erasure.class_unlearning.class_unlearner import ClassUnlearningConfig


@dataclass(frozen=True)
class Explanation:
    """Which concepts carry the class: (classes, k) `importance`, and scores of every sample.

    `concepts` are the indices of the class's own concepts; `forget_scores` (n,) and
    `retain_scores` (m,) are what these add to the class in each sample.
    """

    bottleneck: ConceptBottleneck
    baseline: Tensor
    importance: Tensor
    concepts: tuple[int, ...]
    forget_scores: Tensor
    retain_scores: Tensor
    head_accuracy: float
    bottleneck_accuracy: float


def explain_class(
    model: nn.Module,
    request: ClassRequest,
    concepts: ConceptBank | Mapping[str, ConceptSamples],
    config: ClassUnlearningConfig,
    *,
    head: str,
    seed: int = 0,
) -> Explanation:
    """Fit the bottleneck to what enters `head` and attribute the class to its concepts.

    Raises `SelectionError` when the bank does not fit the features, or when the bottleneck is less
    accurate than the head by more than `config.max_fidelity_gap`.
    """
    index = request.index
    inputs = torch.cat([request.forget_inputs, request.retain_inputs])
    own = torch.full((len(request.forget_inputs),), index)
    labels = torch.cat([own, request.retain_labels.cpu()])
    features = features_of(model, head, inputs).cpu()
    bank = _bank(concepts, model, head, config, seed)
    if bank.weights.shape[1] != features.shape[1]:
        raise SelectionError(
            f"the concept bank has directions of {bank.weights.shape[1]} dimensions, and the "
            f"features before {head!r} have {features.shape[1]}; fit it on these features"
        )
    bottleneck = fit_bottleneck(
        bank,
        features,
        labels,
        request.num_classes,
        strength=config.strength,
        l1_ratio=config.l1_ratio,
        hybrid=config.hybrid,
        seed=seed,
    )
    predicted = all_logits(model, inputs).argmax(1).cpu()
    head_accuracy = (predicted == labels).float().mean().item()
    fidelity = bottleneck.accuracy(features, labels)
    if head_accuracy - fidelity > config.max_fidelity_gap:
        raise SelectionError(
            f"the concepts {bank.names} explain {fidelity:.1%} of the classes and the model's "
            f"head {head_accuracy:.1%}, a gap above `max_fidelity_gap` "
            f"{config.max_fidelity_gap:.1%}; add concepts, or set hybrid=True"
        )
    margins, offset = bank.margins(features), bottleneck.offset(features)
    retained = margins[labels != index].mean(0)
    baseline = retained if config.baseline == "retain-mean" else torch.zeros_like(retained)
    importance = class_importance(
        bottleneck,
        margins,
        labels,
        baseline,
        of=config.explain,
        offset=offset,
        num_steps=config.num_ig_steps,
    )
    chosen = covering_concepts(
        importance[index] if config.concepts_by == "importance" else contrast(importance, index),
        config.coverage,
    )
    attributions = concept_attributions(
        bottleneck,
        margins,
        baseline,
        index,
        of=config.explain,
        offset=offset,
        num_steps=config.num_ig_steps,
    )
    scores = attribution_scores(attributions, chosen)
    count = len(own)
    return Explanation(
        bottleneck,
        baseline,
        importance,
        chosen,
        scores[:count],
        scores[count:],
        head_accuracy,
        fidelity,
    )


def _bank(
    concepts: ConceptBank | Mapping[str, ConceptSamples],
    model: nn.Module,
    head: str,
    config: ClassUnlearningConfig,
    seed: int,
) -> ConceptBank:
    if isinstance(concepts, ConceptBank):
        return concepts
    samples = {}
    for name, part in concepts.items():
        if not len(part.positive) or not len(part.negative):
            raise SelectionError(f"the concept {name!r} has no positive or no negative samples")
        samples[name] = ConceptSamples(
            features_of(model, head, part.positive).cpu(),
            features_of(model, head, part.negative).cpu(),
        )
    return fit_concept_bank(samples, min_accuracy=config.min_concept_accuracy, seed=seed)
