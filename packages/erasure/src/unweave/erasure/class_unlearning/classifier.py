"""A classifier `f = h(φ(x))` seen from outside: its logits, and the features before its head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unweave.diffusion_core.errors import ImageError, NonFiniteError, SelectionError


@dataclass(frozen=True)
class ClassRequest:
    """Which class to unlearn, and the data to do it with.

    `target` is one of `class_names`, which are in the order of the logits. `forget_inputs`
    (n, ...) are training inputs of that class, `retain_inputs` (m, ...) with `retain_labels` (m,)
    of all the others. `surrogate` says that the forget inputs only look like the training data of
    the class, which is gone; the report records it. Raises `SelectionError` for an unknown class,
    for empty data and for labels that do not fit, `NonFiniteError` for NaN or infinite inputs.
    """

    target: str
    class_names: tuple[str, ...]
    forget_inputs: Tensor
    retain_inputs: Tensor
    retain_labels: Tensor
    surrogate: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if len(set(self.class_names)) != len(self.class_names) or len(self.class_names) < 3:
            raise SelectionError(
                "`class_names` must be at least 3 different names, so that 2 are left without the "
                f"target, got {self.class_names!r}"
            )
        if self.target not in self.class_names:
            raise SelectionError(
                f"`target` must be one of the classes {self.class_names}, got {self.target!r}"
            )
        check_inputs("forget_inputs", self.forget_inputs)
        check_inputs("retain_inputs", self.retain_inputs)
        if self.forget_inputs.shape[1:] != self.retain_inputs.shape[1:]:
            raise ImageError(
                "`forget_inputs` and `retain_inputs` must be of one shape, got "
                f"{tuple(self.forget_inputs.shape[1:])} and {tuple(self.retain_inputs.shape[1:])}"
            )
        check_labels("retain_labels", self.retain_labels, self.retain_inputs, self.num_classes)
        missing = set(range(self.num_classes)) - set(self.retain_labels.tolist())
        if missing != {self.index}:
            wrong = missing - {self.index}
            problem = (
                f"samples of {[self.class_names[c] for c in sorted(wrong)]} are missing"
                if wrong
                else f"{self.target!r} itself is among them"
            )
            raise SelectionError(
                "`retain_labels` must hold every class but the target, since only what is shown "
                f"can be kept; {problem}"
            )

    @property
    def num_classes(self) -> int:
        """How many classes the classifier knows, the target included."""
        return len(self.class_names)

    @property
    def index(self) -> int:
        """The target's place among the logits."""
        return self.class_names.index(self.target)


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the logits (n, classes) of a plain module or of a transformers classifier."""
    output = model(inputs)
    logits: Tensor = getattr(output, "logits", output)
    return logits


@torch.no_grad()
def all_logits(model: nn.Module, inputs: Tensor, batch_size: int = 256) -> Tensor:
    """Return the logits (n, classes) of any number of inputs, in evaluation mode."""
    with evaluating(model):
        return torch.cat([logits_of(model, part) for part in inputs.split(batch_size)])


def live_features(model: nn.Module, head: str, inputs: Tensor) -> Tensor:
    """Return what enters the module `head`, flattened to (n, d), as part of the graph.

    Raises `SelectionError` when `model` has no such module or does not call it.
    """
    modules = dict(model.named_modules())
    if head not in modules or not head:
        last = list(modules)[-1]
        raise SelectionError(
            f"`head` must name the module of {type(model).__name__} that turns features into "
            f"logits, such as {last!r}, got {head!r}"
        )
    seen: list[Tensor] = []
    hook = modules[head].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        logits_of(model, inputs)
    finally:
        hook.remove()
    if not seen:
        raise SelectionError(f"`head` {head!r} is not called by {type(model).__name__}")
    return seen[-1].flatten(1)


@torch.no_grad()
def features_of(model: nn.Module, head: str, inputs: Tensor, batch_size: int = 256) -> Tensor:
    """Return the features (n, d) of any number of inputs, in evaluation mode.

    Raises `NonFiniteError` for NaN or infinite features.
    """
    with evaluating(model):
        parts = [live_features(model, head, part) for part in inputs.split(batch_size)]
    features = torch.cat(parts)
    check_finite(f"the features before {head!r}", features)
    return features


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode and every module back into its own mode at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_inputs(name: str, inputs: Tensor) -> None:
    """Raise `SelectionError` for no inputs at all, `NonFiniteError` for NaN or infinite ones."""
    if inputs.ndim < 2 or len(inputs) == 0:
        raise SelectionError(
            f"`{name}` must be a batch (n, ...) of at least one sample, got {tuple(inputs.shape)}"
        )
    check_finite(f"`{name}`", inputs)


def check_finite(what: str, values: Tensor) -> None:
    """Raise `NonFiniteError` saying how many of `values` are NaN or infinite, if any."""
    count = int((~values.isfinite()).sum())
    if count:
        raise NonFiniteError(
            f"{what} must be finite, got {count} NaN or infinite values of {values.numel()}; "
            "remove those samples or use float32"
        )


def check_labels(name: str, labels: Tensor, inputs: Tensor, num_classes: int) -> None:
    """Raise `SelectionError` unless `labels` (n,) are one class number for each input."""
    if labels.shape != inputs.shape[:1]:
        raise SelectionError(
            f"`{name}` must hold one label for each of the {len(inputs)} inputs, got the shape "
            f"{tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.min() < 0 or labels.max() >= num_classes:
        raise SelectionError(
            f"`{name}` must be whole numbers from 0 to {num_classes - 1}, got {labels.dtype} from "
            f"{labels.min().item()} to {labels.max().item()}"
        )
