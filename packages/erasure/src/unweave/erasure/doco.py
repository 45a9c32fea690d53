"""DoCo (arXiv 2405.15304): a discriminator tells a concept's outputs from those of an anchor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from unweave.diffusion_core.denoiser import Denoiser, Prediction
from unweave.diffusion_core.errors import SelectionError
from unweave.diffusion_core.parameters import select_parameters
from unweave.diffusion_core.pipelines import Pipeline
from unweave.diffusion_core.prompts import PromptStates
from unweave.diffusion_core.teacher import frozen_teacher
from unweave.diffusion_core.training import run_training
from unweave.erasure.anchor_images import (
    AnchorBatch,
    AnchorImagesConfig,
    AnchorPairs,
    anchor_of,
    anchor_pairs,
    noise_and_timesteps,
)
from unweave.erasure.fine_tuning import fine_tune_unet
from unweave.erasure.gradient_surgery import Scope, clip_norm, remove_conflict, with_gradients
from unweave.erasure.protocol import Erasure, ErasureRequest, check_number, check_pipeline

_SURGERIES = (*get_args(Scope), "none")
_SPACES = ("x0", "eps")
_DISCRIMINATOR_LR = {"object": 1e-4, "style": 5e-4}
_PRIOR_SCALE = 0.1
_MAX_NORM = 1.0
_CHANNELS = (64, 128, 256, 512)
_SMALLEST_LAST_INPUT = 3


@dataclass(frozen=True)
class DoCoConfig(AnchorImagesConfig):
    """Settings of DoCo, by default those of the paper's code, and of its anchor images.

    `lr` is 6e-6 times the batch size of 8. For the first `warm_up` steps only the discriminator
    learns, at `discriminator_lr`, of which None is 1e-4 for objects and 5e-4 for styles. It sees
    predictions in `d_space`, clean latents or noise, which `snr_weighted` multiplies by the rate of
    the clean latent so that they have one scale at all timesteps.

    `surgery` takes from the unlearning gradient what would raise the denoising loss of the anchor,
    for each tensor alone or for all as one vector, `surgery_strength` times. With "none" the two
    losses are added instead, the second one times 0.1 `prior_weight`. `legacy_scale` reproduces the
    scale of the authors' correction, which is larger than the projection. `detach_bos` keeps
    gradients from the keys and values of the start token.
    """

    num_steps: int = 2000
    warm_up: int = 1000
    batch_size: int = 8
    lr: float = 4.8e-5
    weight_decay: float = 1e-2
    discriminator_lr: float | None = None
    surgery: Literal["per_tensor", "global", "none"] = "per_tensor"
    surgery_strength: float = 1.0
    legacy_scale: bool = False
    prior_weight: float = 1.0
    d_space: Literal["x0", "eps"] = "x0"
    snr_weighted: bool = False
    detach_bos: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_steps", "batch_size", "lr"):
            check_number(name, getattr(self, name), "positive", lambda x: x > 0)
        for name in ("warm_up", "weight_decay", "surgery_strength", "prior_weight"):
            check_number(name, getattr(self, name), "at least 0", lambda x: x >= 0)
        if self.warm_up >= self.num_steps:
            raise SelectionError(
                f"`warm_up` must be less than `num_steps` {self.num_steps}, for the U-Net learns "
                f"after it only, got {self.warm_up}"
            )
        if self.discriminator_lr is not None:
            check_number("discriminator_lr", self.discriminator_lr, "positive", lambda x: x > 0)
        if self.surgery not in _SURGERIES:
            raise SelectionError(f"`surgery` must be one of {_SURGERIES}, got {self.surgery!r}")
        if self.d_space not in _SPACES:
            raise SelectionError(f"`d_space` must be one of {_SPACES}, got {self.d_space!r}")


class DoCo:
    """Erase by training keys and values until a concept's outputs pass for those of an anchor.

    The anchor is `request.replacement`, a broader concept: "painting" for the style of an artist.
    Several targets may be given, divided by ";". The recorded loss is the unlearning loss, also
    during the warm-up, when it is not used. The authors see weak robustness to attacks by prompts:
    measure it before relying on it.

    >>> DoCo(DoCoConfig(surgery="global")).config.warm_up
    1000
    """

    name: ClassVar[str] = "doco"
    config_class: ClassVar[type[DoCoConfig]] = DoCoConfig

    def __init__(self, config: DoCoConfig | None = None) -> None:
        """Keep the settings."""
        self.config = config or DoCoConfig()

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
        parameters = select_parameters(pipe.unet, "cross-attention-kv")
        lr = self.config.discriminator_lr or _DISCRIMINATOR_LR[request.kind]
        config = replace(self.config, discriminator_lr=lr)

        def train() -> list[float]:
            pairs = anchor_pairs(pipe, request, config, seed=seed, progress=progress)
            return correct_domain(
                Denoiser.from_pipeline(pipe),
                parameters,
                pairs,
                config,
                seed=seed,
                progress=progress,
            )

        return fine_tune_unet(pipe, request, parameters, train, method=self.name, config=config)


def correct_domain(
    student: Denoiser,
    parameters: dict[str, nn.Parameter],
    pairs: AnchorPairs,
    config: DoCoConfig,
    *,
    seed: int,
    progress: bool = False,
) -> list[float]:
    """Train `parameters` of the student against a new discriminator; return L_unl of each step.

    Both learn in every step on the same predictions, the student after the warm-up only.
    """
    teacher = replace(student, unet=frozen_teacher(student.unet, parameters))
    device = pairs.latents.device
    discriminator = patch_discriminator(*pairs.latents.shape[1:], seed=seed).to(device)
    trained = list(parameters.values())
    losses: list[float] = []

    def step_fn(step: int, generator: torch.Generator) -> Tensor:
        batch = pairs.batch(config.batch_size, seed, step)
        learns = trained if step >= config.warm_up else []
        loss, unlearning = doco_loss(
            student, teacher, discriminator, learns, batch, config, generator
        )
        losses.append(unlearning.item())
        return loss

    judges = {f"discriminator.{name}": p for name, p in discriminator.named_parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [*parameters.values()], "lr": config.lr, "weight_decay": config.weight_decay},
        {
            "params": [*judges.values()],
            "lr": config.discriminator_lr,
            "betas": (0.5, 0.999),
            "weight_decay": 0.0,
        },
    ]
    optimizer = torch.optim.AdamW(groups)
    with ExitStack() as stack:
        if config.detach_bos:
            stack.enter_context(start_token_detached(student.unet))
        run_training(
            step_fn,
            {**parameters, **judges},
            optimizer,
            num_steps=config.num_steps,
            seed=seed,
            progress=progress,
        )
    return losses


def doco_loss(
    student: Denoiser,
    teacher: Denoiser,
    discriminator: nn.Module,
    parameters: list[nn.Parameter],
    batch: AnchorBatch,
    config: DoCoConfig,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return the scalar to call `backward` on, and L_unl without gradient.

    The former is L_unl + L_D in value. Its gradients are those of L_D alone for the discriminator,
    and `unet_gradients` for the `parameters` of the student. Without `parameters` it is L_D.
    """
    noise, t = noise_and_timesteps(student, batch.latents, generator)
    prior_noise, prior_t = noise_and_timesteps(student, batch.whole, generator)
    noisy = student.add_noise(batch.latents, noise, t)
    with torch.no_grad():
        anchor = domain(teacher.predict(noisy, t, batch.anchor), config)
    if not parameters:
        with torch.no_grad():
            target = domain(student.predict(noisy, t, batch.target), config)
            unlearning = unlearning_loss(discriminator, target)
        return discriminator_loss(discriminator, anchor, target), unlearning
    prediction, prior = _predict_both(student, batch, noisy, t, prior_noise, prior_t)
    target = domain(prediction, config)
    unlearning = unlearning_loss(discriminator, target)
    gradients = unet_gradients(unlearning, prior, parameters, config)
    judging = discriminator_loss(discriminator, anchor, target.detach())
    return with_gradients(unlearning, parameters, gradients) + judging, unlearning.detach()


