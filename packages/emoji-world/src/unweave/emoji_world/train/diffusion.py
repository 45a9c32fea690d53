"""Trains the latent diffusion model: v-prediction, zero terminal SNR, frozen text tower."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from unweave.emoji_world.models import save_fp16
from unweave.emoji_world.train.batches import DEVICE
from unweave.emoji_world.train.loop import Recipe, train
from unweave.emoji_world.train.pool import encoded_pool

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

RECIPES = {
    "cpu": Recipe(steps=9_200, batch_size=32, learning_rate=1.2e-3, ema=0.999, cool_down=0.6),
    "gpu": Recipe(steps=60_000, batch_size=512, learning_rate=1.2e-3, ema=0.9995, cool_down=0.6),
}
POOL_SIZES = {"cpu": 24_000, "gpu": 400_000}
EMPTY_PROMPT_RATE = 0.1


def build_unet(text_width: int = 128) -> UNet2DConditionModel:
    """The untrained denoiser, cross-attending at 16x16 and 8x8."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=8,
        cross_attention_dim=text_width,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of the pipeline."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def train_diffusion(
    recipe: Recipe, pool_size: int, work: Path, pipeline_folder: Path, warm_start: bool = False
) -> None:
    """Trains the denoiser on the folder's own `vae` and `text_encoder`, then completes the folder.

    With `warm_start` it begins with the folder's own `unet` instead of random weights.

    Raises:
        FileNotFoundError: when the autoencoder or the CLIP was not trained before.
    """
    from diffusers import StableDiffusionPipeline

    vae, text_encoder, tokenizer = _frozen_parts(pipeline_folder)
    torch.manual_seed(recipe.seed)
    unet, scheduler = build_unet(), build_scheduler()
    if warm_start:
        stored = type(unet).from_pretrained(pipeline_folder / "unet", use_safetensors=True)
        unet.load_state_dict(stored.float().state_dict())
    pool = encoded_pool(
        vae, text_encoder, tokenizer, pool_size, work / "diffusion", seed=recipe.seed
    )

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        latents, states = pool.draw(recipe.batch_size, EMPTY_PROMPT_RATE, generator)
        noise = torch.randn(latents.shape, generator=generator).to(DEVICE)
        timesteps = draw_timesteps(recipe.batch_size, generator).to(DEVICE)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = scheduler.get_velocity(latents, noise, timesteps)
        return functional.mse_loss(unet(noisy, timesteps, states).sample, target)

    train(unet, loss_at, recipe, work / "diffusion")
    pipe = StableDiffusionPipeline(
        vae=vae.cpu(),
        text_encoder=text_encoder.cpu(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save_fp16(unet, pipeline_folder / "unet")
    scheduler.save_pretrained(pipeline_folder / "scheduler")
    pipe.save_config(pipeline_folder)


def draw_timesteps(count: int, generator: torch.Generator, total: int = 1000) -> Tensor:
    """Timesteps `(count,)`: half of them uniform, half logit-normal (arXiv 2403.03206).

    At the ends little is left to decide; the middle is where shapes are formed.
    """
    uniform = torch.rand(count, generator=generator)
    middle = torch.randn(count, generator=generator).sigmoid()
    chosen = torch.where(torch.rand(count, generator=generator) < 0.5, uniform, middle)
    return (chosen * total).long().clamp(max=total - 1)


def _frozen_parts(folder: Path) -> tuple[AutoencoderKL, CLIPTextModel, CLIPTokenizer]:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    for needed, model in (("vae", "vae"), ("text_encoder", "clip")):
        if not (folder / needed).exists():
            raise FileNotFoundError(f"train {model!r} first: {folder / needed} is missing")
    vae = AutoencoderKL.from_pretrained(folder / "vae", use_safetensors=True).float()
    text_encoder = CLIPTextModel.from_pretrained(
        folder / "text_encoder", dtype=torch.float32, use_safetensors=True
    )
    for part in (vae, text_encoder):
        part.requires_grad_(False).eval().to(DEVICE)
    return vae, text_encoder, CLIPTokenizer.from_pretrained(folder / "tokenizer")
