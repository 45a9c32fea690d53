"""One image that reads as two concepts, upright and turned."""

# %% The pipeline.
from pathlib import Path

import torch

from unweave.attention_tools import AnagramMTL, CLIPScorer
from unweave.emoji_world import load_clip, load_pipeline

OUT = Path("runs/example-anagram")
OUT.mkdir(parents=True, exist_ok=True)
pipe = load_pipeline()

# %% The scorer says which view is behind; this CLIP's images are standardised by a half.
clip, middle = load_clip(), (0.5, 0.5, 0.5)
scorer = CLIPScorer(clip.model, clip.tokenizer, mean=middle, std=middle)
maker = AnagramMTL(pipe, scorer=scorer)
made = maker(
    ["a turtle on a red background", "a cactus on a red background"],
    ["identity", "rotate_cw"],
    concepts=["turtle", "cactus"],
    generator=torch.Generator().manual_seed(0),
    num_inference_steps=20,
    guidance_scale=6.0,
)

# %% Both views side by side, and what balanced them.
made.strip().save(OUT / "views.png")
print("weights of the views", [step["alpha"][0] for step in made.record["steps"]][:5])
print("overlap loss by step", [step["L"] for step in made.record["steps"]][:5])
print(OUT / "views.png")