def domain(prediction: Prediction, config: DoCoConfig) -> Tensor:
    """Return what the discriminator is shown of a prediction, (n, C, h, w)."""
    shown = prediction.clean if config.d_space == "x0" else prediction.epsilon
    return prediction.alpha * shown if config.snr_weighted else shown


def unlearning_loss(discriminator: nn.Module, target: Tensor) -> Tensor:
    """Return L_unl = BCE(D(target), 0): the target's outputs should be taken for the anchor's."""
    logits = discriminator(target)
    return bce(logits, torch.zeros_like(logits))


def discriminator_loss(discriminator: nn.Module, anchor: Tensor, target: Tensor) -> Tensor:
    """Return L_D = BCE(D(anchor), 0) + BCE(D(target), 1)."""
    logits = discriminator(target)
    return unlearning_loss(discriminator, anchor) + bce(logits, torch.ones_like(logits))


def unet_gradients(
    unlearning: Tensor, prior: Tensor, parameters: list[nn.Parameter], config: DoCoConfig
) -> list[Tensor]:
    """Return the gradients by which DoCo trains `parameters`, clipped to norm 1 as a whole.

    With surgery they are those of L_unl without what is against those of L_prior, both clipped
    before; the latter are never added. Without, they are those of L_unl + 0.1 w_prior L_prior.
    """
    if config.surgery == "none":
        loss = unlearning + _PRIOR_SCALE * config.prior_weight * prior
        return clip_norm(torch.autograd.grad(loss, parameters), _MAX_NORM)
    gradients = remove_conflict(
        clip_norm(torch.autograd.grad(unlearning, parameters, retain_graph=True), _MAX_NORM),
        clip_norm(torch.autograd.grad(prior, parameters), _MAX_NORM),
        scope=config.surgery,
        strength=config.surgery_strength,
        legacy_scale=config.legacy_scale,
    )
    return clip_norm(gradients, _MAX_NORM)


