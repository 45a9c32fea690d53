"""Draws each trained concept once with the embedded pipeline: `sample_sheet.py OUT.png`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from unweave.emoji_world import World, load_pipeline

COLUMNS, SCALE = 8, 2


def main(path: Path, seed: int = 0) -> None:
    """Writes the sheet, one concept a cell, with styles and backgrounds in turn."""
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    styles, grounds = World.styles, World.backgrounds
    prompts = [
        f"{World.phrase(concept)} on a {grounds[(3 * index) % len(grounds)]} background, "
        f"{styles[index % len(styles)]} style"
        for index, concept in enumerate(World.trained)
    ]
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    images = pipe(
        prompts,
        num_inference_steps=25,
        guidance_scale=4.0,
        generator=generators,
        output_type="np",
    ).images
    pixels = (images * 255).round().astype(np.uint8)
    rows = [np.hstack(pixels[i : i + COLUMNS]) for i in range(0, len(pixels), COLUMNS)]
    sheet = Image.fromarray(np.vstack(rows))
    sheet.resize((sheet.width * SCALE, sheet.height * SCALE), Image.Resampling.NEAREST).save(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
