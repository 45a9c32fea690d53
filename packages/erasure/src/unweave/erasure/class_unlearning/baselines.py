"""What class unlearning is compared with: the same fine-tuning without any concept."""

from __future__ import annotations

from dataclasses import asdict
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from unweave.diffusion_core.errors import SelectionError
from unweave.erasure.class_unlearning.class_unlearner import ClassUnlearningConfig, split_data
from unweave.erasure.class_unlearning.classifier import ClassRequest, evaluating, logits_of
from unweave.erasure.class_unlearning.fine_tuning import TrainingData, fine_tune
from unweave.erasure.class_unlearning.poisoning import random_labels
from unweave.erasure.class_unlearning.result import ClassUnlearning, ConceptReport

BASELINES: dict[str, str] = {
    "fine-tune": "training goes on, on retain samples alone",
    "gradient-ascent": "the loss of the class is raised",
    "random-label": "every sample of the class gets a random other label",
    "salun": "as random-label, in the half of the weights that the class's loss depends on most",
}
"""Baselines by name, with what they do. Retraining from scratch is the user's own recipe."""


class BaselineUnlearner:
    """One of `BASELINES`, with the training settings of `config`; concepts play no part.

    >>> BaselineUnlearner("salun").config.epochs
    5
    """

    name: ClassVar[str] = "class-unlearning-baseline"

    def __init__(self, baseline: str, config: ClassUnlearningConfig | None = None) -> None:
        """Keep the settings. Raises `SelectionError` for an unknown baseline."""
        if baseline not in BASELINES:
            raise SelectionError(f"`baseline` must be one of {tuple(BASELINES)}, got {baseline!r}")
        self.baseline, self.config = baseline, config or ClassUnlearningConfig()

    def unlearn(
        self, model: nn.Module, request: ClassRequest, *, seed: int = 0, progress: bool = True
    ) -> ClassUnlearning:
        """Work out the unlearning of `request`; `model` is left bit-identical."""
        config, index = self.config, request.index
        generator = torch.Generator().manual_seed(seed)
        (learnt, held), (kept, watched) = split_data(request, config.holdout, generator)
        poisoned = learnt[: max(1, round(config.fraction * len(learnt)))]
        sample = kept[: max(1, round(config.retain_fraction * len(kept)))]
        own = torch.full((len(poisoned),), index)
        drawn = random_labels(len(poisoned), index, request.num_classes, generator)
        labels = own if self.baseline == "gradient-ascent" else drawn
        inputs = request.forget_inputs[poisoned]
        device = request.retain_labels.device
        data = TrainingData(
            inputs,
            lambda _: labels.to(device),
            request.retain_inputs[sample],
            request.retain_labels[sample],
            request.forget_inputs[held],
            request.retain_inputs[watched],
            request.retain_labels[watched],
            index,
            request.num_classes,
        )
        tuned = fine_tune(
            model,
            data,
            config,
            seed=seed,
            forget_weight={"fine-tune": 0.0, "gradient-ascent": -1.0}.get(self.baseline, 1.0),
            mask=salun_mask(model, inputs, own.to(device)) if self.baseline == "salun" else None,
            progress=progress,
        )
        facts = {"epochs": tuned.epochs, "stopped": tuned.stopped}
        return ClassUnlearning.from_changes(
            model,
            tuned.changes,
            ConceptReport(request.target, (), facts=facts),
            method=f"{self.name} {self.baseline}",
            settings=asdict(config),
            history=tuned.history,
        )


def salun_mask(
    model: nn.Module, inputs: Tensor, labels: Tensor, share: float = 0.5
) -> dict[str, Tensor]:
    """Return 1 for the `share` of weights with the largest gradient of the class's loss, else 0.

    SalUn (arXiv 2310.12508): one threshold for all weights, by name.
    """
    parameters = dict(model.named_parameters())
    with evaluating(model), torch.enable_grad():
        loss = functional.cross_entropy(logits_of(model, inputs), labels)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    sizes = {
        name: torch.zeros_like(p) if gradient is None else gradient.abs()
        for (name, p), gradient in zip(parameters.items(), gradients, strict=True)
    }
    everything = torch.cat([size.flatten() for size in sizes.values()])
    count = max(1, round(share * len(everything)))
    threshold = everything.topk(count).values[-1]
    return {name: (size >= threshold).to(size) for name, size in sizes.items()}
