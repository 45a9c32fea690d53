"""Attend-and-Excite: no concept of the prompt is left without attention (the baseline).

Chefer et al., "Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image Diffusion
Models", SIGGRAPH 2023, arXiv 2301.13826.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unweave.attention_tools.errors import GuidanceError
from unweave.attention_tools.guidance import guide_latents
from unweave.attention_tools.latent_update import (
    ConceptMaps,
    ConceptReader,
    LatentUpdate,
    Preprocess,
    StepRecord,
    find_resolution,
    step_sizes,
)
from unweave.attention_tools.tokens import Concepts, find_concepts


@dataclass(frozen=True)
class AttendAndExciteConfig:
    """Settings of `AttendAndExcite`; the defaults are those of its code."""

    max_iter_to_alter: int = 25
    """How many steps are altered, counted from the first; meant for 50."""

    thresholds: Mapping[int, float] = field(default_factory=lambda: {0: 0.05, 10: 0.5, 20: 0.8})
    """At these steps, updates repeat until the attention of every concept reaches the value: the
    iterative refinement of section 3.2, whose steps are meant for 50."""

    max_refinement_steps: int = 20
    """How often they repeat at most; then a warning says so, and sampling goes on."""

    scale_factor: float = 20.0
    """Step size of the first step."""

    scale_range: tuple[float, float] = (1.0, 0.5)
    """What `scale_factor` times the square root of falls from and to over all steps."""

    resolution: int | tuple[int, int] | None = None
    """Positions of the maps; None is a quarter of the latents a side: 16 for 512 pixels."""

    preprocess: Preprocess = "aae"
    """"aae": maps after a softmax over the prompt's tokens, and a blur; "raw": probabilities."""

    sigma: float = 0.5
    """Blur of the maps in positions; the published code's kernel is that of 0.5 * sqrt(2)."""

    def __post_init__(self) -> None:
        if self.max_iter_to_alter < 1:
            raise GuidanceError(
                f"`max_iter_to_alter` must be at least 1, got {self.max_iter_to_alter}"
            )
        late = [step for step in self.thresholds if not 0 <= step < self.max_iter_to_alter]
        if late:
            raise GuidanceError(
                f"`thresholds` must be for steps from 0 to {self.max_iter_to_alter - 1}, the last "
                f"that is altered, got {late}"
            )
        if self.max_refinement_steps < 0:
            raise GuidanceError(
                f"`max_refinement_steps` must not be negative, got {self.max_refinement_steps}"
            )


class AttendAndExcite:
    """Runs a pipeline so that every concept is attended to somewhere.

    After a call, `record` has one `StepRecord` a step that was altered, with the loss as "loss".
    """

    def __init__(self, pipe: Any, config: AttendAndExciteConfig | None = None) -> None:
        self.pipe, self.config = pipe, config or AttendAndExciteConfig()
        self.record: list[StepRecord] = []

    def __call__(self, prompt: str | Sequence[str], concepts: Concepts, **kwargs: Any) -> Any:
        """Return what the pipeline returns for `prompt` and its other arguments.

        `concepts` are words of the prompt, or for several prompts one list of words each. Raises
        `TokenError` for words that are not there or share a token, and `GuidanceError` when the
        denoiser has no cross-attention of the resolution.
        """
        config, pipe = self.config, self.pipe
        spans = find_concepts(pipe, prompt, concepts, kwargs.get("num_images_per_prompt") or 1)
        size = (kwargs.get(name) for name in ("height", "width", "latents"))
        resolution = find_resolution(pipe, config.resolution, *size)
        update = LatentUpdate(
            ConceptReader(
                pipe, ConceptMaps(spans, config.preprocess, sigma=config.sigma), resolution
            ),
            {"loss": (1.0, attend_and_excite_loss)},
            step_sizes(config.scale_factor, config.scale_range),
            targets={step: max(0.0, 1 - value) for step, value in config.thresholds.items()},
            max_refinement_steps=config.max_refinement_steps,
        )
        self.record = update.record
        with guide_latents(pipe, update, steps=range(config.max_iter_to_alter)):
            return pipe(prompt, **kwargs)


def attend_and_excite_loss(maps: Tensor) -> Tensor:
    """Return max over concepts of (1 - the map's maximum), (n,), of maps (n, concepts, h, w).

    Equation 1 of the paper. A map of zeros stands for no concept and does not count.

    >>> attend_and_excite_loss(torch.tensor([[[[0.1, 0.9]], [[0.4, 0.2]]]]))
    tensor([0.6000])
    """
    peak = maps.amax((-2, -1))
    return torch.where(peak > 0, 1 - peak, torch.zeros_like(peak)).amax(1)
