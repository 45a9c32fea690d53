"""Fine-tuning a classifier on poison and retain samples, 1:1 in every batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from unweave.diffusion_core.parameters import train_only
from unweave.diffusion_core.training import batch_indices, run_training
from unweave.erasure.class_unlearning.classifier import all_logits, evaluating, logits_of
from unweave.erasure.protocol import changes_since, check_trainable, restored

if TYPE_CHECKING:
    from unweave.erasure.class_unlearning.class_unlearner import ClassUnlearningConfig

Stop = Literal["epochs", "forgotten", "retain dropped"]


@dataclass(frozen=True)
class TrainingData:
    """What is learnt and what is watched.

    `forget_inputs` (p, ...) are given the labels (p,) of `forget_labels(epoch)`. `held_forget` and
    `held_retain` with `held_retain_labels` are watched for stopping and never trained on.
    """

    forget_inputs: Tensor
    forget_labels: Callable[[int], Tensor]
    retain_inputs: Tensor
    retain_labels: Tensor
    held_forget: Tensor
    held_retain: Tensor
    held_retain_labels: Tensor
    class_index: int
    num_classes: int


@dataclass(frozen=True)
class FineTuned:
    """What fine-tuning changed, the loss of each step, how many epochs it took and why it ended."""

    changes: dict[str, Tensor]
    history: list[float]
    epochs: int
    stopped: Stop


def fine_tune(
    model: nn.Module,
    data: TrainingData,
    config: ClassUnlearningConfig,
    *,
    seed: int,
    forget_weight: float = 1.0,
    mask: Mapping[str, Tensor] | None = None,
    progress: bool = True,
) -> FineTuned:
    """Train all parameters; `model` has its old weights back at the end.

    Each step takes a batch of forget and one of retain samples and minimises the sum of their mean
    cross-entropies, the first times `forget_weight`: -1 is gradient ascent, 0 trains on the retain
    samples alone. With `mask`, 0 or 1 by parameter name, the others stay. The model is in
    evaluation mode: dropout is off, and the statistics of batch normalisation stay as they are.
    """
    parameters = dict(model.named_parameters())
    check_trainable(parameters)
    retain_before = _held_retain_accuracy(model, data)
    history: list[float] = []
    stopped: Stop = "epochs"
    epoch, last = 0, config.epochs
    with restored(parameters) as originals, train_only([model], parameters), evaluating(model):
        optimizer = _optimizer(parameters, config)
        hooks = _masked(parameters, mask or {})
        try:
            while epoch < last:
                history += run_training(
                    _step(model, data, config, epoch, seed, forget_weight),
                    parameters,
                    optimizer,
                    num_steps=_steps_per_epoch(data, config),
                    seed=seed * 1_000_003 + epoch,
                    progress=progress,
                )
                epoch += 1
                if stopped == "epochs":
                    stopped = _why_stop(model, data, config, retain_before)
                    if stopped != "epochs":
                        extra = config.recovery_epochs if stopped == "forgotten" else 0
                        last = epoch + extra
        finally:
            for hook in hooks:
                hook.remove()
        changes = changes_since(originals, parameters)
    return FineTuned(changes, history, epoch, stopped)


def _steps_per_epoch(data: TrainingData, config: ClassUnlearningConfig) -> int:
    return math.ceil(len(data.forget_inputs) / config.batch_size)


def _step(
    model: nn.Module,
    data: TrainingData,
    config: ClassUnlearningConfig,
    epoch: int,
    seed: int,
    forget_weight: float,
) -> Callable[[int, torch.Generator], Tensor]:
    labels, first = data.forget_labels(epoch), epoch * _steps_per_epoch(data, config)

    def step_fn(step: int, generator: torch.Generator) -> Tensor:
        kept = batch_indices(len(data.retain_inputs), config.batch_size, seed + 1, first + step)
        logits = logits_of(model, data.retain_inputs[kept])
        loss = functional.cross_entropy(logits, data.retain_labels[kept])
        if forget_weight:
            chosen = batch_indices(len(labels), config.batch_size, seed, first + step)
            forgotten = logits_of(model, data.forget_inputs[chosen])
            loss = loss + forget_weight * functional.cross_entropy(forgotten, labels[chosen])
        return loss

    return step_fn


def _optimizer(
    parameters: Mapping[str, nn.Parameter], config: ClassUnlearningConfig
) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters.values(), lr=config.lr, weight_decay=0.0)
    return torch.optim.SGD(parameters.values(), lr=config.lr, momentum=config.momentum)


def _masked(
    parameters: Mapping[str, nn.Parameter], mask: Mapping[str, Tensor]
) -> list[torch.utils.hooks.RemovableHandle]:
    return [
        parameter.register_hook(lambda gradient, kept=mask[name]: gradient * kept)
        for name, parameter in parameters.items()
        if name in mask
    ]


def _why_stop(
    model: nn.Module, data: TrainingData, config: ClassUnlearningConfig, retain_before: float
) -> Stop:
    found = all_logits(model, data.held_forget).argmax(1) == data.class_index
    if found.float().mean().item() <= 1 / data.num_classes:
        return "forgotten"
    if retain_before - _held_retain_accuracy(model, data) > config.max_retain_drop:
        return "retain dropped"
    return "epochs"


def _held_retain_accuracy(model: nn.Module, data: TrainingData) -> float:
    found = all_logits(model, data.held_retain).argmax(1) == data.held_retain_labels
    return found.float().mean().item()
