"""One image that reads as two concepts, upright and on its head."""

# %% The pipeline.
from pathlib import Path

import torch

from unweave.attention_tools import AnagramConfig, AnagramMTL
from unweave.emoji_world import load_pipeline

OUT = Path("runs/example-anagram")
OUT.mkdir(parents=True, exist_ok=True)
pipe = load_pipeline()

# %% Balancing needs a scorer of noisy images, which this example leaves out.
maker = AnagramMTL(pipe, AnagramConfig(balancing=False))
made = maker(
    ["a pizza on a red background", "a star on a red background"],
    ["identity", "flip"],
    concepts=["pizza", "star"],
    generator=torch.Generator().manual_seed(0),
    num_inference_steps=25,
    guidance_scale=6.0,
)

# %% Both views side by side, and what balanced them.
made.strip().save(OUT / "views.png")
print("overlap loss by step", [step["L"] for step in made.record["steps"]][:5])
print(OUT / "views.png")
