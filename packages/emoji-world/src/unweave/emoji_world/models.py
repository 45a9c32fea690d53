"""Loads and stores the embedded models: half-precision safetensors in package data."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unweave.emoji_world.recogniser import Recogniser
from unweave.emoji_world.world import DATA

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPModel, CLIPTokenizer

MODELS_PATH = DATA / "models"


class ModelNotShippedError(FileNotFoundError):
    """This build of the package carries no weights for the model that was asked for."""


def pipeline_path() -> Path:
    """The folder of the embedded Stable-Diffusion-shaped pipeline.

    Raises:
        ModelNotShippedError: when this build carries no diffusion weights.
    """
    return _shipped("pipeline/model_index.json", "diffusion").parent


def load_pipeline(dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """The embedded text-to-image pipeline: 64x64 pixels, v-prediction, zero terminal SNR."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(
        pipeline_path(), torch_dtype=dtype, use_safetensors=True, local_files_only=True
    )


class ClipScorer:
    """Image and text features of the embedded CLIP, both of unit length."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Features `(n, 128)` of images `(n, 3, 64, 64)` in [0, 1]."""
        return _unit(self.model.get_image_features(pixel_values=images * 2 - 1))

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """Features `(n, 128)` of prompts."""
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        return _unit(self.model.get_text_features(input_ids=tokens.input_ids))


def load_clip() -> ClipScorer:
    """The contrastive model that scores images against texts."""
    from transformers import CLIPModel, CLIPTokenizer

    folder = _shipped("clip/config.json", "clip").parent
    model = CLIPModel.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    return ClipScorer(model, CLIPTokenizer.from_pretrained(folder, local_files_only=True))


@cache
def load_recogniser() -> Recogniser:
    """The judge of experiments; one shared instance in evaluation mode."""
    from safetensors.torch import load_file

    path = _shipped("recogniser/model.safetensors", "recogniser")
    settings = json.loads((path.parent / "config.json").read_text())
    model = Recogniser(tuple(settings["concepts"]), threshold=settings["threshold"])
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval().requires_grad_(False)


def save_recogniser(model: Recogniser, folder: Path) -> None:
    """Writes the recogniser's weights and its labels."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(_half(model.state_dict()), folder / "model.safetensors")
    settings = {"concepts": model.concepts, "threshold": model.threshold}
    (folder / "config.json").write_text(json.dumps(settings, indent=1))


def save_fp16(model: Any, folder: Path) -> None:
    """Writes a diffusers or transformers model in half precision."""
    import copy

    copy.deepcopy(model).half().save_pretrained(folder, safe_serialization=True)


def store_clip(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes the CLIP, and its text tower as the pipeline's text encoder.

    The tower's keys keep the `text_model.` prefix, which transformers 4 and 5 both read.
    """
    from safetensors.torch import save_file
    from transformers import CLIPTextModel

    save_fp16(model, folder / "clip")
    for place in (folder / "clip", folder / "pipeline/tokenizer"):
        save_tokenizer(tokenizer, place)
    encoder = folder / "pipeline/text_encoder"
    config = CLIPTextModel(model.config.text_config).config
    config.architectures = ["CLIPTextModel"]
    config.save_pretrained(encoder)
    tower = {k: v for k, v in model.state_dict().items() if k.startswith("text_model.")}
    save_file(_half(tower), encoder / "model.safetensors", metadata={"format": "pt"})


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes the tokenizer with the `vocab.json` and `merges.txt` that transformers 4 reads."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")


def _half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in tensors.items()
    }


def _unit(features: Any) -> Tensor:
    vectors: Tensor = getattr(features, "pooler_output", features)
    return torch.nn.functional.normalize(vectors, dim=-1)


def _shipped(file: str, model: str) -> Path:
    path = MODELS_PATH / file
    if not path.exists():
        raise ModelNotShippedError(
            f"this build of unweave-emoji-world carries no {model} weights; make them with "
            f"`python -m unweave.emoji_world.train {model}`"
        )
    return path
