"""Concept Ablation (arXiv 2303.13516): make a concept's prompts act as those of an anchor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from unweave.diffusion_core.denoiser import Denoiser
from unweave.diffusion_core.errors import SelectionError
from unweave.diffusion_core.objective import denoising_loss
from unweave.diffusion_core.parameters import select_parameters
from unweave.diffusion_core.pipelines import Pipeline
from unweave.diffusion_core.prompts import PromptStates, mentions
from unweave.diffusion_core.training import run_training
from unweave.erasure.anchor_images import (
    AnchorImagesConfig,
    anchor_of,
    anchor_pairs,
    noise_and_timesteps,
)
from unweave.erasure.fine_tuning import fine_tune_unet
from unweave.erasure.protocol import Erasure, ErasureRequest, check_number, check_pipeline

CONCEPT_ABLATION_SUBSETS = {
    "cross-attention-kv": ("cross-attention-kv",),
    "attention": ("cross-attention", "self-attention"),
    "all": ("all",),
}
"""What can be trained, by the roles of `select_parameters`."""


@dataclass(frozen=True)
class ConceptAblationConfig(AnchorImagesConfig):
    """Settings of Concept Ablation, by default those of the paper's code, and of its images.

    `lr` is 2e-6 times the batch size. `prior_weight` weighs the denoising loss of the anchor's
    images under their own prompts; None is 1 when a target contains the anchor's words, as "grumpy
    cat" does, and 0 otherwise. For nudity the authors train the "attention" with `lr` 4e-6 times
    the batch size in 400 steps.
    """

    trainable: Literal["cross-attention-kv", "attention", "all"] = "cross-attention-kv"
    num_steps: int = 100
    batch_size: int = 8
    lr: float = 1.6e-5
    weight_decay: float = 1e-2
    prior_weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trainable not in CONCEPT_ABLATION_SUBSETS:
            raise SelectionError(
                f"`trainable` must be one of {tuple(CONCEPT_ABLATION_SUBSETS)}, got "
                f"{self.trainable!r}"
            )
        for name in ("num_steps", "batch_size", "lr"):
            check_number(name, getattr(self, name), "positive", lambda x: x > 0)
        check_number("weight_decay", self.weight_decay, "at least 0", lambda x: x >= 0)
        if self.prior_weight is not None:
            check_number("prior_weight", self.prior_weight, "at least 0", lambda x: x >= 0)


class ConceptAblation:
    """Erase by training the U-Net to predict for the target what it predicts for an anchor.

    The anchor is `request.replacement`, a broader concept: "painting" for the style of an artist.
    Several targets may be given, divided by ";". The teacher is the network itself as training
    goes on, without gradient.

    >>> ConceptAblation(ConceptAblationConfig(num_images=200)).config.num_steps
    100
    """

    name: ClassVar[str] = "concept-ablation"
    config_class: ClassVar[type[ConceptAblationConfig]] = ConceptAblationConfig

    def __init__(self, config: ConceptAblationConfig | None = None) -> None:
        """Keep the settings."""
        self.config = config or ConceptAblationConfig()

    def erase(
        self,
        pipe: Pipeline,
        request: ErasureRequest,
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> Erasure:
        """Generate the anchor images and train; `pipe` has its old weights back at the end."""
        check_pipeline(pipe)
        anchor_of(request)
        parameters = {
            name: parameter
            for role in CONCEPT_ABLATION_SUBSETS[self.config.trainable]
            for name, parameter in select_parameters(pipe.unet, role).items()
        }
        prior_weight = self._prior_weight(request)
        return fine_tune_unet(
            pipe,
            request,
            parameters,
            lambda: self._train(pipe, request, parameters, prior_weight, seed, progress),
            method=self.name,
            config=self.config,
            notes={"prior_weight": prior_weight},
        )

    def _prior_weight(self, request: ErasureRequest) -> float:
        if self.config.prior_weight is not None:
            return self.config.prior_weight
        return 1.0 if mentions(request.target, anchor_of(request)) else 0.0

    def _train(
        self,
        pipe: Pipeline,
        request: ErasureRequest,
        parameters: dict[str, nn.Parameter],
        prior_weight: float,
        seed: int,
        progress: bool,
    ) -> list[float]:
        config = self.config
        pairs = anchor_pairs(pipe, request, config, seed=seed, progress=progress)
        student = Denoiser.from_pipeline(pipe)

        def step_fn(step: int, generator: torch.Generator) -> Tensor:
            batch = pairs.batch(config.batch_size, seed, step)
            noise, t = noise_and_timesteps(student, batch.latents, generator)
            noisy = student.add_noise(batch.latents, noise, t)
            loss = ablation_loss(student, noisy, t, batch.target, batch.anchor, batch.mask)
            if prior_weight > 0:
                prior_noise, prior_t = noise_and_timesteps(student, batch.whole, generator)
                prior = denoising_loss(student, batch.whole, batch.anchor, prior_t, prior_noise)
                loss = loss + prior_weight * prior
            return loss

        optimizer = torch.optim.AdamW(
            parameters.values(), lr=config.lr, weight_decay=config.weight_decay
        )
        return run_training(
            step_fn, parameters, optimizer, num_steps=config.num_steps, seed=seed, progress=progress
        )


def ablation_loss(
    student: Denoiser,
    noisy: Tensor,
    t: Tensor,
    target: Tensor | PromptStates,
    anchor: Tensor | PromptStates,
    mask: Tensor,
) -> Tensor:
    """Return the mean || raw(x_t, target) - sg[raw(x_t, anchor)] ||^2 inside the mask.

    `noisy` is (n, C, h, w), `mask` (n, 1, h, w), states are as in `Denoiser.predict`. Each sample's
    error is a mean over the positions of its mask.
    """
    with torch.no_grad():
        wanted = student.predict(noisy, t, anchor).raw
    errors = (student.predict(noisy, t, target).raw - wanted).square().mean(1, keepdim=True)
    return ((errors * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)).mean()
