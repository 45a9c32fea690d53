"""Draws with a saved erasure as someone without unweave would: `BASE ERASURE OUT PROMPT`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTextModel

SEEDS, STEPS, GUIDANCE = range(4), 25, 4.0


def main(base: str, erasure: str, out: str, prompt: str) -> None:
    """Writes images `(4, 3, H, W)` of seeds 0 to 3 to the safetensors file `out`."""
    text_encoder = Path(erasure) / "text_encoder"
    parts = {}
    if text_encoder.is_dir():
        parts["text_encoder"] = CLIPTextModel.from_pretrained(text_encoder)
    pipe = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32, **parts)
    if not parts:
        pipe.load_lora_weights(erasure, weight_name="pytorch_lora_weights.safetensors")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        [prompt] * len(SEEDS),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="pt",
    ).images
    if [name for name in sys.modules if name.split(".")[0] == "unweave"]:
        raise SystemExit("this must run without any unweave package")
    save_file({"images": images.contiguous()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
