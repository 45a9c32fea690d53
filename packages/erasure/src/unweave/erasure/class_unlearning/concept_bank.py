"""Concept activation vectors: one linear direction in feature space for each named concept."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from unweave.diffusion_core.errors import SelectionError
from unweave.erasure.class_unlearning.classifier import check_finite

MIN_SAMPLES = 4
"""Positive or negative samples below which a concept cannot be split into fit and validation."""

_SVM_STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)


@dataclass(frozen=True)
class ConceptSamples:
    """Inputs (n, ...) that show a concept, and inputs that do not; or features (n, d) of such."""

    positive: Tensor
    negative: Tensor


@dataclass(frozen=True)
class ConceptQuality:
    """How well a concept's direction separates: accuracies in [0, 1], the C of its SVM, margins.

    `margins` has max, min, mean, std, 10 % and 90 % quantiles and count of the geometric margins
    of positive and negative samples, keys such as "positive_mean".
    """

    train_accuracy: float
    accuracy: float
    svm_c: float
    margins: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ConceptBank:
    """Directions `weights` (k, d) with `intercepts` (k,) of the concepts `names`.

    `quality` is one entry a concept, empty for banks made of text. `dropped` are the concepts left
    out because their validation accuracy, given here, was too low.
    """

    names: tuple[str, ...]
    weights: Tensor
    intercepts: Tensor
    quality: tuple[ConceptQuality, ...] = ()
    dropped: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.names) < 2 or len(set(self.names)) != len(self.names):
            raise SelectionError(
                "a concept bank needs at least 2 concepts with names of their own, got "
                f"{list(self.names)}"
                + (f"; dropped for low accuracy: {dict(self.dropped)}" if self.dropped else "")
            )
        if self.weights.shape[:1] != (len(self.names),) or self.weights.ndim != 2:
            raise SelectionError(
                f"`weights` must be ({len(self.names)}, d), got {tuple(self.weights.shape)}"
            )
        check_finite("`weights`", self.weights)
        if not self.weights.any(dim=1).all():
            raise SelectionError("`weights` must give each concept a direction, got a row of zeros")

    def margins(self, features: Tensor) -> Tensor:
        """Return concept coordinates (n, k): geometric margins of `features` (n, d).

        `m_k(x) = (w_k φ(x) + b_k) / ||w_k||`, PCBM (arXiv 2205.15480).
        """
        weights = self.weights.to(features)
        scores = features @ weights.T + self.intercepts.to(features)
        margins: Tensor = scores / weights.norm(dim=1)
        return margins


def fit_concept_bank(
    samples: Mapping[str, ConceptSamples], *, min_accuracy: float = 0.7, seed: int = 0
) -> ConceptBank:
    """Fit a linear SVM to the features of each concept and keep those that generalise.

    Half of the samples fit the SVM, half choose its C out of 0.001 to 10. Concepts with less
    validation accuracy than `min_accuracy` are dropped. Raises `SelectionError` for a concept
    with fewer than `MIN_SAMPLES` positive or negative samples, or when fewer than two concepts
    are left, `NonFiniteError` for NaN or infinite features.

    >>> positive, negative = torch.randn(20, 3) + 3, torch.randn(20, 3) - 3
    >>> samples = {name: ConceptSamples(positive, negative) for name in ("round", "red")}
    >>> fit_concept_bank(samples).weights.shape
    torch.Size([2, 3])
    """
    fitted = {name: _fit_concept(name, part, seed) for name, part in samples.items()}
    kept = {name: found for name, found in fitted.items() if found[2].accuracy >= min_accuracy}
    dropped = {name: found[2].accuracy for name, found in fitted.items() if name not in kept}
    if not kept:
        raise SelectionError(
            f"no concept of {list(samples)} reaches the validation accuracy {min_accuracy}, got "
            f"{dropped}; give more samples, or concepts that the features know"
        )
    return ConceptBank(
        names=tuple(kept),
        weights=torch.stack([weight for weight, _, _ in kept.values()]),
        intercepts=torch.tensor([intercept for _, intercept, _ in kept.values()]),
        quality=tuple(quality for _, _, quality in kept.values()),
        dropped=dropped,
    )


def text_concept_bank(names: Sequence[str], embeddings: Tensor) -> ConceptBank:
    """Return the bank of a CLIP backbone: text `embeddings` (k, d) as directions, intercepts 0."""
    return ConceptBank(tuple(names), embeddings.detach().float(), torch.zeros(len(names)))


def _fit_concept(
    name: str, samples: ConceptSamples, seed: int
) -> tuple[Tensor, float, ConceptQuality]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import train_test_split
    from sklearn.svm import LinearSVC

    for kind in ("positive", "negative"):
        part: Tensor = getattr(samples, kind)
        if len(part) < MIN_SAMPLES:
            raise SelectionError(
                f"the concept {name!r} must have at least {MIN_SAMPLES} {kind} samples, 50 or more "
                f"being usual, got {len(part)}"
            )
        check_finite(f"the {kind} samples of {name!r}", part)
    both = torch.cat([samples.positive, samples.negative]).detach().cpu().double().numpy()
    present = np.arange(len(both)) < len(samples.positive)
    train_x, val_x, train_y, val_y = train_test_split(
        both, present, test_size=0.5, stratify=present, random_state=seed
    )
    best, chosen = -1.0, None
    with warnings.catch_warnings():
        # A large C may not converge: validation then prefers another.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for strength in _SVM_STRENGTHS:
            svm = LinearSVC(C=strength, random_state=seed, max_iter=2000).fit(train_x, train_y)
            accuracy = float(svm.score(val_x, val_y))
            if accuracy > best:
                best, chosen = accuracy, svm
    assert chosen is not None
    weight, intercept = chosen.coef_[0], float(chosen.intercept_[0])
    margins = (both @ weight + intercept) / max(float(np.linalg.norm(weight)), 1e-12)
    quality = ConceptQuality(
        train_accuracy=float(chosen.score(train_x, train_y)),
        accuracy=best,
        svm_c=float(chosen.C),
        margins={
            **_statistics("positive", margins[present]),
            **_statistics("negative", margins[~present]),
        },
    )
    return torch.from_numpy(weight).float(), intercept, quality


def _statistics(kind: str, margins: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(margins, [0.1, 0.9])
    values = {
        "max": margins.max(),
        "min": margins.min(),
        "mean": margins.mean(),
        "std": margins.std(),
        "quantile_10": low,
        "quantile_90": high,
        "count": len(margins),
    }
    return {f"{kind}_{name}": float(value) for name, value in values.items()}
