"""How far a class is gone, what else suffered, and whether the model gives it away."""

from __future__ import annotations

import copy
from dataclasses import astuple, dataclass
from statistics import fmean

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from unweave.diffusion_core.errors import SelectionError
from unweave.erasure.class_unlearning.classifier import all_logits, evaluating, logits_of

_MAX_PROBED = 2000


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Return the share of `inputs` (n, ...) whose likeliest class is their label (n,)."""
    return (all_logits(model, inputs).argmax(1) == labels).float().mean().item()


def kl_from_retrained(retrained: nn.Module, unlearned: nn.Module, inputs: Tensor) -> float:
    """Return the mean over `inputs` of KL(retrained || unlearned), in nats."""
    expected = all_logits(retrained, inputs).log_softmax(1)
    found = all_logits(unlearned, inputs).log_softmax(1)
    divergence = functional.kl_div(found, expected, reduction="batchmean", log_target=True)
    return divergence.item()


def membership_features(logits: Tensor) -> np.ndarray:
    """Return what a confidence attack sees: sorted probabilities and their entropy, (n, c + 1)."""
    probabilities = logits.double().softmax(1)
    entropy = -(probabilities * probabilities.clamp_min(1e-30).log()).sum(1, keepdim=True)
    ordered = probabilities.sort(1, descending=True).values
    features: np.ndarray = torch.cat([ordered, entropy], 1).cpu().numpy()
    return features


def share_called_non_member(
    model: nn.Module, members: Tensor, non_members: Tensor, inputs: Tensor
) -> float:
    """Return the share of `inputs` that a membership-inference attack takes for unseen data.

    The attack is a logistic regression on `membership_features`, fitted to training samples of
    the kept classes (`members`) and to test samples of them (`non_members`), balanced.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    groups = [membership_features(all_logits(model, part)) for part in (members, non_members)]
    labels = np.repeat([1, 0], [len(group) for group in groups])
    attack = make_pipeline(
        StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000)
    ).fit(np.concatenate(groups), labels)
    called = attack.predict(membership_features(all_logits(model, inputs)))
    return float((called == 0).mean())


def probe_accuracy(target: Tensor, others: Tensor, *, seed: int = 0) -> float:
    """Return the balanced accuracy of a linear probe that tells features (n, d) from (m, d).

    0.5 is chance, 1 means that the class is still linearly decodable. Half of at most 2000
    samples of each side fit the logistic regression, the other half is judged. Raises
    `SelectionError` for fewer than 2 samples of either.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    generator = torch.Generator().manual_seed(seed)
    parts = []
    for name, features in (("target", target), ("others", others)):
        if len(features) < 2:
            raise SelectionError(
                f"`{name}` must hold at least 2 samples to fit and judge a probe, got "
                f"{len(features)}"
            )
        chosen = torch.randperm(len(features), generator=generator)[:_MAX_PROBED]
        parts.append(features.cpu()[chosen].double().numpy())
    labels = np.repeat([1, 0], [len(part) for part in parts])
    train_x, test_x, train_y, test_y = train_test_split(
        np.concatenate(parts), labels, test_size=0.5, stratify=labels, random_state=seed
    )
    probe = make_pipeline(
        StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000)
    ).fit(train_x, train_y)
    return float(balanced_accuracy_score(test_y, probe.predict(test_x)))


def relearning_steps(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    class_index: int,
    goal: float = 0.5,
    lr: float = 1e-3,
    max_steps: int = 200,
) -> int:
    """Return after how many full-batch steps of SGD on all classes the class is back.

    Back means that `goal` of the `inputs` labelled `class_index` is recognised; `max_steps` when
    that does not happen. `model` itself stays as it is.
    """
    learner = copy.deepcopy(model).requires_grad_(True)
    own = labels == class_index
    optimizer = torch.optim.SGD(learner.parameters(), lr=lr, momentum=0.9)
    with evaluating(learner):
        for step in range(max_steps):
            if accuracy(learner, inputs[own], labels[own]) >= goal:
                return step
            optimizer.zero_grad()
            loss = functional.cross_entropy(logits_of(learner, inputs), labels)
            torch.autograd.backward(loss)
            optimizer.step()
    return max_steps


@dataclass(frozen=True)
class ClassScores:
    """Accuracy on the forgotten class and on the others, and the membership attack's verdict."""

    forget_train: float
    forget_test: float
    retain_train: float
    retain_test: float
    called_non_member: float

    def gap(self, retrained: ClassScores) -> float:
        """Return the mean absolute difference to the scores of a model retrained from scratch."""
        ours, theirs = astuple(self), astuple(retrained)
        return fmean(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def class_scores(
    model: nn.Module,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    class_index: int,
) -> ClassScores:
    """Return the scores of `model` on `train` and `test`, each (inputs, labels), all classes."""
    own_train, own_test = train[1] == class_index, test[1] == class_index
    for name, own in (("train", own_train), ("test", own_test)):
        if not own.any() or own.all():
            raise SelectionError(
                f"`{name}` must hold samples of class {class_index} and of others, got "
                f"{int(own.sum())} of {len(own)}"
            )
    return ClassScores(
        forget_train=accuracy(model, train[0][own_train], train[1][own_train]),
        forget_test=accuracy(model, test[0][own_test], test[1][own_test]),
        retain_train=accuracy(model, train[0][~own_train], train[1][~own_train]),
        retain_test=accuracy(model, test[0][~own_test], test[1][~own_test]),
        called_non_member=share_called_non_member(
            model, train[0][~own_train], test[0][~own_test], train[0][own_train]
        ),
    )
