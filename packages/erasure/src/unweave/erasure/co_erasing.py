"""Co-Erasing (arXiv 2505.11131): erase by text, then by text and images of the concept together."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unweave.diffusion_core.denoiser import Denoiser
from unweave.diffusion_core.errors import ImageError, SelectionError
from unweave.diffusion_core.latents import load_images
from unweave.diffusion_core.parameters import train_only
from unweave.diffusion_core.pipelines import Pipeline, generate
from unweave.diffusion_core.prompts import PromptStates, encode_conditions, fill
from unweave.diffusion_core.teacher import frozen_teacher
from unweave.diffusion_core.training import run_training
from unweave.diffusion_core.trajectories import TrajectoryBank
from unweave.erasure.esd import ESD_SUBSETS, trainable_parameters
from unweave.erasure.fine_tuning import fine_tune_unet
from unweave.erasure.image_prompts import ImagePrompts, image_prompts_off, with_image
from unweave.erasure.protocol import Erasure, ErasureRequest, check_number, check_pipeline

CONTRASTS = ("signed", "absolute", "squared")
"""How the embedding of an image with the concept is set against one without it."""

_IMAGE_TEMPLATES = {"object": "a photo of {}", "style": "a drawing of {}"}
_OWN_STATISTICS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@dataclass(frozen=True)
class CoErasingConfig:
    """Settings of Co-Erasing, by default those of the authors' README and code.

    `text_steps` of ESD on `text_trainable` come first, none for a model that is erased already;
    then `image_steps` on `image_trainable`, both with negative guidance `eta`. `uncond` says
    whether the target starts from the empty prompt alone ("text") or with the image ("joint").

    Images are `num_images` of the model itself, of `image_template` (by default "a photo of {}",
    for styles "a drawing of {}"), sampled with `image_guidance_scale`, unless the request has some.
    With `refine` their tokens are replaced by what they point at among the text's. `contrast` takes
    embeddings relative to images of the same seeds without the concept; `average_pairs` takes the
    mean of all pairs instead of a random one.

    Noisy latents are those on unguided trajectories of the model in training, blurred by a kernel
    of `blur` pixels (0 for none): `num_trajectories` are followed anew every `refresh_every` steps.
    `adapter` is a folder that `ImagePrompts.save` wrote; without it the pipeline must have an
    IP-Adapter. `legacy_latents` follows trajectories from low to high noise, and `legacy_norm`
    normalises pixels by 0.5, as the authors' code does.
    """

    text_trainable: Literal["esd-x", "esd-x-strict", "esd-u", "esd-all"] = "esd-x"
    image_trainable: Literal["esd-x", "esd-x-strict", "esd-u", "esd-all"] = "esd-all"
    text_steps: int = 1000
    image_steps: int = 1500
    eta: float = 1.0
    uncond: Literal["text", "joint"] = "text"
    lr: float = 1e-5
    batch_size: int = 1
    templates: tuple[str, ...] = ("{}",)
    num_images: int = 200
    image_template: str | None = None
    image_guidance_scale: float = 7.5
    refine: bool = True
    contrast: Literal["signed", "absolute", "squared"] | None = None
    average_pairs: bool = False
    blur: int = 5
    num_inference_steps: int = 50
    num_trajectories: int = 4
    refresh_every: int = 100
    adapter: str | None = None
    legacy_latents: bool = False
    legacy_norm: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", tuple(self.templates))
        choices: dict[str, tuple[Any, ...]] = {
            "text_trainable": tuple(ESD_SUBSETS),
            "image_trainable": tuple(ESD_SUBSETS),
            "uncond": ("text", "joint"),
            "contrast": (None, *CONTRASTS),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise SelectionError(
                    f"`{name}` must be one of {known}, got {getattr(self, name)!r}"
                )
        for name in ("lr", "num_inference_steps"):
            check_number(name, getattr(self, name), "positive", lambda x: x > 0)
        for name in (
            "batch_size",
            "image_steps",
            "num_images",
            "num_trajectories",
            "refresh_every",
        ):
            check_number(name, getattr(self, name), "at least 1", lambda x: x >= 1)
        for name in ("eta", "text_steps", "image_guidance_scale"):
            check_number(name, getattr(self, name), "at least 0", lambda x: x >= 0)
        check_number("blur", self.blur, "0 or an odd number", lambda x: x == 0 or x % 2 == 1)
        texts = [*self.templates, *([self.image_template] if self.image_template else [])]
        if not self.templates or any(text.count("{}") != 1 for text in texts):
            raise SelectionError(
                'every one of `templates` and `image_template` must be a text with one "{}", got '
                f"{texts!r}"
            )


class CoErasing:
    """Erase what images show of a concept as well as its name, on top of an erasure by text.

    The image branch is a frozen IP-Adapter, which is off again in the result: the erasure is one
    of the plain U-Net. Training is ESD's twice, the second time with the prompt and an image
    together as the concept. The paper's settings for single concepts are unconfirmed, as are the
    trained layers of its "full" mode (here all linear and convolution layers, never norms) and, for
    Stable Diffusion XL, the refinement by the states of both text encoders.

    To apply the result to a pipeline with an IP-Adapter loaded, apply it first and load it after.
    """

    name: ClassVar[str] = "co-erasing"
    config_class: ClassVar[type[CoErasingConfig]] = CoErasingConfig

    def __init__(self, config: CoErasingConfig | None = None) -> None:
        """Keep the settings."""
        self.config = config or CoErasingConfig()

    def erase(
        self,
        pipe: Pipeline,
        request: ErasureRequest,
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> Erasure:
        """Train both stages; `pipe` has its old weights, and its adapter, back at the end.

        `request.images` take the place of generated ones. Raises `PipelineError` when neither the
        settings nor the pipeline name an IP-Adapter, `ImageError` for given images with `contrast`.
        """
        check_pipeline(pipe)
        config = self.config
        if config.contrast and request.images is not None:
            raise ImageError(
                "`contrast` needs pairs of images with and without the concept, which the model "
                "makes: leave `images` out of the request, or `contrast` at None"
            )
        adapter = (
            ImagePrompts.of(pipe)
            if config.adapter is None
            else ImagePrompts.load(config.adapter, pipe.unet)
        )
        with image_prompts_off(pipe):
            first = trainable_parameters(pipe.unet, config.text_trainable)
            second = trainable_parameters(pipe.unet, config.image_trainable)

            def train() -> list[float]:
                tokens = self._image_tokens(pipe, request, adapter, seed)
                prompts = [fill(template, request.target) for template in config.templates]
                with torch.no_grad():
                    states = encode_conditions(pipe, prompts), encode_conditions(pipe, [""])
                losses = []
                if config.text_steps:
                    teacher = frozen_teacher(pipe.unet, first)
                    denoisers = _denoisers(pipe, pipe.unet, teacher)
                    losses += self._stage(denoisers, states, None, first, seed, progress)
                teacher = frozen_teacher(pipe.unet, second)
                length = states[0].hidden_states.shape[1]
                with (
                    adapter.attached(pipe.unet, length) as unet,
                    adapter.attached(teacher, length) as original,
                ):
                    denoisers = _denoisers(pipe, unet, original)
                    losses += self._stage(denoisers, states, tokens, second, seed + 1, progress)
                return losses

            both = {**second, **(first if config.text_steps else {})}
            return fine_tune_unet(pipe, request, both, train, method=self.name, config=config)

    def _stage(
        self,
        denoisers: tuple[Denoiser, Denoiser],
        states: tuple[PromptStates, PromptStates],
        tokens: Tensor | None,
        parameters: dict[str, nn.Parameter],
        seed: int,
        progress: bool,
    ) -> list[float]:
        """Train `parameters` on the concept's prompts, with images of it if there are `tokens`."""
        config = self.config
        (student, teacher), (concepts, empty) = denoisers, states
        bank: TrajectoryBank | None = None

        def step_fn(step: int, generator: torch.Generator) -> Tensor:
            nonlocal bank
            if bank is None or step % config.refresh_every == 0:
                bank = self._latents(student, concepts, empty, generator)
            drawn = bank.draw(config.batch_size, generator)
            noisy = gaussian_blur(drawn.noisy, config.blur) if config.blur else drawn.noisy
            concept, uncond = concepts.select(drawn.condition), empty
            if tokens is not None:
                shown = tokens[torch.randint(len(tokens), (len(noisy),), generator=generator)]
                concept = with_image(concept, shown)
                uncond = with_image(empty, shown) if config.uncond == "joint" else empty
            return co_erasing_loss(student, teacher, noisy, drawn.t, concept, uncond, config.eta)

        optimizer = torch.optim.Adam(parameters.values(), lr=config.lr)
        num_steps = config.text_steps if tokens is None else config.image_steps
        with train_only([student.unet], parameters):
            return run_training(
                step_fn, parameters, optimizer, num_steps=num_steps, seed=seed, progress=progress
            )

    def _latents(
        self,
        student: Denoiser,
        concepts: PromptStates,
        empty: PromptStates,
        generator: torch.Generator,
    ) -> TrajectoryBank:
        config = self.config
        count = max(config.num_trajectories, len(concepts.hidden_states))
        if config.legacy_latents:
            return legacy_bank(
                student,
                concepts,
                num_trajectories=count,
                num_inference_steps=config.num_inference_steps,
                generator=generator,
            )
        return TrajectoryBank.collect(
            student,
            student.scheduler,
            concepts,
            empty,
            num_trajectories=count,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=1.0,
            generator=generator,
        )

    @torch.no_grad()
    def _image_tokens(
        self, pipe: Pipeline, request: ErasureRequest, adapter: ImagePrompts, seed: int
    ) -> Tensor:
        """Return the tokens (m, 4, width) of the images, or of pairs of images, of the concept."""
        config = self.config
        statistics = _OWN_STATISTICS if config.legacy_norm else {}
        template = config.image_template or _IMAGE_TEMPLATES[request.kind]

        def embeds_of(prompt: str) -> Tensor:
            seeds = torch.Generator().manual_seed(seed)
            images = generate(
                pipe,
                [prompt] * config.num_images,
                seeds=torch.randint(2**31, (config.num_images,), generator=seeds).tolist(),
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.image_guidance_scale,
            )
            return adapter.embed(images, **statistics)

        if request.images is not None:
            size = pipe.unet.config.sample_size * pipe.vae_scale_factor
            embeds = adapter.embed((load_images(request.images, size) + 1) / 2, **statistics)
        else:
            embeds = embeds_of(fill(template, request.target))
        if config.contrast:
            without = template.replace("{}", request.replacement or "").strip()
            embeds = contrast(embeds, embeds_of(without), config.contrast)
            embeds = embeds.mean(0, keepdim=True) if config.average_pairs else embeds
        tokens = adapter.tokens(embeds)
        if not config.refine:
            return tokens
        return refined_tokens(tokens, encode_conditions(pipe, [request.target]).hidden_states)


