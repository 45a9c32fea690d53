"""Which samples are poisoned and with which labels, and which look-alikes are protected."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from unweave.diffusion_core.errors import SelectionError
from unweave.erasure.class_unlearning.attribution import integrated_gradients
from unweave.erasure.class_unlearning.bottleneck import ConceptBottleneck


def highest(scores: Tensor, fraction: float) -> Tensor:
    """Return the indices of the `fraction` of `scores` (n,) that are highest, at least one.

    >>> highest(torch.tensor([0.1, 0.9, 0.5, 0.3]), 0.5).tolist()
    [1, 2]
    """
    count = max(1, round(fraction * len(scores)))
    return scores.argsort(descending=True, stable=True)[:count]


def random_labels(
    count: int, class_index: int, num_classes: int, generator: torch.Generator
) -> Tensor:
    """Return `count` labels drawn evenly from all classes but `class_index`."""
    drawn = torch.randint(num_classes - 1, (count,), generator=generator)
    return drawn + (drawn >= class_index)


def targeted_label(bottleneck: ConceptBottleneck, class_index: int, concepts: Sequence[int]) -> int:
    """Return the class most like `class_index` in all but its own `concepts`.

    `argmax_c cos(W_c, W_u)` over the concepts outside the given ones, weights being those of
    standardised margins, since the spread of a margin differs from concept to concept. Raises
    `SelectionError` when none are outside.
    """
    outside = [k for k in range(bottleneck.weight.shape[1]) if k not in set(concepts)]
    if not outside:
        raise SelectionError(
            f"all {len(concepts)} concepts belong to the class, so no concept is left by which "
            "others resemble it; add concepts or lower `coverage`"
        )
    rows = (bottleneck.weight * bottleneck.scale)[:, outside]
    likeness = functional.cosine_similarity(rows, rows[class_index][None], dim=1)
    likeness[class_index] = -torch.inf
    return int(likeness.argmax())


def counterfactual_labels(
    bottleneck: ConceptBottleneck,
    margins: Tensor,
    baseline: Tensor,
    class_index: int,
    concepts: Sequence[int],
    offset: Tensor | None = None,
) -> Tensor:
    """Return the best other class of each sample once `concepts` are at the `baseline` (k,).

    Labels are (n,) for `margins` (n, k); `offset` (n, classes) is the residual of a hybrid.
    """
    without = margins.clone()
    without[:, list(concepts)] = baseline[list(concepts)]
    logits = bottleneck.logits(without, offset)
    logits[:, class_index] = -torch.inf
    return logits.argmax(1)


def blended_with_retain(
    concept_margin: Callable[[Tensor], Tensor],
    inputs: Tensor,
    backgrounds: Tensor,
    *,
    keep: float,
    num_steps: int,
) -> Tensor:
    """Keep the pixels of `inputs` that carry the concepts; take the others from `backgrounds`.

    `concept_margin` gives the summed margin (n,) of the concepts; the `keep` share of pixels with
    the largest absolute integrated gradient over a mean-coloured image stays. Images are
    (n, channels, h, w), and so are `backgrounds`.
    """
    if inputs.ndim != 4:
        raise SelectionError(
            f"pixels can be blended in images (n, channels, h, w) only, got {tuple(inputs.shape)}"
        )
    baseline = inputs.mean((2, 3), keepdim=True).expand_as(inputs)
    found = integrated_gradients(concept_margin, inputs, baseline, num_steps)
    saliency = found.abs().sum(1).flatten(1)
    count = max(1, round(keep * saliency.shape[1]))
    kept = torch.zeros_like(saliency, dtype=torch.bool)
    kept.scatter_(1, saliency.topk(count).indices, True)
    return torch.where(kept.reshape(len(inputs), 1, *inputs.shape[2:]), inputs, backgrounds)
