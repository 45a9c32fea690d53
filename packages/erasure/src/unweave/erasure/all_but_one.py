"""All but One (arXiv 2312.12807): erase in the guidance term, hold the null prediction still."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from unweave.diffusion_core.denoiser import Denoiser
from unweave.diffusion_core.errors import PromptError, SelectionError
from unweave.diffusion_core.pipelines import Pipeline
from unweave.diffusion_core.prompts import PromptStates, encode_conditions, fill
from unweave.diffusion_core.teacher import frozen_teacher
from unweave.diffusion_core.training import run_training
from unweave.diffusion_core.trajectories import TrajectoryBank
from unweave.erasure.esd import ESD_SUBSETS, trainable_parameters
from unweave.erasure.fine_tuning import fine_tune_unet
from unweave.erasure.protocol import Erasure, ErasureRequest, check_number, check_pipeline

TARGETS = ("neutral", "negative")
"""What the guidance term of a concept without alternative becomes: 0, or its opposite."""

TRAJECTORIES = ("teacher", "student", "forward")
"""Where noisy latents come from: guided sampling by the frozen or the trained model, or noise."""


@dataclass(frozen=True)
class AllButOneConfig:
    """Settings of All but One; beyond the losses, none could be checked against the paper.

    `trainable` chooses layers as for ESD. Without an alternative the guidance term goes to 0
    ("neutral") or to -`eta` times what it was ("negative"). `null_weight` is lambda, the weight of
    the drift of the null prediction; with `stop_gradient` the guidance loss moves the conditional
    prediction only. Noisy latents are those of `trajectories`: "teacher" follows the frozen model
    under the concept and its alternative, or the empty prompt, "student" the trained one under the
    concept, anew every `refresh_every` steps, and "forward" adds noise to images of the frozen
    model. At timesteps from `t_max` (a share of all) up, the guidance term stays what it was, which
    pins the layout. `pairs` are more concepts to erase with their alternatives, "" for none.
    Templates go around a concept and its alternative alike.
    """

    trainable: Literal["esd-x", "esd-x-strict", "esd-u", "esd-all"] = "esd-x"
    target: Literal["neutral", "negative"] = "neutral"
    eta: float = 1.0
    null_weight: float = 1.0
    stop_gradient: bool = True
    trajectories: Literal["teacher", "student", "forward"] = "teacher"
    num_trajectories: int = 16
    refresh_every: int = 100
    t_max: float = 1.0
    num_steps: int = 1000
    lr: float = 1e-5
    batch_size: int = 4
    guidance_scale: float = 3.0
    num_inference_steps: int = 50
    templates: tuple[str, ...] = ("{}",)
    pairs: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", tuple(self.templates))
        object.__setattr__(self, "pairs", tuple(tuple(pair) for pair in self.pairs))
        choices = {
            "trainable": tuple(ESD_SUBSETS),
            "target": TARGETS,
            "trajectories": TRAJECTORIES,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise SelectionError(f"`{name}` must be one of {known}, got {getattr(self, name)}")
        check_number(
            "null_weight",
            self.null_weight,
            "positive, as without it the null prediction drifts and takes every prompt along",
            lambda x: x > 0,
        )
        check_number("t_max", self.t_max, "in (0, 1]", lambda x: 0 < x <= 1)
        check_number("guidance_scale", self.guidance_scale, "at least 0", lambda x: x >= 0)
        for name in ("eta", "lr", "num_steps", "num_inference_steps", "num_trajectories"):
            check_number(name, getattr(self, name), "positive", lambda x: x > 0)
        for name in ("batch_size", "refresh_every"):
            check_number(name, getattr(self, name), "at least 1", lambda x: x >= 1)
        if not self.templates or any(text.count("{}") != 1 for text in self.templates):
            raise SelectionError(
                f'`templates` must be texts with one "{{}}" each, got {self.templates!r}'
            )
        for pair in self.pairs:
            if len(pair) != 2 or not pair[0].strip():
                raise PromptError(
                    "`pairs` must be (concept, alternative) texts, the alternative empty for none, "
                    f"got {pair!r}"
                )


class AllButOne:
    """Erase by training what a prompt adds to the null prediction, and keep the null prediction.

    Reconstruction: unconfirmed. There is no public implementation, and only the abstract and the
    first page of the paper could be read: guidance terms are what is updated, the drift of the
    unconditional score is constrained, and an alternative may be named. The losses here are the
    direct formalisation of that; all weights, the neutral target and the ways of drawing noisy
    latents are unconfirmed.

    The alternative is `request.replacement`; the further from the concept it is, by
    `concept_similarity`, the less an image keeps its layout. The empty prompt is encoded as any
    other, also for Stable Diffusion XL.

    >>> AllButOne(AllButOneConfig(target="negative")).config.null_weight
    1.0
    """

    name: ClassVar[str] = "all-but-one"
    config_class: ClassVar[type[AllButOneConfig]] = AllButOneConfig

    def __init__(self, config: AllButOneConfig | None = None) -> None:
        """Keep the settings."""
        self.config = config or AllButOneConfig()

    def erase(
        self,
        pipe: Pipeline,
        request: ErasureRequest,
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> Erasure:
        """Train the chosen part of the U-Net; `pipe` has its old weights back at the end.

        The artifact's settings tell under `similarity` how close each concept is to its
        alternative, None for those without.
        """
        check_pipeline(pipe)
        parameters = trainable_parameters(pipe.unet, self.config.trainable)
        pairs = ((request.target, request.replacement or ""), *self.config.pairs)
        similarity = [concept_similarity(pipe, *pair) if pair[1] else None for pair in pairs]
        return fine_tune_unet(
            pipe,
            request,
            parameters,
            lambda: self._train(pipe, pairs, parameters, seed, progress),
            method=self.name,
            config=self.config,
            notes={"similarity": similarity},
        )

    def _train(
        self,
        pipe: Pipeline,
        pairs: Sequence[tuple[str, str]],
        parameters: dict[str, nn.Parameter],
        seed: int,
        progress: bool,
    ) -> list[float]:
        config = self.config
        student = Denoiser.from_pipeline(pipe)
        teacher = replace(student, unet=frozen_teacher(pipe.unet, parameters))
        edits = _Edits.of(pipe, pairs, config)
        source: TrajectoryBank | _NoisedImages | None = None

        def step_fn(step: int, generator: torch.Generator) -> Tensor:
            nonlocal source
            if config.trajectories == "student" and step % config.refresh_every == 0:
                source = self._collect(student, edits, generator)
            elif source is None:
                source = self._collect(teacher, edits, generator)
            drawn = source.draw(config.batch_size, generator)
            concept, guide, factor = edits.rows(drawn, config.t_max * student.num_train_timesteps)
            with torch.no_grad():
                guided, null = branches(teacher, drawn.noisy, drawn.t, guide, edits.empty)
            raw, raw_null = branches(student, drawn.noisy, drawn.t, concept, edits.empty)
            guidance = guidance_loss(raw, raw_null, factor * (guided - null), config.stop_gradient)
            return guidance + config.null_weight * null_loss(raw_null, null)

        optimizer = torch.optim.Adam(parameters.values(), lr=config.lr)
        return run_training(
            step_fn, parameters, optimizer, num_steps=config.num_steps, seed=seed, progress=progress
        )

    def _collect(
        self, denoiser: Denoiser, edits: _Edits, generator: torch.Generator
    ) -> TrajectoryBank | _NoisedImages:
        config = self.config
        followed = edits.concepts if config.trajectories == "student" else edits.followed
        bank = TrajectoryBank.collect(
            denoiser,
            denoiser.scheduler,
            followed,
            edits.empty,
            num_trajectories=max(config.num_trajectories, len(followed.hidden_states)),
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            generator=generator,
        )
        if config.trajectories == "forward":
            return _NoisedImages.at_the_end_of(bank, denoiser, followed)
        return bank


def branches(
    denoiser: Denoiser, noisy: Tensor, t: Tensor, prompt: PromptStates, empty: PromptStates
) -> tuple[Tensor, Tensor]:
    """Return the raw outputs under n prompts and under the empty one, from one call of the model.

    `noisy` is (n, C, h, w) and `t` (n,); both results are (n, C, h, w). Guidance terms are their
    difference in noise or velocity alike, since one is a multiple of the other.
    """
    states = PromptStates.cat([given.expand(len(noisy)) for given in (prompt, empty)])
    both = denoiser.predict(torch.cat([noisy] * 2), torch.cat([t] * 2), states).raw
    conditional, unconditional = both.chunk(2)
    return conditional, unconditional


def guidance_loss(
    conditional: Tensor, unconditional: Tensor, target: Tensor, stop_gradient: bool = True
) -> Tensor:
    """Return the mean || conditional - sg[unconditional] - target ||^2 in float32, a scalar.

    All are (n, C, h, w). `target` is what the guidance term is to become: that of the alternative,
    0, or a negative multiple of its own. With `stop_gradient` the unconditional prediction is not
    moved. Reconstructed, as all of this method.
    """
    unconditional = unconditional.detach() if stop_gradient else unconditional
    return nn.functional.mse_loss((conditional - unconditional).float(), target.float())


def null_loss(unconditional: Tensor, original: Tensor) -> Tensor:
    """Return the mean || unconditional - original ||^2 in float32, the drift of the null score."""
    return nn.functional.mse_loss(unconditional.float(), original.float())


@torch.no_grad()
def concept_similarity(pipe: Pipeline, concept: str, alternative: str) -> float:
    """Return the cosine, -1 to 1, of what two prompts add to the states of the empty prompt."""
    states = encode_conditions(pipe, [concept, alternative, ""]).hidden_states.float()
    first, second = (states[:2] - states[2]).flatten(1)
    return nn.functional.cosine_similarity(first, second, dim=0).item()


@dataclass(frozen=True)
class _Edits:
    """The edits of all pairs under all templates, g in number, as rows of states.

    The guidance term under row i of `concepts` goes to `factors[i]` times that under row i of
    `guides`: the alternative, or the concept itself, or for 0 the empty prompt. Trajectories
    follow `followed`: the g concepts, then their g alternatives, the empty prompt for none.
    """

    concepts: PromptStates
    guides: PromptStates
    factors: Tensor
    empty: PromptStates
    followed: PromptStates

    @classmethod
    @torch.no_grad()
    def of(
        cls, pipe: Pipeline, pairs: Sequence[tuple[str, str]], config: AllButOneConfig
    ) -> _Edits:
        concepts, guides, factors = [], [], []
        for concept, alternative in pairs:
            for template in config.templates:
                prompt = fill(template, concept)
                own = prompt if config.target == "negative" else ""
                concepts.append(prompt)
                guides.append(fill(template, alternative) if alternative else own)
                factors.append(1.0 if alternative or not own else -config.eta)
        others = ["" if a == b else b for a, b in zip(concepts, guides, strict=True)]
        own_states, guide_states, other_states = (
            encode_conditions(pipe, texts) for texts in (concepts, guides, others)
        )
        return cls(
            own_states,
            guide_states,
            torch.tensor(factors).to(own_states.hidden_states),
            encode_conditions(pipe, [""]),
            PromptStates.cat([own_states, other_states]),
        )

    def rows(
        self, drawn: TrajectoryBank, first_kept: float
    ) -> tuple[PromptStates, PromptStates, Tensor]:
        """Return the concepts, the guides and the factors (n, 1, 1, 1) of drawn latents.

        From timestep `first_kept` on, the guide is the concept itself.
        """
        edits = drawn.condition % len(self.factors)
        kept = (drawn.t >= first_kept).cpu()
        both = PromptStates.cat([self.guides, self.concepts])
        guides = both.select(torch.where(kept, edits + len(self.factors), edits))
        factors = torch.where(kept.to(self.factors.device), 1, self.factors[edits])
        return self.concepts.select(edits), guides, factors[:, None, None, None]


@dataclass(frozen=True)
class _NoisedImages:
    """Generated images, clean latents (n, C, h, w), which are noised anew at each draw."""

    clean: Tensor
    condition: Tensor
    denoiser: Denoiser

    @classmethod
    @torch.no_grad()
    def at_the_end_of(
        cls, bank: TrajectoryBank, denoiser: Denoiser, followed: PromptStates
    ) -> _NoisedImages:
        last = bank.t == bank.t.min()
        states = followed.select(bank.condition[last.cpu()])
        clean = denoiser.predict(bank.noisy[last], bank.t[last], states).clean
        return cls(clean, bank.condition[last.cpu()], denoiser)

    def draw(self, count: int, generator: torch.Generator) -> TrajectoryBank:
        rows = torch.randint(len(self.clean), (count,), generator=generator)
        t = torch.randint(self.denoiser.num_train_timesteps, (count,), generator=generator)
        clean, t = self.clean[rows], t.to(self.clean.device)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        return TrajectoryBank(self.denoiser.add_noise(clean, noise, t), t, self.condition[rows])