def patch_discriminator(channels: int, height: int, width: int, *, seed: int = 0) -> nn.Sequential:
    """Return a PatchGAN that judges latents (n, channels, height, width) patch by patch.

    Latents of 64 x 64 become 3 x 3 logits through four convolutions of stride 2 and one of stride
    1; smaller ones pass as many of the four as leave at least 2 x 2. Batch norms always use the
    statistics of their batch. Weights depend on `seed` alone. Raises `SelectionError` for latents
    below 3 x 3.

    >>> patch_discriminator(4, 64, 64)(torch.zeros(2, 4, 64, 64)).shape
    torch.Size([2, 1, 3, 3])
    """
    side = min(height, width)
    if side < _SMALLEST_LAST_INPUT:
        raise SelectionError(f"latents must be 3 x 3 or larger, got {height} x {width}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for index, wider in enumerate(_CHANNELS):
            if side // 2 < _SMALLEST_LAST_INPUT:
                break
            layers.append(nn.Conv2d(channels, wider, 4, stride=2, padding=1))
            if index > 0:
                layers.append(nn.BatchNorm2d(wider, track_running_stats=False))
            layers.append(nn.LeakyReLU(0.2))
            channels, side = wider, side // 2
        return nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, padding=1))


@contextmanager
def start_token_detached(unet: nn.Module) -> Iterator[None]:
    """Keep gradients from the start token's keys and values while the block runs."""
    from diffusers.models.attention_processor import Attention

    crossing = [m for m in unet.modules() if isinstance(m, Attention) and m.is_cross_attention]
    handles = [
        layer.register_forward_hook(_detach_first)
        for attention in crossing
        for layer in (attention.to_k, attention.to_v)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _detach_first(_: nn.Module, __: object, output: Tensor) -> Tensor:
    return torch.cat([output[:, :1].detach(), output[:, 1:]], 1)


def _predict_both(
    student: Denoiser,
    batch: AnchorBatch,
    noisy: Tensor,
    t: Tensor,
    prior_noise: Tensor,
    prior_t: Tensor,
) -> tuple[Prediction, Tensor]:
    """Return the target's prediction and L_prior, both from one call of the U-Net."""
    count = len(noisy)
    prior_noisy = student.add_noise(batch.whole, prior_noise, prior_t)
    both = student.predict(
        torch.cat([noisy, prior_noisy]),
        torch.cat([t, prior_t]),
        PromptStates.cat([batch.target, batch.anchor]),
    )
    target = replace(
        both,
        noisy=both.noisy[:count],
        alpha=both.alpha[:count],
        sigma=both.sigma[:count],
        raw=both.raw[:count],
    )
    wanted = student.target(batch.whole, prior_noise, prior_t)
    return target, nn.functional.mse_loss(both.raw[count:], wanted)
