"""Scenes that are encoded once, before a denoiser learns from them many times."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from unweave.emoji_world.train.batches import DEVICE, SceneBatches
from unweave.emoji_world.world import World

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

CHUNK = 200


@dataclass(frozen=True)
class EncodedPool:
    """Latents `(n, 4, 16, 16)` of unit variance, text states `(n, 32, 128)`, both float16.

    `empty` `(32, 128)` is the state of the empty prompt.
    """

    latents: Tensor
    states: Tensor
    empty: Tensor

    def draw(
        self, count: int, empty_rate: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Latents and states of random scenes in float32, some with the empty prompt's states."""
        rows = torch.randint(len(self.latents), (count,), generator=generator)
        dropped = torch.rand(count, generator=generator) < empty_rate
        states = torch.where(dropped[:, None, None], self.empty, self.states[rows])
        return self.latents[rows].float().to(DEVICE), states.float().to(DEVICE)


def encoded_pool(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    size: int,
    folder: Path,
    *,
    seed: int,
) -> EncodedPool:
    """Encodes `size` scenes of the core concepts, or loads them where `folder` has them."""
    path = folder / "pool.safetensors"
    identity = _fingerprint(vae, text_encoder, size, seed)
    if path.exists():
        with safe_open(path, "pt") as file:
            known = file.metadata()
        if known == identity:
            return EncodedPool(**load_file(path))
    pool = _encode(vae, text_encoder, tokenizer, size, seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(vars(pool), path.with_suffix(".tmp"), metadata=identity)
    path.with_suffix(".tmp").replace(path)
    return pool


@torch.no_grad()
def _encode(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    size: int,
    seed: int,
) -> EncodedPool:
    from rich.progress import track

    def states_of(prompts: list[str]) -> Tensor:
        tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        states: Tensor = text_encoder(tokens.input_ids.to(DEVICE)).last_hidden_state
        return states.half().cpu()

    chunk = min(CHUNK, size)
    batches = SceneBatches(chunk, seed=seed, concepts=World.trained)
    generator = torch.Generator().manual_seed(seed)
    latents, states = [], []
    for step in track(range(-(-size // chunk)), "encoding scenes"):
        batch = batches[step]
        posterior = vae.encode(batch.images).latent_dist
        latents.append((posterior.sample(generator) * vae.config.scaling_factor).half().cpu())
        states.append(states_of(batch.captions))
    return EncodedPool(
        torch.cat(latents)[:size].contiguous(),
        torch.cat(states)[:size].contiguous(),
        states_of([""])[0].contiguous(),
    )


def _fingerprint(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, size: int, seed: int
) -> dict[str, str]:
    sums = [
        f"{sum(value.double().sum().item() for value in model.state_dict().values()):.12e}"
        for model in (vae, text_encoder)
    ]
    return {"size": str(size), "seed": str(seed), "vae": sums[0], "text_encoder": sums[1]}
