"""Loading Stable Diffusion pipelines safely, generating reproducibly, and naming base models."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from unweave.diffusion_core.errors import NonFiniteError, PipelineError, PromptError
from unweave.diffusion_core.files import load_tensors
from unweave.diffusion_core.keys import base_parameters, canonical_text_encoder_key
from unweave.diffusion_core.originals import original_weights

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

MODELS: dict[str, str] = {
    "emoji-world": "64x64 emoji scenes in four styles; small enough to train and erase on a CPU"
}
"""Models that come with unweave, by name, with one sentence about each."""

HASHED_COMPONENTS = ("unet", "text_encoder")
"""The components whose weights make up `base_model_hash`."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
_PIPELINE_CLASS = "StableDiffusionPipeline"


def load_pipeline(
    name: str | Path = "emoji-world",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> StableDiffusionPipeline:
    """Load a Stable Diffusion 1.x or 2.x pipeline, without safety checker and without pickle.

    `name` is a key of `MODELS`, a diffusers folder, or a Hugging Face id "owner/model". Raises
    `PipelineError` when it is none of them, when the folder is damaged, when it has no
    safetensors weights, or when it asks for classes outside diffusers and transformers.
    """
    source = _locate(name)
    _check_index(_read_index(source), str(name))
    pipe = _from_pretrained(source, str(name))
    if isinstance(source, Path):
        _check_loaded_weights(source, pipe)
    try:
        pipe.to(torch.device(device), dtype)
    except (RuntimeError, AssertionError) as error:
        raise PipelineError(
            f'cannot move the pipeline to `device` {str(device)!r}: {error}; use "cpu" or a '
            "device that torch sees here"
        ) from error
    return pipe


def generate(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    num_inference_steps: int = 25,
    guidance_scale: float = 4.0,
    negative_prompt: str | None = None,
    batch_size: int = 16,
) -> Tensor:
    """Generate one image for each (prompt, seed); float32 (n, 3, H, W) in [0, 1] on the CPU.

    Every image starts from the noise of its own CPU generator, so that it depends on its own
    prompt and seed only, not on its neighbours or the device. Raises `PromptError` for a bad
    list of prompts or seeds and `NonFiniteError` when an image has NaN.
    """
    _check_requests(prompts, seeds, num_inference_steps, batch_size)
    batches = []
    for start in range(0, len(prompts), batch_size):
        chosen = list(prompts[start : start + batch_size])
        generators = [
            torch.Generator("cpu").manual_seed(int(seed))
            for seed in seeds[start : start + batch_size]
        ]
        images = pipe(
            chosen,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=None if negative_prompt is None else [negative_prompt] * len(chosen),
            generator=generators,
            output_type="pt",
        ).images
        batches.append(images.detach().to("cpu", torch.float32))
    result = torch.cat(batches)
    _check_finite(result, prompts, seeds)
    return result


def base_model_hash(pipe: StableDiffusionPipeline) -> str:
    """Return the SHA-256 over names, types, shapes and bytes of U-Net and text-encoder weights.

    The hash names the base model: it is the same whether weight deltas are applied or not, and
    whatever version of transformers loaded the model. Another dtype gives another hash.
    """
    return hash_weights({name: base_weights(pipe, name) for name in HASHED_COMPONENTS})


def base_weights(pipe: StableDiffusionPipeline, component: str) -> dict[str, Tensor]:
    """Return the weights of a component by canonical name as they are without any delta."""
    module = getattr(pipe, component)
    current = {name: weight.detach() for name, weight in base_parameters(component, module).items()}
    return {**current, **original_weights(module)}


def hash_weights(weights: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Return the SHA-256 of the weights of components, {component: {name: tensor}}."""
    digest = hashlib.sha256()
    for component in sorted(weights):
        for name, tensor in sorted(weights[component].items()):
            line = f"{component}/{name} {tensor.dtype} {tuple(tensor.shape)}\n"
            digest.update(line.encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _locate(name: str | Path) -> str | Path:
    text = str(name)
    if text in MODELS and not isinstance(name, Path):
        return _shipped_model()
    usable = bool(text) and "\0" not in text
    path = Path(text).expanduser()
    if usable and path.is_dir():
        return path
    if usable and path.is_file():
        raise PipelineError(
            f"{text!r} is a file; `name` must be a diffusers folder with a model_index.json. "
            f"Convert a single-file checkpoint with {_PIPELINE_CLASS}.from_single_file(...)"
            ".save_pretrained(folder)"
        )
    looks_like_path = isinstance(name, Path) or text.startswith((".", "~", "/", "\\"))
    if _HUB_ID.fullmatch(text) and not looks_like_path:
        return text
    close = difflib.get_close_matches(text, MODELS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise PipelineError(
        f"there is no model {text!r}: `name` must be one of {', '.join(MODELS)}, an existing "
        f'diffusers folder, or a Hugging Face id "owner/model"{hint}'
    )


def _shipped_model() -> Path:
    try:
        from unweave import emoji_world
    except ImportError as error:
        raise PipelineError(
            "the model 'emoji-world' is in a package of its own: pip install unweave-emoji-world"
        ) from error
    return Path(emoji_world.pipeline_path())


def _read_index(source: str | Path) -> dict[str, Any]:
    if isinstance(source, Path):
        path = source / "model_index.json"
        if not path.is_file():
            raise PipelineError(
                f"{str(source)!r} is no diffusers pipeline: it holds no model_index.json; give "
                "the folder that save_pretrained wrote"
            )
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise PipelineError(f"{str(path)!r} is damaged: {error}") from error
    else:
        from diffusers import DiffusionPipeline

        try:
            index = DiffusionPipeline.load_config(source)
        except Exception as error:
            raise PipelineError(
                f"cannot read the model {source!r} from the Hugging Face hub: {error}; check the "
                "name and the connection, or give a local folder"
            ) from error
    if not isinstance(index, dict):
        raise PipelineError(f"the model_index.json of {str(source)!r} is no JSON object")
    return index


def _check_index(index: Mapping[str, Any], name: str) -> None:
    """Refuse pipelines of other families and classes that would run code beside the model."""
    pipeline_class = index.get("_class_name")
    if pipeline_class != _PIPELINE_CLASS:
        raise PipelineError(
            f"{name!r} is a {pipeline_class!r}; unweave works on a {_PIPELINE_CLASS} (Stable "
            "Diffusion 1.x and 2.x)"
        )
    for component, entry in index.items():
        if component.startswith("_") or not isinstance(entry, list):
            continue
        if entry == [None, None]:
            continue
        if len(entry) != 2 or entry[0] not in _LIBRARIES or not isinstance(entry[1], str):
            raise PipelineError(
                f"{name!r} asks for the class {entry!r} as {component!r}, which is neither in "
                "diffusers nor in transformers; unweave never runs code that comes with a model"
            )
    missing = [part for part in ("unet", "vae", "text_encoder", "tokenizer") if part not in index]
    if missing:
        raise PipelineError(f"the model_index.json of {name!r} has no {missing[0]!r}")


def _from_pretrained(source: str | Path, name: str) -> StableDiffusionPipeline:
    from diffusers import StableDiffusionPipeline

    try:
        pipe: StableDiffusionPipeline = StableDiffusionPipeline.from_pretrained(
            source,
            use_safetensors=True,
            local_files_only=isinstance(source, Path),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except Exception as error:
        raise PipelineError(
            f"cannot load the pipeline {name!r}: {error}; every component needs whole "
            ".safetensors weights (pickled .bin files are never opened)"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_loaded_weights(folder: Path, pipe: StableDiffusionPipeline) -> None:
    """Put every saved text-encoder weight in place, and refuse files that lack weights.

    Across the renaming of transformers 5.6 its loader can leave weights random with no more than
    a warning.
    """
    path = folder / "text_encoder" / "model.safetensors"
    if path.is_file():
        saved = load_tensors(path)
        by_name = {canonical_text_encoder_key(name): tensor for name, tensor in saved.items()}
        for name, parameter in base_parameters("text_encoder", pipe.text_encoder).items():
            _require(name, by_name, path)
            with torch.no_grad():
                parameter.copy_(by_name[name])
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if path.is_file():
        with safe_open(path, "pt") as file:
            names = set(file.keys())
        for name in base_parameters("unet", pipe.unet):
            _require(name, names, path)


def _require(name: str, names: Container[str], path: Path) -> None:
    if name not in names:
        raise PipelineError(
            f"{str(path)!r} lacks the weight {name!r}; save or download the pipeline again"
        )


def _check_requests(
    prompts: Sequence[str], seeds: Sequence[int], num_inference_steps: int, batch_size: int
) -> None:
    if isinstance(prompts, str) or not prompts:
        raise PromptError(f"`prompts` must be a list of at least one prompt, got {prompts!r}")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise PromptError(f"every prompt must be text, got {prompt!r}")
    if len(seeds) != len(prompts):
        raise PromptError(
            f"`seeds` must hold one seed for each prompt: got {len(seeds)} seeds for "
            f"{len(prompts)} prompts"
        )
    for name, value in (("num_inference_steps", num_inference_steps), ("batch_size", batch_size)):
        if value < 1:
            raise PromptError(f"`{name}` must be at least 1, got {value}")


def _check_finite(images: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    broken = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        index = broken[0]
        raise NonFiniteError(
            f"the image of {prompts[index]!r} with seed {seeds[index]} has NaN or infinite "
            "values; load the pipeline with dtype=torch.float32"
        )
