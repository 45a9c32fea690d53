"""Trains the autoencoder: 64x64x3 pixels to 16x16x4 latents of unit variance.

The decoder alone can be trained further, which leaves the latents, and so the denoiser, valid.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unweave.emoji_world.train.batches import DEVICE, SceneBatches
from unweave.emoji_world.train.loop import Recipe, train

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

RECIPES = {
    "cpu": Recipe(steps=3_800, batch_size=8, learning_rate=2e-3),
    "gpu": Recipe(steps=40_000, batch_size=64, learning_rate=2e-3, ema=0.999),
}
DECODER_RECIPES = {
    "cpu": Recipe(steps=3_000, batch_size=8, learning_rate=1e-3),
    "gpu": Recipe(steps=20_000, batch_size=64, learning_rate=1e-3, ema=0.999),
}
KL_WEIGHT = 1e-6
TEXTURE_RATE = 0.15


def build_vae() -> AutoencoderKL:
    """The untrained autoencoder."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
        scaling_factor=1.0,
    )


def train_vae(recipe: Recipe, work: Path) -> AutoencoderKL:
    """L1 + L2 reconstruction with a faint KL term, then the scale that makes latents unit-sized."""
    torch.manual_seed(recipe.seed)
    vae = build_vae()
    batches = SceneBatches(recipe.batch_size, seed=recipe.seed, texture_rate=TEXTURE_RATE)

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        images = batches[step].images
        posterior = vae.encode(images).latent_dist
        reconstruction = vae.decode(posterior.sample(generator)).sample
        divergence: Tensor = posterior.kl().mean()
        return reconstruction_loss(reconstruction, images) + KL_WEIGHT * divergence

    train(vae, loss_at, recipe, work / "vae")
    with torch.no_grad():
        images = SceneBatches(256, seed=recipe.seed + 1)[0].images.cpu()
        scale = 1 / vae.encode(images).latent_dist.mean.std()
    vae.register_to_config(scaling_factor=float(scale))
    return vae


def train_decoder(recipe: Recipe, work: Path, folder: Path) -> AutoencoderKL:
    """Trains the decoder of the autoencoder in `folder` further; its encoder stays bit-identical.

    Raises:
        FileNotFoundError: when no autoencoder was trained before.
    """
    from diffusers import AutoencoderKL

    if not folder.exists():
        raise FileNotFoundError(f"train 'vae' first: {folder} is missing")
    vae = AutoencoderKL.from_pretrained(folder, use_safetensors=True).float().to(DEVICE)
    batches = SceneBatches(recipe.batch_size, seed=recipe.seed + 2, texture_rate=TEXTURE_RATE)
    decoder = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        images = batches[step].images
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.sample(generator)
        return reconstruction_loss(vae.decode(latents).sample, images)

    train(decoder, loss_at, recipe, work / "decoder")
    return vae.cpu()


def reconstruction_loss(reconstruction: Tensor, images: Tensor) -> Tensor:
    """L1 + L2."""
    error = reconstruction - images
    return error.abs().mean() + error.square().mean()
