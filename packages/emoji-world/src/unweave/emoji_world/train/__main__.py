"""`python -m unweave.emoji_world.train MODEL --recipe {cpu,gpu}`.

MODEL is `vae`, `decoder`, `clip`, `recogniser` or `diffusion`.
"""

from __future__ import annotations

import argparse
import datetime
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from unweave.emoji_world.models import MODELS_PATH, save_fp16, save_recogniser, store_clip
from unweave.emoji_world.train import clip, diffusion, recogniser, vae

RECIPES = {
    "vae": vae.RECIPES,
    "decoder": vae.DECODER_RECIPES,
    "clip": clip.RECIPES,
    "recogniser": recogniser.RECIPES,
    "diffusion": diffusion.RECIPES,
}


def main() -> None:
    """Trains one model and writes it to `--out`; run again to continue after a stop."""
    parser = argparse.ArgumentParser(prog="python -m unweave.emoji_world.train")
    parser.add_argument("model", choices=RECIPES)
    parser.add_argument("--recipe", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--out", type=Path, default=MODELS_PATH, help="models folder to write")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/unweave/emoji-world")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--warm-start", action="store_true", help="diffusion: begin with the weights in --out"
    )
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.warm_start and options.model != "diffusion":
        parser.error(f"--warm-start is for diffusion, not for {options.model}")
    torch.set_num_threads(options.threads)
    recipe = RECIPES[options.model][options.recipe]
    recipe = replace(recipe, steps=options.steps or recipe.steps, seed=options.seed)
    work = options.work / options.recipe
    pipeline = options.out / "pipeline"
    if options.model == "vae":
        save_fp16(vae.train_vae(recipe, work), pipeline / "vae")
    elif options.model == "decoder":
        save_fp16(vae.train_decoder(recipe, work, pipeline / "vae"), pipeline / "vae")
    elif options.model == "clip":
        store_clip(*clip.train_clip(recipe, work), options.out)
    elif options.model == "recogniser":
        save_recogniser(recogniser.train_recogniser(recipe, work), options.out / "recogniser")
    else:
        pool_size = diffusion.POOL_SIZES[options.recipe]
        diffusion.train_diffusion(recipe, pool_size, work, pipeline, options.warm_start)
    _record(options.out / "training.json", options.model, work, options.warm_start)


def _record(path: Path, model: str, work: Path, warm_start: bool) -> None:
    """Notes beside the weights by which recipe they were made and what its loss was at the end."""
    with safe_open(work / model / "state.safetensors", "pt") as file:
        header = file.metadata()
    records = json.loads(path.read_text()) if path.exists() else {}
    records[model] = {
        "recipe": json.loads(header["recipe"]),
        "mean_loss_at_the_end": round(float(header["loss"]), 5),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "started_from": records.get(model) if warm_start else None,
    }
    path.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
