"""Two subjects in one prompt: the plain pipeline beside A-STAR and T2I-Zero."""

# %% The pipeline, and a prompt whose subjects often merge.
from pathlib import Path

import torch
from PIL import Image

from unweave.attention_tools import AStar, AStarConfig, T2IZero
from unweave.emoji_world import load_pipeline, load_recogniser

OUT = Path("runs/example-compose")
OUT.mkdir(parents=True, exist_ok=True)
pipe = load_pipeline()
pipe.set_progress_bar_config(disable=True)
recogniser = load_recogniser()
words = ["cat face", "rocket"]
prompt = "a cat face and a rocket on a red background"

# %% Three ways over the same seeds.
ways = {
    "plain": lambda **options: pipe(prompt, **options),
    "A-STAR": lambda **options: AStar(pipe, AStarConfig(resolution=8))(prompt, words, **options),
    "T2I-Zero": lambda **options: T2IZero(pipe)(prompt, words, **options),
}
sheet = Image.new("RGB", (4 * 68, 3 * 68), "white")
for row, (name, way) in enumerate(ways.items()):
    both = 0
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        image = way(generator=generator, num_inference_steps=20, guidance_scale=4.0).images[0]
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = pixels.reshape(1, 64, 64, 3).permute(0, 3, 1, 2) / 255
        seen = recogniser.detect(pixels)[0]
        both += all(bool(seen[recogniser.concepts.index(word)]) for word in words)
        sheet.paste(image, (seed * 68, row * 68))
    print(f"{name}: both recognised in {both} of 4")

# %% Look.
sheet.save(OUT / "grid.png")
print(OUT / "grid.png")
