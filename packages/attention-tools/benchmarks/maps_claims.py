"""How well attention maps find what their words name, measured on scenes with exact masks."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from claims_runner import Claim, Measure
from unweave.attention_tools import AttentionMaps, capture_attention, find_tokens, iou, to_mask
from unweave.emoji_world import Scene, World, compose, load_pipeline, random_spec

SCENES = 200
TIMESTEPS = (100, 300, 500, 700)
LAYERS = "up_blocks"
"""Which maps are averaged; chosen on the scenes of `CHOSEN_ON`, which no claim uses."""

CHOSEN_ON = 0
LAST = "up_blocks.2.attentions.1.transformer_blocks.0.attn2"


def pointing(seed: int, quick: bool) -> Claim:
    """The highest position of a word's map lies on its object."""
    found = measured(seed, quick)
    return Claim.share(
        "maps-pointing",
        "The map of a word is highest on the object that it names",
        "pointing game",
        f"noised scenes of one or two objects, mean over {LAYERS} and {len(TIMESTEPS)} timesteps; "
        f"by chance {found['chance']:.0f} %, the last layer alone {found['last hits']:.0f} %",
        hits=int(found["hits"]),
        total=int(found["words"]),
        at_least=85,
        note="with the weights of the CPU recipe",
    )


def intersection(seed: int, quick: bool) -> Claim:
    """How well the map, cut by Otsu's threshold, covers the object."""
    found = measured(seed, quick)
    return Claim(
        id="maps-iou",
        text="Otsu's threshold of the map outlines the object better than that of noise does",
        source="mean intersection over union with the exact mask",
        setting=f"the same scenes; noise {found['noise iou']:.2f}, the last layer alone "
        f"{found['last iou']:.2f}",
        aim="above noise",
        measured=f"{found['iou']:.2f}",
        interval=None,
        holds=found["iou"] > found["noise iou"],
        note="" if found["iou"] > found["noise iou"] else "maps of 16 x 16 positions at most",
    )


@cache
def measured(seed: int, quick: bool) -> dict[str, float]:
    """Hits and overlaps over all words of all scenes."""
    rng = np.random.default_rng(seed + CHOSEN_ON + 1)
    hits, overlaps, last_hits, last_overlaps, areas = [], [], [], [], []
    noise_overlaps: list[float] = []
    for index in range(8 if quick else SCENES):
        scene = compose(random_spec(rng, concepts=World.trained, counts=(0, 0.5, 0.5)))
        maps = maps_of_scene(scene, index)
        masks = torch.from_numpy(scene.masks)
        areas += masks.float().mean((1, 2)).tolist()
        for chosen, hit, overlap in (
            (maps.select(layer=LAYERS), hits, overlaps),
            (maps.select(layer=LAST), last_hits, last_overlaps),
        ):
            own = chosen.aggregate(masks.shape[-1])[0]
            hit += [
                bool(mask.flatten()[one.argmax()]) for one, mask in zip(own, masks, strict=True)
            ]
            overlap += iou(to_mask(own), masks).tolist()
        noise = torch.rand(1, len(masks), 16, 16, generator=torch.Generator().manual_seed(index))
        noise = interpolate(noise, masks.shape[-2:], mode="bilinear")[0]
        noise_overlaps += iou(to_mask(noise), masks).tolist()
    return {
        "hits": sum(hits),
        "words": len(hits),
        "iou": float(np.mean(overlaps)),
        "noise iou": float(np.mean(noise_overlaps)),
        "last hits": 100 * float(np.mean(last_hits)),
        "last iou": float(np.mean(last_overlaps)),
        "chance": 100 * float(np.mean(areas)),
    }


@torch.no_grad()
def maps_of_scene(scene: Scene, seed: int) -> AttentionMaps:
    """Maps of the words for the objects of `scene`, averaged over noised versions of its image."""
    pipe = load_pipeline_once()
    pixels = torch.from_numpy(scene.image.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    latents: Tensor = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    embeds = pipe.encode_prompt(scene.caption, "cpu", 1, False)[0]
    words = [item.concept for item in scene.spec.objects]
    tokens = find_tokens(pipe, scene.caption, words)
    with capture_attention(pipe.unet, tokens=tokens) as maps:
        for timestep in TIMESTEPS:
            noisy = pipe.scheduler.add_noise(latents, noise, torch.tensor([timestep]))
            pipe.unet(noisy, timestep, embeds)
    return maps


load_pipeline_once = cache(load_pipeline)

CLAIMS: dict[str, Measure] = {"maps-pointing": pointing, "maps-iou": intersection}
