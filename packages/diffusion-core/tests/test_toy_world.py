"""Claims about the toy world: what it draws can be computed, and a trained toy is kept."""

from __future__ import annotations

from pathlib import Path

import torch

from unweave.diffusion_core.latents import encode_images
from unweave.diffusion_core.pipelines import generate
from unweave.diffusion_core.toy_world import (
    SYNONYMS,
    TEMPLATES,
    ToyRecipe,
    ToyWorld,
    all_prompts,
    glyphs,
    word_tokenizer,
)

QUICK = ToyRecipe(steps=2, batch_size=4)


def test_glyphs_are_orthogonal_and_leave_the_mean_colour() -> None:
    patterns = glyphs().flatten(1)
    torch.testing.assert_close(patterns @ patterns.T, 16 * torch.eye(len(SYNONYMS)))
    assert not patterns.sum(1).any()


def test_real_images_show_their_concept_and_noise_shows_none(tmp_path: Path) -> None:
    world = ToyWorld.load(tmp_path, QUICK)
    generator = torch.Generator().manual_seed(0)
    images = world.images(world.concepts * 4, ("red", "gray") * 16, generator)
    assert world.classify(images).tolist() == [*range(8)] * 4
    noise = 0.5 + 0.1 * torch.randn(100, 3, 8, 8, generator=generator)
    assert (world.classify(noise) == -1).all()


def test_every_word_is_one_token() -> None:
    tokenizer = word_tokenizer()
    for prompt, _, _ in all_prompts():
        assert len(tokenizer(prompt).input_ids) == len(prompt.split()) + 2
    assert len(all_prompts()) == 8 * 3 * len(TEMPLATES) * 4 * 2


def test_latents_are_scaled_images_and_come_back(tmp_path: Path) -> None:
    world = ToyWorld.load(tmp_path, QUICK)
    images = world.images(["cat"], ["blue"], torch.Generator().manual_seed(0)) * 2 - 1
    latents = encode_images(world.trained.vae, images, None)
    torch.testing.assert_close(latents, 2 * images)
    assert generate(world.pipeline(), ["a cat"], seeds=[0]).shape == (1, 3, 8, 8)


def test_a_trained_toy_is_loaded_and_copies_are_independent(tmp_path: Path) -> None:
    first, again = ToyWorld.load(tmp_path, QUICK), ToyWorld.load(tmp_path, QUICK)
    (file,) = tmp_path.glob("*.safetensors")
    weight, other = first.trained.unet.conv_in.weight, again.trained.unet.conv_in.weight
    assert file.stat().st_size and torch.equal(weight, other)
    pipe = first.pipeline()
    torch.nn.init.zeros_(pipe.unet.conv_in.weight)
    assert torch.equal(weight, other)