def co_erasing_loss(
    student: Denoiser,
    teacher: Denoiser,
    noisy: Tensor,
    t: Tensor,
    concept: PromptStates,
    uncond: PromptStates,
    eta: float,
) -> Tensor:
    """Return the mean || raw(z_t, c, v) - [u - eta (raw*(z_t, c, v) - u)] ||^2, in float32.

    `concept` is the prompt with an image (see `with_image`), or alone in the text stage, which
    makes this ESD's loss; u is the frozen model's output under `uncond`. `noisy` is (n, C, h, w),
    `t` (n,), states are of n prompts or one. The combination is taken in noise or velocity alike.
    """
    with torch.no_grad():
        start = teacher.predict(noisy, t, uncond).raw.float()
        target = start - eta * (teacher.predict(noisy, t, concept).raw.float() - start)
    return nn.functional.mse_loss(student.predict(noisy, t, concept).raw.float(), target)


def refinement_weights(image_tokens: Tensor, text_tokens: Tensor) -> Tensor:
    """Return softmax(V C^T / sqrt(width)), how much each image token points at each text token.

    V is `image_tokens` (n, k, width), C `text_tokens` (n or 1, tokens, width); the result is
    (n, k, tokens), not negative, and sums to 1 over the tokens.
    """
    scores = image_tokens @ text_tokens.to(image_tokens).transpose(1, 2)
    return (scores / math.sqrt(image_tokens.shape[-1])).softmax(-1)


