"""Trains the recogniser on composed scenes that are blurred, noised, tinted and cropped."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from unweave.emoji_world.recogniser import Recogniser, Recognition
from unweave.emoji_world.scenes import Scene
from unweave.emoji_world.train.batches import DEVICE, SceneBatches
from unweave.emoji_world.train.loop import Recipe, train
from unweave.emoji_world.world import World

RECIPES = {
    "cpu": Recipe(steps=3_500, batch_size=32, learning_rate=2e-3),
    "gpu": Recipe(steps=20_000, batch_size=256, learning_rate=2e-3, ema=0.999),
}
COUNTS = (0.06, 0.6, 0.34)
JUNK_RATE = 0.05


def train_recogniser(recipe: Recipe, work: Path) -> Recogniser:
    """Multi-label concepts, style and background; junk images teach it to say nothing."""
    torch.manual_seed(recipe.seed)
    model = Recogniser(World.concepts)
    batches = SceneBatches(recipe.batch_size, seed=recipe.seed, counts=COUNTS, texture_rate=0.1)

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        batch = batches[step]
        concepts, styles, backgrounds = labels(batch.scenes)
        images = augment((batch.images.cpu() + 1) / 2, generator)
        junk = torch.rand(images.shape[0], generator=generator) < JUNK_RATE
        images[junk] = noise_images(int(junk.sum()), generator)
        concepts = concepts * ~junk[:, None]
        output = Recognition(*(part.cpu() for part in model(images.to(DEVICE))))
        ignored = torch.full_like(styles, -1)
        styles = torch.where(concepts.any(1), styles, ignored)
        backgrounds = torch.where(junk, ignored, backgrounds)
        return (
            20 * functional.binary_cross_entropy_with_logits(output.concepts, concepts)
            + functional.cross_entropy(output.styles, styles, ignore_index=-1)
            + functional.cross_entropy(output.backgrounds, backgrounds, ignore_index=-1)
        )

    train(model, loss_at, recipe, work / "recogniser")
    model.threshold = calibrated_threshold(model, seed=recipe.seed + 1)
    return model


def calibrated_threshold(model: Recogniser, *, seed: int, count: int = 1_000) -> float:
    """The probability above which detections on `count` fresh, augmented scenes have the best F1.

    The middle one where several are equally good.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = SceneBatches(count, seed=seed, counts=COUNTS, texture_rate=0.1)[0]
    truth = labels(batch.scenes)[0].bool()
    probabilities = model.probabilities(augment((batch.images.cpu() + 1) / 2, generator))
    grid = torch.arange(0.05, 0.96, 0.01)
    detected = probabilities > grid[:, None, None]
    hits = (detected & truth).sum((1, 2)).double()
    scores = 2 * hits / (detected.sum((1, 2)) + truth.sum())
    best = (scores == scores.max()).nonzero().flatten()
    return round(float(grid[best[len(best) // 2]]), 2)


def labels(scenes: list[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """Targets: float `(n, concepts)`, long `(n,)` style (0 without objects), long `(n,)` ground."""
    concepts = torch.zeros(len(scenes), len(World.concepts))
    styles = torch.zeros(len(scenes), dtype=torch.long)
    backgrounds = torch.zeros(len(scenes), dtype=torch.long)
    for row, scene in enumerate(scenes):
        backgrounds[row] = World.backgrounds.index(scene.spec.background)
        for item in scene.spec.objects:
            concepts[row, World.concepts.index(item.concept)] = 1
            styles[row] = World.styles.index(item.style)
    return concepts, styles, backgrounds


def noise_images(count: int, generator: torch.Generator) -> Tensor:
    """Noise `(count, 3, 64, 64)` of one random grain, from single pixels to large blobs."""
    cells = 2 ** int(torch.randint(1, 7, (), generator=generator))
    noise = torch.rand(count, 3, cells, cells, generator=generator)
    return functional.interpolate(noise, 64, mode="bilinear")


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random blur, shift, tint and noise, one draw of each for the whole batch's halves."""
    shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
    images = functional.pad(images, (4, 4, 4, 4), mode="replicate")
    images = images[..., 4 + shift[0] : 68 + shift[0], 4 + shift[1] : 68 + shift[1]]
    blurred = functional.avg_pool2d(functional.pad(images, (1,) * 4, mode="replicate"), 3, 1)
    mix = torch.rand(len(images), 1, 1, 1, generator=generator)
    images = torch.lerp(images, blurred, mix)
    tint = 1 + 0.08 * torch.randn(len(images), 3, 1, 1, generator=generator)
    level = 0.06 * torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    return (images * tint + level * noise).clamp(0, 1)
