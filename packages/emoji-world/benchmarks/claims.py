"""What unweave-emoji-world says about its scenes and models, measured."""

from __future__ import annotations

import time
from functools import cache

import numpy as np
import torch
from torch import Tensor

from claims_runner import Claim, Measure
from unweave.emoji_world import World, load_pipeline, load_recogniser
from unweave.emoji_world.models import MODELS_PATH
from unweave.emoji_world.scenes import SceneDataset
from unweave.emoji_world.train.recogniser import noise_images

SOURCE = "unweave, emoji-world"
STEPS, GUIDANCE = 25, 4.0
SAMPLER = f"DDIM, {STEPS} steps, guidance {GUIDANCE:g}"


def share_claim(name: str, text: str, setting: str, at_least: float, hits: Tensor) -> Claim:
    """A claim that at least `at_least` percent of `hits`, bool `(n,)`, are true."""
    return Claim.share(
        name,
        text,
        SOURCE,
        setting,
        hits=int(hits.sum()),
        total=hits.numel(),
        at_least=at_least,
        note="with the weights of the CPU recipe",
    )


def recogniser_concepts(seed: int, quick: bool) -> Claim:
    """Each drawn object is detected."""
    found, truth, _, _ = fresh_scenes(seed, quick)
    return share_claim(
        "recogniser-concepts",
        "The recogniser finds an object of a scene of one or two",
        f"fresh scenes, {len(World.concepts)} concepts",
        97,
        found[truth],
    )


def recogniser_exact(seed: int, quick: bool) -> Claim:
    """The set of detected concepts is exactly the set of drawn ones."""
    found, truth, _, _ = fresh_scenes(seed, quick)
    return share_claim(
        "recogniser-exact",
        "The recogniser names all objects of a scene of one or two, and nothing else",
        f"fresh scenes, {len(World.concepts)} concepts",
        97,
        (found == truth).all(1),
    )


def recogniser_styles(seed: int, quick: bool) -> Claim:
    """The likeliest style is the drawn one."""
    _, _, found, truth = fresh_scenes(seed, quick)
    return share_claim(
        "recogniser-styles",
        "The recogniser names the style of a scene",
        "fresh scenes, 4 styles",
        97,
        found == truth,
    )


def recogniser_noise(seed: int, quick: bool) -> Claim:
    """No concept is detected in noise of any grain."""
    generator = torch.Generator().manual_seed(seed + 10_000)
    images = torch.cat([noise_images(4, generator) for _ in range(10 if quick else 100)])
    return share_claim(
        "recogniser-noise",
        "The recogniser sees nothing in noise, from single pixels to large blobs",
        "uniform noise of random grain",
        97,
        ~load_recogniser().detect(images).any(1),
    )


def generated_concept(seed: int, quick: bool) -> Claim:
    """The prompted concept is detected."""
    right, _, _ = generated_singles(seed, quick)
    return share_claim(
        "generated-concept",
        "The pipeline draws the object of the prompt",
        SAMPLER,
        85,
        right,
    )


def generated_style(seed: int, quick: bool) -> Claim:
    """The prompted style is the likeliest."""
    _, right, _ = generated_singles(seed, quick)
    return share_claim(
        "generated-style",
        "The pipeline draws in the style of the prompt",
        SAMPLER,
        80,
        right,
    )


def generated_background(seed: int, quick: bool) -> Claim:
    """The prompted background is the likeliest."""
    _, _, right = generated_singles(seed, quick)
    return share_claim(
        "generated-background",
        "The pipeline paints the background of the prompt",
        SAMPLER,
        90,
        right,
    )


def generated_pairs(seed: int, quick: bool) -> Claim:
    """Both prompted concepts are detected."""
    rng = np.random.default_rng(seed + 2)
    pairs = [
        rng.choice(len(World.trained), size=2, replace=False) for _ in range(8 if quick else 400)
    ]
    names = [(World.trained[a], World.trained[b]) for a, b in pairs]
    images = draw([f"{World.phrase(a)} and {World.phrase(b)}" for a, b in names], seed)
    detected = load_recogniser().detect(images)
    columns = torch.tensor([[World.concepts.index(name) for name in pair] for pair in names])
    return share_claim(
        "generated-pairs",
        "The pipeline draws both objects of the prompt",
        SAMPLER,
        50,
        detected.gather(1, columns).all(1),
    )


