"""Write one file of every kind that unweave writes, and the images that they should give."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unweave.diffusion_core import base_model_hash, load_pipeline, save_lora, save_tensors
from unweave.diffusion_core.errors import UnweaveError
from unweave.diffusion_core.testing import tiny_pipeline
from unweave.diffusion_core.tokens import add_tokens, save_token
from unweave.erasure import Erasure, ErasureRequest, make_eraser

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

PROMPT = "a cat face on a red background"
TOKEN = "<my-cat>"
TOKEN_PROMPT = f"a {TOKEN} on a red background"
QUICK = {
    "uce": {},
    "few-shot": {"epochs": 1, "num_images": 2, "num_inference_steps": 2, "lr": 1e-3},
    "esd": {"num_steps": 2, "num_inference_steps": 2, "lr": 1e-3},
}


def main(folder: Path) -> None:
    """Replace `folder` by artifacts of a random pipeline, and of emoji-world if it has weights."""
    shutil.rmtree(folder, ignore_errors=True)
    write_kinds(folder / "tiny", tiny_pipeline("v_prediction"))
    try:
        world = load_pipeline("emoji-world")
    except (UnweaveError, FileNotFoundError) as error:
        print(f"emoji-world is left out: {error}")
    else:
        write_world(folder / "emoji-world", world)
    print(f"wrote {sum(path.is_file() for path in folder.rglob('*'))} files")


def write_world(folder: Path, pipe: StableDiffusionPipeline) -> None:
    """Write what the shipped pipeline draws, with a copy of it."""
    from unweave.emoji_world import pipeline_path

    shutil.copytree(pipeline_path(), folder / "pipeline")
    save_tensors(folder / "expected.safetensors", {"pipeline": draw(pipe)})


def write_kinds(folder: Path, pipe: StableDiffusionPipeline) -> None:
    """Write every kind of artifact for `pipe` into a subfolder of its own."""
    save_pipeline(folder / "pipeline", pipe)
    expected = {"pipeline": draw(pipe)}
    for name, settings in QUICK.items():
        erasure = make_eraser(name, **settings).erase(
            pipe, ErasureRequest("cat face", preserve=("dog face",)), progress=False
        )
        erasure.save(folder / name)
        with erasure.apply(pipe):
            expected[name] = draw(pipe)
        _check(name, erasure, expected)
    expected |= _write_loras(folder, pipe)
    expected["token"] = _write_token(folder / "token", pipe)
    save_tensors(folder / "expected.safetensors", expected)


def save_pipeline(folder: Path, pipe: StableDiffusionPipeline) -> None:
    """Save `pipe`, its text encoder under the keys that every version of transformers reads."""
    from unweave.diffusion_core.keys import canonical_text_encoder_key

    pipe.save_pretrained(folder, safe_serialization=True)
    state = pipe.text_encoder.state_dict()
    tensors = {canonical_text_encoder_key(name): tensor for name, tensor in state.items()}
    save_tensors(folder / "text_encoder" / "model.safetensors", tensors, {"format": "pt"})
    _write_old_tokenizer(folder / "tokenizer")


def draw(pipe: StableDiffusionPipeline, prompt: str = PROMPT) -> Tensor:
    """Return the image (H, W, 3) in [0, 1] of a plain pipeline call."""
    call: Any = pipe
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    output = call(prompt, num_inference_steps=4, generator=generator, output_type="np")
    return torch.from_numpy(output.images[0])


def _write_old_tokenizer(folder: Path) -> None:
    """Write vocab.json and merges.txt, which transformers 4 reads, beside tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(merges), encoding="utf-8")


def _write_loras(folder: Path, pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    unet = _factors(pipe.unet, ("attn2.to_k", "attn2.to_v"), generator)
    text_encoder = _factors(pipe.text_encoder, ("mlp.fc1", "self_attn.q_proj"), generator)
    save_lora(folder / "lora", unet, text_encoder)
    save_lora(folder / "kohya", unet, text_encoder, key_style="kohya")
    before = base_model_hash(pipe)
    pipe.load_lora_weights(folder / "lora", use_safetensors=True)
    image = draw(pipe)
    pipe.unload_lora_weights()
    assert base_model_hash(pipe) == before
    return {"lora": image, "kohya": image}


def _factors(
    module: torch.nn.Module, endings: tuple[str, ...], generator: torch.Generator
) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (
            torch.randn(2, layer.in_features, generator=generator) / 4,
            torch.randn(layer.out_features, 2, generator=generator) / 4,
        )
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.endswith(endings)
    }


def _write_token(folder: Path, pipe: StableDiffusionPipeline) -> Tensor:
    (row,) = add_tokens(pipe, [TOKEN], initializer="cat")
    table = pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[row] += 0.05 * torch.randn(table.shape[1], generator=torch.Generator().manual_seed(0))
    folder.mkdir()
    save_token(folder, TOKEN, table[row].detach().clone())
    return draw(pipe, TOKEN_PROMPT)


def _check(name: str, erasure: Erasure, expected: dict[str, Tensor]) -> None:
    change = (expected[name] - expected["pipeline"]).abs().max().item()
    if change < 1e-3:
        raise SystemExit(f"{name} changes the image by {change} only: this would prove nothing")
    print(f"{name}: changes the image by up to {change:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
