"""One latent-update loop: a gradient step on the latents per denoising step, under losses on maps.

A-STAR and Attend-and-Excite differ in their losses and in when they refine. What they share is
here: how the maps of concepts are read, and the step itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from unweave.attention_tools.capture import MapReader
from unweave.attention_tools.errors import GuidanceError, TokenError
from unweave.attention_tools.guidance import DenoisingStep
from unweave.attention_tools.layers import denoiser_of
from unweave.attention_tools.maps import AttentionMaps
from unweave.attention_tools.masks import smooth
from unweave.attention_tools.tokens import TokenSpans

Preprocess = Literal["aae", "raw"]
MapLoss = Callable[[Tensor], Tensor]
"""Maps (n, concepts, h, w) in, one value a sample (n,) out.

A map of zeros stands for no concept: it fills up samples that have fewer than others.
"""

SHARPNESS = 100.0
"""By what Attend-and-Excite multiplies probabilities before its softmax over tokens."""


@dataclass(frozen=True)
class ConceptMaps:
    """Makes one map a concept out of recorded maps of tokens."""

    spans: tuple[TokenSpans, ...]
    """The concepts of each sample of the batch."""

    preprocess: Preprocess = "aae"
    """"aae": without the first and the last token, a softmax over the tokens, and a blur; "raw":
    the probabilities as they are."""

    normalize: bool = False
    """Whether each map is divided by its maximum."""

    sigma: float = 0.5
    """Standard deviation of the 3x3 blur in positions. The published code of Attend-and-Excite
    blurs with 0.5 * sqrt(2) where it says 0.5."""

    @property
    def columns(self) -> list[int] | None:
        """The tokens to record: those of the concepts, or all where a softmax needs them."""
        if self.preprocess == "aae":
            return None
        return sorted({at for own in self.spans for span in own.positions for at in span})

    def __call__(self, maps: Tensor) -> Tensor:
        """Return maps (n, concepts, h, w) of recorded ones (n, `columns`, h, w).

        A concept of several tokens has the mean of their maps.
        """
        columns = self.columns
        if columns is None:
            maps = (maps[:, 1:-1] * SHARPNESS).softmax(1)
            columns = list(range(1, maps.shape[1] + 1))
        own = torch.einsum("nct,nthw->nchw", self._weights(columns).to(maps), maps)
        if self.preprocess == "aae":
            own = smooth(own, 3, self.sigma)
        if self.normalize:
            peak = own.amax((-2, -1), keepdim=True)
            own = own / torch.where(peak > 0, peak, torch.ones_like(peak))
        return own

    def _weights(self, columns: list[int]) -> Tensor:
        """Return how much each column counts for each concept, (n, concepts, columns)."""
        weights = torch.zeros(len(self.spans), max(map(len, self.spans)), len(columns))
        place = {column: index for index, column in enumerate(columns)}
        for sample, own in enumerate(self.spans):
            for concept, span in enumerate(own.positions):
                for at in span:
                    if at not in place:
                        raise TokenError(
                            f"token {at} of {own.prompt!r} is the first or the last, which "
                            '`preprocess="aae"` leaves out: shorten the prompt, or use "raw"'
                        )
                    weights[sample, concept, place[at]] = 1 / len(span)
        return weights


class ConceptReader:
    """Reads the maps of concepts off a forward pass, with gradients."""

    def __init__(self, pipe: Any, concepts: ConceptMaps, resolution: tuple[int, int]) -> None:
        self.concepts, self.resolution = concepts, resolution
        self.read = MapReader(pipe, tokens=concepts.columns, resolution=resolution)

    def __call__(self, forward: Callable[[], Any]) -> Tensor:
        """Return maps (n, concepts, h, w). Raises `GuidanceError` when no layer has the size."""
        return self.of(self.read(forward))

    def of(self, maps: AttentionMaps) -> Tensor:
        """Return the same of maps that were recorded elsewhere."""
        if not maps.layers:
            height, width = self.resolution
            raise GuidanceError(
                f"no cross-attention layer of the denoiser has {height}x{width} positions: give a "
                "`resolution` that it has, a halving of the latents' height and width"
            )
        recorded = maps.aggregate()
        if recorded.shape[0] != len(self.concepts.spans):
            raise GuidanceError(
                f"concepts were given for {len(self.concepts.spans)} images, and the pipeline "
                f"makes {recorded.shape[0]}: pass prompts and `num_images_per_prompt`, not embeds"
            )
        return self.concepts(recorded)


@dataclass(frozen=True)
class StepRecord:
    """What was seen at one step, before its update and after its refinement."""

    step: int
    losses: dict[str, Tensor] = field(repr=False)
    """The value of each loss by name (n,), before its weight."""

    maps: Tensor = field(repr=False)
    """The maps of the concepts (n, concepts, h, w)."""

    refinements: int = 0
    """How many updates refinement made."""


@dataclass
class LatentUpdate:
    """An update for `guide_latents`: z - alpha * gradient of the sum of weighted losses.

    Samples are independent: the losses of a batch are summed, so one backward pass serves all.
    The latents are those that go into the denoiser, so `alpha` means the same under schedulers
    that scale them, such as Euler's.
    """

    read: Callable[[Callable[[], Any]], Tensor]
    """Maps (n, concepts, h, w) of what a forward pass attends to, as by `ConceptReader`."""

    losses: Mapping[str, tuple[float, MapLoss]]
    """Weight and loss by name."""

    alpha: Callable[[int, int], float]
    """The step size at a step, of how many."""

    targets: Mapping[int, float] = field(default_factory=dict)
    """At these steps, updates repeat while a sample's loss is above the value."""

    max_refinement_steps: int = 20
    """How often they repeat at most; a warning says where that was not enough."""

    record: list[StepRecord] = field(default_factory=list)
    """One entry a step."""

    warned: bool = False

    def __call__(self, step: DenoisingStep) -> Tensor:
        """Return the updated latents of a step."""
        alpha, latents, refinements = self.alpha(step.index, step.count), step.latents, 0
        losses, maps, gradient = self._gradient(step, latents)
        target = self.targets.get(step.index)
        while target is not None and refinements < self.max_refinement_steps:
            behind = self._total(losses) > target
            if not behind.any():
                break
            latents = latents - alpha * gradient * behind.view(-1, 1, 1, 1)
            losses, maps, gradient = self._gradient(step, latents)
            refinements += 1
        if target is not None:
            self._check_reached(step, self._total(losses).detach(), target, refinements)
        self.record.append(
            StepRecord(
                step.index,
                {name: value.detach() for name, value in losses.items()},
                maps.detach(),
                refinements,
            )
        )
        self._check_size(step, alpha * gradient, latents)
        return latents - alpha * gradient

    def _gradient(
        self, step: DenoisingStep, latents: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        latents = latents.detach().requires_grad_()
        maps = self.read(lambda: step.forward(latents))
        losses = {name: loss(maps) for name, (_, loss) in self.losses.items()}
        total = self._total(losses)
        if not total.isfinite().all():
            raise GuidanceError(
                f"the losses are {total.tolist()} at step {step.index}: latents or maps are not "
                "finite; use float32 or a smaller step size"
            )
        if not total.requires_grad:
            return losses, maps, torch.zeros_like(latents)
        return losses, maps, torch.autograd.grad(total.sum(), latents)[0]

    def _total(self, losses: Mapping[str, Tensor]) -> Tensor:
        parts = [self.losses[name][0] * value for name, value in losses.items()]
        return torch.stack(parts).sum(0)

    def _check_reached(
        self, step: DenoisingStep, total: Tensor, target: float, refinements: int
    ) -> None:
        behind = int((total > target).sum())
        if behind:
            warnings.warn(
                f"refinement at step {step.index} ended after {refinements} updates with the loss "
                f"of {behind} of {len(total)} images above {target:.3g}, at most "
                f"{float(total.max()):.3g}: raise `max_refinement_steps` or the step size, or ask "
                "for less attention",
                stacklevel=3,
            )

    def _check_size(self, step: DenoisingStep, moved: Tensor, latents: Tensor) -> None:
        if (
            not self.warned
            and (moved.flatten(1).norm(dim=1) > latents.flatten(1).norm(dim=1)).any()
        ):
            self.warned = True
            warnings.warn(
                f"the update at step {step.index} is larger than the latents: lower the step size",
                stacklevel=2,
            )


def step_sizes(scale: float, over: tuple[float, float]) -> Callable[[int, int], float]:
    """Return alpha_i = scale * sqrt(linspace(*over, count)[i]), the Attend-and-Excite schedule.

    >>> step_sizes(20, (1.0, 0.25))(1, 2)
    10.0
    """
    first, last = over

    def alpha(index: int, count: int) -> float:
        part = min(index / max(count - 1, 1), 1.0)
        return float(scale * (first + (last - first) * part) ** 0.5)

    return alpha


def find_resolution(
    pipe: Any,
    resolution: int | tuple[int, int] | None,
    height: int | None = None,
    width: int | None = None,
    latents: Tensor | None = None,
) -> tuple[int, int]:
    """Return the positions (h, w) of maps: `resolution`, or a quarter of the latents a side.

    The quarter is rounded up: 16x16 at the 512 pixels of Stable Diffusion 1.
    """
    if resolution is not None:
        return (resolution, resolution) if isinstance(resolution, int) else resolution
    if latents is not None:
        size = (latents.shape[-2], latents.shape[-1])
    else:
        denoiser: Any = denoiser_of(pipe)
        usual, scale = denoiser.config.sample_size, pipe.vae_scale_factor
        rows, columns = (usual, usual) if isinstance(usual, int) else usual
        size = (
            rows if height is None else height // scale,
            columns if width is None else width // scale,
        )
    return -(-size[0] // 4), -(-size[1] // 4)
