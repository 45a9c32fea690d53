"""Few-shot erasing (arXiv 2405.07288): unlearn a concept in the text encoder from a few images."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from unweave.diffusion_core.denoiser import Denoiser
from unweave.diffusion_core.errors import PipelineError, SelectionError
from unweave.diffusion_core.latents import encode_images, load_images
from unweave.diffusion_core.objective import denoising_loss
from unweave.diffusion_core.parameters import select_parameters, train_only
from unweave.diffusion_core.pipelines import base_model_hash, generate, text_encoders
from unweave.diffusion_core.prompts import (
    OBJECT_TEMPLATES,
    STYLE_TEMPLATES,
    encode_prompts,
    fill,
    mentions,
)
from unweave.diffusion_core.training import batch_indices, run_training
from unweave.diffusion_core.weight_delta import DeltaMeta, WeightDelta
from unweave.erasure.protocol import (
    Erasure,
    ErasureRequest,
    changes_since,
    check_number,
    check_pipeline,
    check_trainable,
    restored,
)

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

TEXT_ENCODER_SUBSETS = ("mlp-only", "attn-only", "mlp-attn", "mlp-final-attn", "all")
"""What can be trained: MLPs, attentions, both, MLPs and the last attention, or everything."""

_TEMPLATES = {"object": OBJECT_TEMPLATES, "style": STYLE_TEMPLATES}


@dataclass(frozen=True)
class FewShotConfig:
    """Settings of few-shot erasing, by default those of the paper.

    Learning rates suit CLIP ViT-L/14; small text encoders need larger ones. `trainable` is one of
    `TEXT_ENCODER_SUBSETS`. With `latents="noise"` no images are used (experimental). Without
    images in the request, `num_images` are generated from the first templates with
    `guidance_scale` and `num_inference_steps`. `resolution` None is the pipeline's own; images of
    another shape are squeezed into its square unless `center_crop`.
    `templates` None are the 27 object or 19 style templates of diffusion-core.

    The paper keeps nothing but by stopping early. An extension does: `preserve_weight` times the
    mean squared change of text states of `preserve_batch_size` prompts a step, drawn from those of
    the preserved concepts and from the `anchors` that do not name the target.
    """

    epochs: int = 5
    batch_size: int = 2
    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 1e-8
    trainable: Literal["mlp-only", "attn-only", "mlp-attn", "mlp-final-attn", "all"] = (
        "mlp-final-attn"
    )
    latents: Literal["images", "noise"] = "images"
    num_images: int = 4
    flip_probability: float = 0.5
    resolution: int | None = None
    center_crop: bool = False
    templates: tuple[str, ...] | None = None
    guidance_scale: float = 7.5
    num_inference_steps: int = 50
    preserve_weight: float = 0.0
    preserve_batch_size: int = 32
    anchors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "anchors", tuple(self.anchors))
        positive = ("epochs", "batch_size", "lr", "eps", "num_images", "num_inference_steps")
        for name in (*positive, "preserve_batch_size"):
            check_number(name, getattr(self, name), "positive", lambda x: x > 0)
        for name in ("weight_decay", "guidance_scale", "preserve_weight"):
            check_number(name, getattr(self, name), "at least 0", lambda x: x >= 0)
        for beta in self.betas:
            check_number("betas", beta, "two numbers in [0, 1)", lambda x: 0 <= x < 1)
        check_number("flip_probability", self.flip_probability, "in [0, 1]", lambda x: 0 <= x <= 1)
        if self.trainable not in TEXT_ENCODER_SUBSETS:
            raise SelectionError(
                f"`trainable` must be one of {TEXT_ENCODER_SUBSETS}, got {self.trainable!r}"
            )
        if self.latents not in ("images", "noise"):
            raise SelectionError(f'`latents` must be "images" or "noise", got {self.latents!r}')
        if self.templates is not None:
            object.__setattr__(self, "templates", tuple(self.templates))
            if not self.templates or any(text.count("{}") != 1 for text in self.templates):
                raise SelectionError(
                    f'`templates` must be texts with one "{{}}" each, got {self.templates!r}'
                )


class FewShotErasing:
    """Erase by gradient ascent of the denoising loss in the text encoder, in about ten steps.

    Uses `request.images`, about four images of the target; without them it generates its own, 4
    by default, from its first templates with the pipeline it is given. No replacement is needed:
    the prompt drifts to a neighbouring concept. `Erasure.keep_epochs` has the delta after each
    epoch: take the mildest that erases, since the loss is unbounded and other concepts suffer.

    >>> FewShotErasing(FewShotConfig(epochs=4)).config.lr
    1e-05
    """

    name: ClassVar[str] = "few-shot"
    config_class: ClassVar[type[FewShotConfig]] = FewShotConfig

    def __init__(self, config: FewShotConfig | None = None) -> None:
        """Keep the settings."""
        self.config = config or FewShotConfig()

    def erase(
        self,
        pipe: StableDiffusionPipeline,
        request: ErasureRequest,
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> Erasure:
        """Train the chosen part of the text encoder; `pipe` has its old weights back at the end.

        Images, templates, timesteps and noise depend on `seed` alone. Raises `PipelineError` for
        Stable Diffusion XL, which has two text encoders.
        """
        _check_text_encoder(pipe)
        config = self.config
        parameters = select_parameters(pipe.text_encoder, config.trainable)
        check_trainable(parameters)
        base_hash = base_model_hash(pipe)
        base_text_encoder = copy.deepcopy(pipe.text_encoder).cpu()
        latents, source = clean_latents(pipe, request, config, seed)
        epochs: list[WeightDelta] = []
        with restored(parameters) as originals:

            def keep_epoch() -> None:
                changes = {"text_encoder": changes_since(originals, parameters)}
                settings = {**asdict(config), "epochs": len(epochs) + 1, "image_source": source}
                epochs.append(WeightDelta(changes, DeltaMeta(base_hash, self.name, settings)))

            with train_only([pipe.text_encoder, pipe.unet, pipe.vae], parameters):
                history = unlearn(
                    lambda prompts: encode_prompts(pipe, prompts),
                    parameters,
                    Denoiser.from_pipeline(pipe),
                    latents,
                    [fill(text, request.target) for text in _templates(config, request)],
                    config,
                    kept_prompts=_kept_prompts(config, request),
                    seed=seed,
                    progress=progress,
                    on_epoch=keep_epoch,
                )
        return Erasure(
            epochs[-1],
            request,
            history=history,
            keep_epochs=epochs,
            base_text_encoder=base_text_encoder,
        )


def unlearn(
    encode: Callable[[list[str]], Tensor],
    parameters: Mapping[str, nn.Parameter],
    denoiser: Denoiser,
    latents: Tensor,
    prompts: Sequence[str],
    config: FewShotConfig,
    *,
    seed: int,
    kept_prompts: Sequence[str] = (),
    progress: bool = False,
    on_epoch: Callable[[], None] | None = None,
) -> list[float]:
    """Raise the denoising loss of `latents` (n, C, h, w) under `prompts`; return it by step.

    `encode` gives text states (n, tokens, width) that depend on `parameters`, the only tensors
    that change. With `config.latents == "noise"`, `latents` gives only count and shape. A prompt,
    a timestep and noise are drawn for each sample, all from the generator of the step. States of
    `kept_prompts` are held by `config.preserve_weight`.
    """
    count = len(latents)
    steps_per_epoch = math.ceil(count / config.batch_size)
    losses: list[float] = []
    retention = _Retention(encode, kept_prompts, config)

    def step_fn(step: int, generator: torch.Generator) -> Tensor:
        if on_epoch is not None and step > 0 and step % steps_per_epoch == 0:
            on_epoch()
        clean = latents[batch_indices(count, config.batch_size, seed, step)]
        size = len(clean)
        if config.latents == "noise":
            clean = torch.randn(clean.shape, generator=generator).to(clean)
        choices = torch.randint(len(prompts), (size,), generator=generator).tolist()
        t = torch.randint(denoiser.num_train_timesteps, (size,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        states = encode([prompts[choice] for choice in choices])
        loss = denoising_loss(denoiser, clean, states, t.to(clean.device), noise)
        losses.append(loss.item())
        return retention.penalty(generator) - loss

    run_training(
        step_fn,
        dict(parameters),
        torch.optim.Adam(
            parameters.values(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        ),
        num_steps=config.epochs * steps_per_epoch,
        seed=seed,
        progress=progress,
    )
    if on_epoch is not None:
        on_epoch()
    return losses


class _Retention:
    """Holds the text states of prompts where they were when it was made."""

    def __init__(
        self, encode: Callable[[list[str]], Tensor], prompts: Sequence[str], config: FewShotConfig
    ) -> None:
        self.encode, self.config = encode, config
        self.prompts = list(prompts) if config.preserve_weight > 0 else []
        with torch.no_grad():
            self.states = encode(self.prompts) if self.prompts else torch.zeros(())

    def penalty(self, generator: torch.Generator) -> Tensor:
        """The weighted mean squared change of a batch of states, 0 without prompts."""
        if not self.prompts:
            return torch.zeros(())
        count = min(self.config.preserve_batch_size, len(self.prompts))
        chosen = torch.randperm(len(self.prompts), generator=generator)[:count]
        states = self.encode([self.prompts[index] for index in chosen.tolist()])
        before = self.states[chosen.to(self.states.device)]
        return self.config.preserve_weight * functional.mse_loss(states, before)


def clean_latents(
    pipe: StableDiffusionPipeline, request: ErasureRequest, config: FewShotConfig, seed: int
) -> tuple[Tensor, str]:
    """Return latents (n, C, h, w) to unlearn and where they come from.

    Each image is flipped with `config.flip_probability` and its latent drawn from the posterior,
    once. Noise latents are zeros that only give the shape; `unlearn` draws them.
    """
    size = pipe.unet.config.sample_size
    if config.latents == "noise":
        shape = (config.num_images, pipe.unet.config.in_channels, size, size)
        return torch.zeros(shape, device=pipe.unet.device), "noise"
    resolution = config.resolution or size * pipe.vae_scale_factor
    given = request.images is not None
    images = load_images(
        request.images if request.images is not None else _generated(pipe, request, config, seed),
        resolution,
        center_crop=config.center_crop,
    )
    generator = torch.Generator().manual_seed(seed)
    flipped = torch.rand(len(images), generator=generator) < config.flip_probability
    images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
    with torch.no_grad():
        latents = encode_images(pipe.vae, images, generator)
    return latents.detach(), "given" if given else "generated"


def _check_text_encoder(pipe: StableDiffusionPipeline) -> None:
    check_pipeline(pipe)
    if len(text_encoders(pipe)) > 1:
        raise PipelineError(
            f"this {type(pipe).__name__} has two text encoders, and few-shot erasing trains the "
            "one of Stable Diffusion 1.x and 2.x; the erasers uce and esd work on XL"
        )


def _generated(
    pipe: StableDiffusionPipeline, request: ErasureRequest, config: FewShotConfig, seed: int
) -> Tensor:
    templates = _templates(config, request)
    prompts = [
        fill(templates[index % len(templates)], request.target)
        for index in range(config.num_images)
    ]
    return generate(
        pipe,
        prompts,
        seeds=[seed + index for index in range(config.num_images)],
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
    )


def _templates(config: FewShotConfig, request: ErasureRequest) -> Sequence[str]:
    return _TEMPLATES[request.kind] if config.templates is None else config.templates


def _kept_prompts(config: FewShotConfig, request: ErasureRequest) -> list[str]:
    preserved = [
        fill(text, concept) for concept in request.preserve for text in _templates(config, request)
    ]
    return preserved + [text for text in config.anchors if not mentions(text, request.target)]
