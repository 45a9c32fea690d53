"""A cat becomes a dog: prompt-to-prompt, with the edit free and kept to the animal's place."""

# %% The pipeline, and a target that also asks for another background.
from pathlib import Path

import torch
from PIL import Image

from unweave.attention_tools import LocalBlend, PromptToPrompt, PromptToPromptConfig
from unweave.emoji_world import load_pipeline

OUT = Path("runs/example-edit")
OUT.mkdir(parents=True, exist_ok=True)
pipe = load_pipeline()
pipe.set_progress_bar_config(disable=True)
draw = PromptToPrompt(pipe, PromptToPromptConfig(cross_steps=0.3))
source, target = "a cat face on a red background", "a dog face on a blue background"

# %% Maps of this small model are flat: a higher threshold than the paper's 0.3 finds the animal.
blends = [None, LocalBlend(["cat face"], ["dog face"], threshold=0.75, resolution=16)]
sheet = Image.new("RGB", (4 * 68, 3 * 68), "white")
for row, blend in enumerate(blends, 1):
    images = draw(
        source,
        target,
        blend=blend,
        generator=[torch.Generator().manual_seed(seed) for seed in range(4)],
        num_inference_steps=20,
        guidance_scale=4.0,
    ).images
    for column in range(4):
        sheet.paste(images[column], (column * 68, 0))
        sheet.paste(images[4 + column], (column * 68, row * 68))

# %% Above the source, then the free edit, then the one that leaves the background.
sheet.save(OUT / "grid.png")
print(OUT / "grid.png")
