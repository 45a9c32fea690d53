"""A post-hoc concept bottleneck (PCBM, arXiv 2205.15480): classes as sparse sums of concepts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from unweave.diffusion_core.errors import SelectionError
from unweave.erasure.class_unlearning.classifier import check_finite, check_labels
from unweave.erasure.class_unlearning.concept_bank import ConceptBank


@dataclass(frozen=True)
class ConceptBottleneck:
    """A linear layer `F(m) = W m + b` on the margins of a concept bank.

    `weight` is (classes, k), `bias` (classes,), and `scale` (k,) the standard deviation of each
    margin where the layer was fitted. The hybrid has a `residual` (classes, d) on the features
    too: `F(m) + R φ(x)`.
    """

    bank: ConceptBank
    weight: Tensor
    bias: Tensor
    scale: Tensor
    residual: Tensor | None = None

    def logits(self, margins: Tensor, offset: Tensor | None = None) -> Tensor:
        """Return logits (n, classes) of `margins` (n, k), plus an `offset` of that shape."""
        logits = margins @ self.weight.T.to(margins) + self.bias.to(margins)
        return logits if offset is None else logits + offset

    def offset(self, features: Tensor) -> Tensor | None:
        """Return what the residual adds to the logits, (n, classes); None without a residual."""
        return None if self.residual is None else features @ self.residual.T.to(features)

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Return the share of `features` (n, d) whose class is `labels` (n,)."""
        logits = self.logits(self.bank.margins(features), self.offset(features))
        return (logits.argmax(1) == labels).float().mean().item()


def fit_bottleneck(
    bank: ConceptBank,
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    strength: float = 1e-5,
    l1_ratio: float = 0.99,
    max_iter: int = 10_000,
    hybrid: bool = False,
    seed: int = 0,
) -> ConceptBottleneck:
    """Fit the linear layer to `features` (n, d) with `labels` (n,).

    Multinomial logistic regression under an elastic net, `strength` times (`l1_ratio` L1 + the
    rest L2), fitted by stochastic average gradients to standardised margins, whose scale is then
    folded into the weights. With `hybrid` a ridge-penalised residual on the features is fitted
    while the layer stays as it is. Raises `SelectionError` when a class has no sample.
    """
    from sklearn.linear_model import LogisticRegression

    check_labels("labels", labels, features, num_classes)
    check_finite("`features`", features)
    missing = sorted(set(range(num_classes)) - set(labels.tolist()))
    if missing:
        raise SelectionError(
            f"`labels` must hold every one of {num_classes} classes, {missing} have no sample"
        )
    margins = bank.margins(features).double().cpu()
    mean, scale = margins.mean(0), margins.std(0).clamp_min(1e-12)
    classifier = LogisticRegression(
        solver="saga",
        C=1 / (strength * len(features)),
        l1_ratio=l1_ratio,
        max_iter=max_iter,
        tol=1e-3,
        random_state=seed,
    ).fit(((margins - mean) / scale).numpy(), labels.cpu().numpy())
    weight = torch.from_numpy(classifier.coef_) / scale
    bias = torch.from_numpy(classifier.intercept_) - weight @ mean
    layer = ConceptBottleneck(bank, weight.float(), bias.float(), scale.float())
    if not hybrid:
        return layer
    residual = _fit_residual(layer.logits(bank.margins(features)), features, labels, strength)
    return replace(layer, residual=residual)


def _fit_residual(logits: Tensor, features: Tensor, labels: Tensor, strength: float) -> Tensor:
    """Return R (classes, d) that minimises the cross-entropy of `logits + R φ`."""
    residual = torch.zeros(logits.shape[1], features.shape[1], requires_grad=True)
    given, inputs = logits.detach().float().cpu(), features.detach().float().cpu()
    optimizer = torch.optim.LBFGS([residual], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(given + inputs @ residual.T, labels.cpu())
        loss = loss + strength * residual.square().sum()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)
    return residual.detach()
