"""Integrated gradients, and the concepts by which a bottleneck knows a class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from unweave.diffusion_core.errors import SelectionError
from unweave.erasure.class_unlearning.bottleneck import ConceptBottleneck

Of = Literal["probability", "logit"]


def integrated_gradients(
    function: Callable[[Tensor], Tensor], inputs: Tensor, baseline: Tensor, num_steps: int = 50
) -> Tensor:
    r"""Return what each entry of `inputs` (n, ...) adds to `function`, which gives (n,) values.

    .. math::
        \mathrm{IG}_k(x) = (x_k - x'_k) \frac{1}{S} \sum_{s=1}^{S}
        \frac{\partial f}{\partial x_k}\Big(x' + \frac{s - 0.5}{S} (x - x')\Big)

    with the midpoint rule (Sundararajan et al., arXiv 1703.01365). `baseline` is of the shape of
    one input or of all. The sum over entries is close to `f(x) - f(x')`, exactly so for linear
    functions.

    >>> integrated_gradients(lambda x: x.sum(1), torch.ones(1, 2), torch.zeros(2)).tolist()
    [[1.0, 1.0]]
    """
    if num_steps < 1:
        raise SelectionError(f"`num_steps` must be at least 1, got {num_steps}")
    difference = inputs - baseline
    total = torch.zeros_like(inputs)
    for step in range(num_steps):
        point = (baseline + (step + 0.5) / num_steps * difference).detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(function(point).sum(), point)
        total += gradient
    return difference * total / num_steps


def concept_attributions(
    bottleneck: ConceptBottleneck,
    margins: Tensor,
    baseline: Tensor,
    class_index: int,
    *,
    of: Of = "probability",
    offset: Tensor | None = None,
    num_steps: int = 50,
) -> Tensor:
    """Return what each concept adds to a class, (n, k), for `margins` (n, k) over `baseline` (k,).

    `of="logit"` explains the class's logit, for which the sum is `W_u (m - m')` and needs no
    steps. `offset` (n, classes) is the residual part of a hybrid, which stays fixed.
    """
    if of == "logit":
        return bottleneck.weight[class_index].to(margins) * (margins - baseline)

    def probability(points: Tensor) -> Tensor:
        return bottleneck.logits(points, offset).softmax(1)[:, class_index]

    return integrated_gradients(probability, margins, baseline, num_steps)


def class_importance(
    bottleneck: ConceptBottleneck,
    margins: Tensor,
    labels: Tensor,
    baseline: Tensor,
    *,
    of: Of = "probability",
    offset: Tensor | None = None,
    num_steps: int = 50,
) -> Tensor:
    """Return `A_{c,k}` (classes, k): the mean attribution of concept k to c in samples of c."""
    rows = []
    for index in range(len(bottleneck.bias)):
        own = labels == index
        part = None if offset is None else offset[own]
        found = concept_attributions(
            bottleneck, margins[own], baseline, index, of=of, offset=part, num_steps=num_steps
        )
        rows.append(found.mean(0))
    return torch.stack(rows)


def contrast(importance: Tensor, class_index: int) -> Tensor:
    """Return `A_{u,k} - max_{c != u} A_{c,k}` (k,): above 0 for concepts specific to the class."""
    others = torch.arange(len(importance)) != class_index
    return importance[class_index] - importance[others].max(0).values


def covering_concepts(scores: Tensor, coverage: float = 0.8) -> tuple[int, ...]:
    """Return the fewest top entries of `scores` (k,) that hold `coverage` of its positive mass.

    Raises `SelectionError` when no score is positive.

    >>> covering_concepts(torch.tensor([0.1, 0.6, -0.5, 0.3]))
    (1, 3)
    """
    positive = scores.clamp_min(0)
    if not positive.sum() > 0:
        raise SelectionError(
            f"no concept speaks for the class, whose importances are {scores.tolist()}; add "
            "concepts that describe it"
        )
    order = positive.argsort(descending=True, stable=True)
    share = positive[order].double().cumsum(0) / positive.sum().double()
    count = int((share < coverage - 1e-9).sum()) + 1
    return tuple(order[:count].tolist())


def attribution_scores(attributions: Tensor, concepts: Sequence[int]) -> Tensor:
    """Return `a(x)` (n,): the sum of `attributions` (n, k) over `concepts`."""
    return attributions[:, list(concepts)].sum(1)