def refined_tokens(image_tokens: Tensor, text_tokens: Tensor) -> Tensor:
    """Return the part of the text that the image points at, (n, k, width), for image tokens.

    Each token is a convex combination of `text_tokens` by `refinement_weights`, so background,
    pose and light, which the text does not have, are left behind.
    """
    return refinement_weights(image_tokens, text_tokens) @ text_tokens.to(image_tokens)


def contrast(
    positive: Tensor, negative: Tensor, kind: Literal["signed", "absolute", "squared"]
) -> Tensor:
    """Return positive - negative, its absolute value or its square, for embeddings (n, d)."""
    difference = positive - negative
    if kind == "signed":
        return difference
    return difference.abs() if kind == "absolute" else difference.square()


def gaussian_blur(latents: Tensor, kernel_size: int) -> Tensor:
    """Return `latents` (n, C, h, w) convolved with a Gaussian, mirrored at the borders.

    Its standard deviation is 0.15 `kernel_size` + 0.35, as is usual for a size given alone. Raises
    `SelectionError` unless the size is odd and less than twice the side of the latents.
    """
    radius = kernel_size // 2
    if kernel_size % 2 != 1 or radius >= min(latents.shape[-2:]):
        raise SelectionError(
            f"`kernel_size` must be odd and less than twice the side of latents "
            f"{tuple(latents.shape)}, got {kernel_size}"
        )
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32, device=latents.device)
    bell = (-(offsets**2) / (2 * (0.15 * kernel_size + 0.35) ** 2)).exp()
    line = (bell / bell.sum()).to(latents.dtype)
    kernel = (line[:, None] * line).expand(latents.shape[1], 1, -1, -1)
    padded = nn.functional.pad(latents, [radius] * 4, mode="reflect")
    return nn.functional.conv2d(padded, kernel, groups=latents.shape[1])


