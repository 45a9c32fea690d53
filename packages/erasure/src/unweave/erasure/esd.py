"""Erased Stable Diffusion (arXiv 2303.07345): fine-tune the U-Net away from a concept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from unweave.diffusion_core.denoiser import Denoiser
from unweave.diffusion_core.errors import SelectionError
from unweave.diffusion_core.parameters import select_parameters
from unweave.diffusion_core.pipelines import Pipeline
from unweave.diffusion_core.prompts import PromptStates, encode_conditions, fill
from unweave.diffusion_core.teacher import frozen_teacher
from unweave.diffusion_core.training import run_training
from unweave.diffusion_core.trajectories import partial_trajectory
from unweave.erasure.fine_tuning import fine_tune_unet, negative_guidance
from unweave.erasure.protocol import (
    Erasure,
    ErasureRequest,
    check_number,
    check_pipeline,
)

ESD_SUBSETS = {
    "esd-x": "cross-attention",
    "esd-x-strict": "cross-attention-kv",
    "esd-u": "not-cross-attention",
    "esd-all": "all",
}
"""Where each variant of ESD trains linear and convolution layers, by `select_parameters`' roles."""

_FORMS = ("erase-from", "paper")


@dataclass(frozen=True)
class ESDConfig:
    """Settings of ESD, by default those of the paper's current code.

    `form` chooses the target: "paper" is eps(null) - eta [eps(concept) - eps(null)]; "erase-from"
    starts at eps(erase_from) instead, which is the request's replacement or, without one, the
    concept itself, so that eta = 2 here equals eta = 1 in the paper. `eta` is the negative
    guidance. Latents come from trajectories of the frozen model with `guidance_scale`, stopped at
    a uniform step out of `num_inference_steps`.
    """

    trainable: Literal["esd-x", "esd-x-strict", "esd-u", "esd-all"] = "esd-x"
    form: Literal["erase-from", "paper"] = "erase-from"
    eta: float = 2.0
    num_steps: int = 200
    lr: float = 5e-5
    guidance_scale: float = 3.0
    num_inference_steps: int = 50
    templates: tuple[str, ...] = ("{}",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", tuple(self.templates))
        if self.trainable not in ESD_SUBSETS:
            raise SelectionError(
                f"`trainable` must be one of {tuple(ESD_SUBSETS)}, got {self.trainable!r}"
            )
        if self.form not in _FORMS:
            raise SelectionError(f"`form` must be one of {_FORMS}, got {self.form!r}")
        for name in ("eta", "lr", "num_steps", "num_inference_steps"):
            check_number(name, getattr(self, name), "positive", lambda x: x > 0)
        check_number("guidance_scale", self.guidance_scale, "at least 0", lambda x: x >= 0)
        if not self.templates or any(text.count("{}") != 1 for text in self.templates):
            raise SelectionError(
                f'`templates` must be texts with one "{{}}" each, got {self.templates!r}'
            )


class ESD:
    """Erase by training the U-Net to predict, for the concept, the opposite of what it adds.

    The empty prompt is encoded as any other, as in the authors' code, also for Stable Diffusion XL,
    which may itself take zeros for it.

    >>> ESD(ESDConfig(trainable="esd-u")).config.num_steps
    200
    """

    name: ClassVar[str] = "esd"
    config_class: ClassVar[type[ESDConfig]] = ESDConfig

    def __init__(self, config: ESDConfig | None = None) -> None:
        """Keep the settings."""
        self.config = config or ESDConfig()

    def erase(
        self,
        pipe: Pipeline,
        request: ErasureRequest,
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> Erasure:
        """Train the chosen part of the U-Net; `pipe` has its old weights back at the end."""
        check_pipeline(pipe)
        parameters = trainable_parameters(pipe.unet, self.config.trainable)
        return fine_tune_unet(
            pipe,
            request,
            parameters,
            lambda: self._train(pipe, request, parameters, seed, progress),
            method=self.name,
            config=self.config,
        )

    def _train(
        self,
        pipe: Pipeline,
        request: ErasureRequest,
        parameters: dict[str, nn.Parameter],
        seed: int,
        progress: bool,
    ) -> list[float]:
        config = self.config
        student = Denoiser.from_pipeline(pipe)
        teacher = replace(student, unet=frozen_teacher(pipe.unet, parameters))
        conditions = self._conditions(pipe, request)
        shape = (1, pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2)

        def step_fn(_: int, generator: torch.Generator) -> Tensor:
            choice = int(torch.randint(len(conditions), (1,), generator=generator))
            concept, start, empty = conditions[choice]
            with torch.no_grad():
                noisy, t = partial_trajectory(
                    teacher,
                    pipe.scheduler,
                    concept,
                    empty,
                    stop_step=int(
                        torch.randint(config.num_inference_steps, (1,), generator=generator)
                    ),
                    num_inference_steps=config.num_inference_steps,
                    guidance_scale=config.guidance_scale,
                    noise=torch.randn(shape, generator=generator).to(concept.hidden_states),
                )
            return esd_loss(student, teacher, noisy, t, concept, start, empty, config.eta)

        optimizer = torch.optim.Adam(parameters.values(), lr=config.lr)
        return run_training(
            step_fn, parameters, optimizer, num_steps=config.num_steps, seed=seed, progress=progress
        )

    def _conditions(
        self, pipe: Pipeline, request: ErasureRequest
    ) -> list[tuple[PromptStates, PromptStates, PromptStates]]:
        """Return the states of (concept, start of the target, empty prompt) by template."""
        start = "" if self.config.form == "paper" else request.replacement or request.target
        with torch.no_grad():
            empty = encode_conditions(pipe, [""])
            return [
                (
                    encode_conditions(pipe, [fill(template, request.target)]),
                    encode_conditions(pipe, [fill(template, start)]) if start else empty,
                    empty,
                )
                for template in self.config.templates
            ]


def trainable_parameters(unet: nn.Module, trainable: str) -> dict[str, nn.Parameter]:
    """Return the parameters of an ESD variant: of linear and convolution layers, never of norms.

    Raises `SelectionError` when there are none.
    """
    if trainable not in ESD_SUBSETS:
        raise SelectionError(f"`trainable` must be one of {tuple(ESD_SUBSETS)}, got {trainable!r}")
    layers = [part for part in unet.modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    weights = {id(parameter) for part in layers for parameter in part.parameters(recurse=False)}
    chosen = select_parameters(unet, ESD_SUBSETS[trainable])
    return {name: parameter for name, parameter in chosen.items() if id(parameter) in weights}


def esd_loss(
    student: Denoiser,
    teacher: Denoiser,
    noisy: Tensor,
    t: Tensor,
    concept: Tensor | PromptStates,
    start: Tensor | PromptStates,
    empty: Tensor | PromptStates,
    eta: float,
) -> Tensor:
    """Return the mean || raw(x_t, concept) - target ||^2 with `negative_guidance` as the target.

    `noisy` is (n, C, h, w), states are as in `Denoiser.predict`.
    """
    target = negative_guidance(teacher, noisy, t, concept, start, empty, eta)
    return nn.functional.mse_loss(student.predict(noisy, t, concept).raw, target)
