"""Latents updated during sampling: one loop for every method that nudges them by a loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from unweave.attention_tools.errors import GuidanceError
from unweave.attention_tools.interception import inner_pass, is_guided
from unweave.attention_tools.layers import denoiser_of


@dataclass(frozen=True)
class DenoisingStep:
    """A step of sampling, before its guided forward pass."""

    index: int
    """Which step, from 0."""

    count: int
    """How many steps the scheduler was set to."""

    latents: Tensor = field(repr=False)
    """The scaled latents that go into the denoiser, (n, C, h, w): one half under guidance."""

    forward: Callable[[Tensor], Any] = field(repr=False)
    """The denoiser with the prompt alone: latents in, out what the pipeline asks for."""


Update = Callable[[DenoisingStep], Tensor]
"""Returns new latents for a step."""


@contextmanager
def guide_latents(
    pipe: Any, update: Update, *, steps: Collection[int] | None = None
) -> Iterator[None]:
    """Let `update` change the latents before each step of sampling in the block.

    `update` runs with gradients enabled and the denoiser's weights frozen; both halves of guidance
    and the scheduler's own sample get what it changed. `steps` are the steps it is asked for,
    counted from 0 in each call of the pipeline; None is all. Works for pipelines whose scheduler
    steps once after each forward pass. Everything is as before on exit.

    Raises `GuidanceError` when the new latents have another shape or are not finite.
    """
    denoiser = denoiser_of(pipe)
    guide = _Guide(pipe, denoiser, update, steps)
    with ExitStack() as stack:
        stack.enter_context(frozen(denoiser))
        for name, method in (("step", guide.step), ("set_timesteps", guide.begin)):
            stack.enter_context(replaced_method(pipe.scheduler, name, method))
        # First of the hooks: the others then see the pass itself, after those of the update.
        handle = denoiser.register_forward_pre_hook(
            guide.before_forward, with_kwargs=True, prepend=True
        )
        stack.callback(handle.remove)
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no weight of `model` need a gradient while the block runs."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def replaced_method(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Let `method` stand in for a method of `owner`, with the signature of the original."""
    before = owner.__dict__.get(name)

    @wraps(getattr(owner, name))
    def standing_in(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    setattr(owner, name, standing_in)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@dataclass
class SamplingSteps:
    """How far a run is."""

    scheduler: Any = field(repr=False)
    index: int = 0
    """Steps of the scheduler since its timesteps were set."""

    @property
    def count(self) -> int:
        """How many it was set to."""
        return len(self.scheduler.timesteps)


@contextmanager
def follow_steps(
    pipe: Any, after: Callable[[Tensor], Tensor] | None = None
) -> Iterator[SamplingSteps]:
    """Count the steps of a pipeline's scheduler, whatever passes of the denoiser each takes.

    `after` gets the latents that each step made, and returns those that the run goes on with.
    """
    scheduler = pipe.scheduler
    steps, step, begin = SamplingSteps(scheduler), scheduler.step, scheduler.set_timesteps

    def counted(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        steps.index += 1
        if after is None:
            return result
        if isinstance(result, tuple):
            return (after(result[0]), *result[1:])
        result.prev_sample = after(result.prev_sample)
        return result

    def begun(*args: Any, **kwargs: Any) -> Any:
        steps.index = 0
        return begin(*args, **kwargs)

    with (
        replaced_method(scheduler, "step", counted),
        replaced_method(scheduler, "set_timesteps", begun),
    ):
        yield steps


class _Guide:
    def __init__(
        self, pipe: Any, denoiser: Any, update: Update, steps: Collection[int] | None
    ) -> None:
        self.pipe, self.denoiser, self.update, self.steps = pipe, denoiser, update, steps
        self.scheduler_step = pipe.scheduler.step
        self.set_timesteps = pipe.scheduler.set_timesteps
        self.signature = inspect.signature(denoiser.forward)
        self.index, self.busy = 0, False
        self.moved: Tensor | None = None

    def begin(self, *args: Any, **kwargs: Any) -> Any:
        """Set the timesteps, which begins a new count of steps."""
        self.index, self.moved = 0, None
        return self.set_timesteps(*args, **kwargs)

    def step(
        self, model_output: Any, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Step from the sample with what the update added to it."""
        if self.moved is not None:
            sample = sample + self.moved.to(sample)
            self.moved = None
        self.index += 1
        return self.scheduler_step(model_output, timestep, sample, *args, **kwargs)

    def before_forward(self, _: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Update the latents among the arguments of a forward pass of the denoiser."""
        if self.busy or (self.steps is not None and self.index not in self.steps):
            return None
        given = self.signature.bind(*args, **kwargs).arguments
        name = "sample" if "sample" in given else "hidden_states"
        sample = given[name]
        guided = is_guided(self.pipe, sample)
        half = sample.shape[0] // 2 if guided else 0
        latents = sample[half:].detach()
        fixed = {key: _part(value, half, sample.shape[0]) for key, value in given.items()}

        def forward(x: Tensor) -> Any:
            return self.denoiser(**{**fixed, name: x})

        count = len(self.pipe.scheduler.timesteps)
        self.busy, inner = True, inner_pass.set(True)
        try:
            with torch.enable_grad():
                new = self.update(DenoisingStep(self.index, count, latents, forward)).detach()
        finally:
            self.busy = False
            inner_pass.reset(inner)
        self._check(new, latents)
        moved = new - latents
        self.moved = moved / self._scale(given["timestep"], latents)
        given[name] = sample + (torch.cat([moved, moved]) if guided else moved)
        return (), given

    def _scale(self, timestep: Any, latents: Tensor) -> Tensor:
        """Return by what the scheduler multiplies latents before the denoiser."""
        scale = getattr(self.pipe.scheduler, "scale_model_input", None)
        one = torch.ones(1, dtype=latents.dtype, device=latents.device)
        if scale is None:
            return one
        timestep = timestep.reshape(-1)[0] if isinstance(timestep, Tensor) else timestep
        return torch.as_tensor(scale(one, timestep))

    def _check(self, new: Tensor, latents: Tensor) -> None:
        if new.shape != latents.shape:
            raise GuidanceError(
                f"the update must return latents {tuple(latents.shape)}, got {tuple(new.shape)}"
            )
        if not new.isfinite().all():
            raise GuidanceError(
                f"the update made latents that are not finite at step {self.index}: lower the step "
                "size, or use float32"
            )


def _part(value: Any, half: int, batch: int) -> Any:
    """Return the conditional half of tensors that have one row a sample, also in containers."""
    if isinstance(value, Tensor):
        return value[half:] if half and value.dim() and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: _part(one, half, batch) for key, one in value.items()}
    if isinstance(value, tuple):
        return tuple(_part(one, half, batch) for one in value)
    return value