@torch.no_grad()
def legacy_bank(
    denoiser: Denoiser,
    concepts: PromptStates,
    *,
    num_trajectories: int,
    num_inference_steps: int,
    generator: torch.Generator,
) -> TrajectoryBank:
    """Return latents as the authors' code makes them: DDPM steps from low noise to high.

    These are no partial denoisings. After k + 1 steps of N, the timestep is drawn uniformly from
    the k-th of N equal bins. Trajectory i follows row i modulo k of `concepts`.
    """
    from diffusers import DDPMScheduler

    steps = DDPMScheduler.from_config(denoiser.scheduler.config)
    steps.set_timesteps(num_inference_steps)
    unet: Any = denoiser.unet
    chosen = torch.arange(num_trajectories) % len(concepts.hidden_states)
    states = concepts.select(chosen)
    shape = (num_trajectories, unet.config.in_channels, *[unet.config.sample_size] * 2)
    latents = torch.randn(shape, generator=generator).to(states.hidden_states)
    bin_size = denoiser.num_train_timesteps // num_inference_steps
    parts = []
    for k, t in enumerate(reversed(steps.timesteps.tolist())):
        raw = denoiser.predict(latents, torch.tensor(t), states).raw
        latents = steps.step(raw, t, latents, generator=generator, return_dict=False)[0]
        drawn = torch.randint(bin_size, (num_trajectories,), generator=generator) + k * bin_size
        parts.append((latents, drawn.to(latents.device), chosen))
    return TrajectoryBank(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _denoisers(pipe: Pipeline, student: Any, teacher: Any) -> tuple[Denoiser, Denoiser]:
    first = Denoiser(student, pipe.scheduler, pipe.vae_scale_factor)
    return first, replace(first, unet=teacher)
