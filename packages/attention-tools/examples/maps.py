"""Where does each word look? Maps, masks and overlays of a generated image."""

# %% The pipeline: any diffusers pipeline will do, this one needs no download.
from pathlib import Path

import torch

from unweave.attention_tools import capture_attention, find_tokens
from unweave.emoji_world import load_pipeline

OUT = Path("runs/example-maps")
OUT.mkdir(parents=True, exist_ok=True)
pipe = load_pipeline()
prompt = "a panda and a star on a purple background"

# %% Record the maps of two words while the pipeline runs.
tokens = find_tokens(pipe, prompt, ["panda", "star"])
with capture_attention(pipe, tokens=tokens) as maps:
    image = pipe(
        prompt,
        num_inference_steps=25,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3),
    ).images[0]

# %% The average of the layers on the way up finds objects best; Otsu's threshold cuts them out.
found = maps.select(layer="up_blocks")
print("maps", tuple(found.aggregate(resolution=64).shape), "of layers", found.layers)
print("covered", found.to_mask(resolution=64).float().mean((2, 3)).tolist())
found.grid(image).save(OUT / "maps.png")
maps.grid(image, by="layer").save(OUT / "layers.png")
print(OUT / "maps.png", OUT / "layers.png")