def scene_speed(seed: int, quick: bool) -> Claim:
    """Seconds for ten thousand scenes, drawings already rasterised once."""
    count = 200 if quick else 10_000
    dataset = SceneDataset(count, seed=seed)
    for index in range(0 if quick else 500):
        dataset.scene(index)
    start = time.perf_counter()
    for index in range(count):
        dataset.scene(index)
    seconds = (time.perf_counter() - start) * 10_000 / count
    return Claim.at_most(
        "scene-speed",
        "Ten thousand scenes of 64x64 pixels are composed in under 30 s",
        SOURCE,
        "one process, after 500 scenes",
        value=seconds,
        limit=30,
        unit="s",
        note="the machine was busy or slower than two common cores",
    )


def weights_size(seed: int, quick: bool) -> Claim:
    """Megabytes of all weights in the package."""
    megabytes = sum(path.stat().st_size for path in MODELS_PATH.rglob("*.safetensors")) / 1e6
    return Claim.at_most(
        "weights-size",
        "All embedded weights together are small",
        SOURCE,
        "half-precision safetensors in package data",
        value=megabytes,
        limit=48,
        unit="MB",
        note="the models outgrew the package",
    )


@cache
def fresh_scenes(seed: int, quick: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Found and true concepts, bool `(n, concepts)`, and styles, long `(n,)`."""
    dataset = SceneDataset(40 if quick else 2_000, seed=seed + 20_000)
    scenes = [dataset.scene(index) for index in range(len(dataset))]
    images = torch.stack([torch.from_numpy(s.image.copy()).permute(2, 0, 1) for s in scenes]) / 255
    truth = torch.zeros(len(scenes), len(World.concepts), dtype=torch.bool)
    for row, scene in enumerate(scenes):
        for item in scene.spec.objects:
            truth[row, World.concepts.index(item.concept)] = True
    styles = torch.tensor([World.styles.index(s.spec.objects[0].style) for s in scenes])
    recogniser = load_recogniser()
    found_styles = torch.cat([recogniser.styles(part) for part in images.split(128)])
    return recogniser.detect(images), truth, found_styles, styles


@cache
def generated_singles(seed: int, quick: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Whether concept, style and background of generated images are right, each bool `(n,)`."""
    rng = np.random.default_rng(seed + 1)
    count = 8 if quick else 480
    concepts = [World.trained[index % len(World.trained)] for index in range(count)]
    styles = rng.choice(World.styles, count)
    grounds = rng.choice(World.backgrounds, count)
    images = draw(
        [
            f"{World.phrase(concept)} on a {ground} background, {style} style"
            for concept, style, ground in zip(concepts, styles, grounds, strict=True)
        ],
        seed,
    )
    recogniser = load_recogniser()
    columns = torch.tensor([World.concepts.index(concept) for concept in concepts])
    wanted_styles = torch.tensor([World.styles.index(style) for style in styles])
    wanted_grounds = torch.tensor([World.backgrounds.index(ground) for ground in grounds])
    return (
        recogniser.detect(images)[torch.arange(count), columns],
        torch.cat([recogniser.styles(part) for part in images.split(128)]) == wanted_styles,
        torch.cat([recogniser.backgrounds(part) for part in images.split(128)]) == wanted_grounds,
    )


def draw(prompts: list[str], seed: int, batch_size: int = 20) -> Tensor:
    """One image `(3, 64, 64)` in [0, 1] a prompt, each with its own seed."""
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    images = []
    for first in range(0, len(prompts), batch_size):
        part = prompts[first : first + batch_size]
        seeds = range(seed + first, seed + first + len(part))
        images.append(
            pipe(
                part,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=[torch.Generator().manual_seed(number) for number in seeds],
                output_type="pt",
            ).images
        )
    return torch.cat(images)


CLAIMS: dict[str, Measure] = {
    "recogniser-concepts": recogniser_concepts,
    "recogniser-exact": recogniser_exact,
    "recogniser-styles": recogniser_styles,
    "recogniser-noise": recogniser_noise,
    "generated-concept": generated_concept,
    "generated-style": generated_style,
    "generated-background": generated_background,
    "generated-pairs": generated_pairs,
    "scene-speed": scene_speed,
    "weights-size": weights_size,
}
