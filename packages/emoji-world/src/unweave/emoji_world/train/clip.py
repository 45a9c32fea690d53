"""Trains the contrastive CLIP whose frozen text tower later conditions the diffusion model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from unweave.emoji_world.tokenizer import MAX_TOKENS, build_tokenizer
from unweave.emoji_world.train.batches import DEVICE, SceneBatches
from unweave.emoji_world.train.loop import Recipe, train

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

RECIPES = {
    "cpu": Recipe(steps=1_600, batch_size=96, learning_rate=1e-3),
    "gpu": Recipe(steps=20_000, batch_size=512, learning_rate=1e-3, ema=0.999),
}
WIDTH = 128


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The untrained model; text states are `(n, 32, 128)`."""
    from transformers import CLIPConfig, CLIPModel

    towers = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4}
    text = towers | {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": WIDTH,
    }
    vision = towers | {
        "image_size": 64,
        "patch_size": 8,
        "num_hidden_layers": 4,
        "projection_dim": WIDTH,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def train_clip(recipe: Recipe, work: Path) -> tuple[CLIPModel, CLIPTokenizer]:
    """Symmetric cross-entropy in which scenes with one caption are positives of each other."""
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer()
    model = build_clip(tokenizer)
    batches = SceneBatches(recipe.batch_size, seed=recipe.seed, texture_rate=0.1)

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        batch = batches[step]
        tokens = tokenizer(
            batch.captions, padding="max_length", truncation=True, return_tensors="pt"
        )
        ids = tokens.input_ids.to(DEVICE)
        logits = model(input_ids=ids, pixel_values=batch.images).logits_per_image
        same = (
            torch.tensor([[a == b for b in batch.captions] for a in batch.captions])
            .float()
            .to(DEVICE)
        )
        targets = same / same.sum(1, keepdim=True)
        return (
            functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)
        ) / 2

    train(model, loss_at, recipe, work / "clip")
    return model, tokenizer
