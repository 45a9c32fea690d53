"""Loading Stable Diffusion pipelines safely, generating reproducibly, and naming base models."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor, nn

from unweave.diffusion_core.errors import NonFiniteError, PipelineError, PromptError
from unweave.diffusion_core.files import load_tensors
from unweave.diffusion_core.keys import TEXT_ENCODERS, base_parameters, canonical_key
from unweave.diffusion_core.originals import original_weights

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

Pipeline: TypeAlias = "StableDiffusionPipeline | StableDiffusionXLPipeline"
"""The pipelines that unweave works on: Stable Diffusion 1.x and 2.x, and XL."""

MODELS: dict[str, str] = {
    "emoji-world": "64x64 emoji scenes in four styles; small enough to train and erase on a CPU"
}
"""Models that come with unweave, by name, with one sentence about each."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
_SD_PARTS = ("unet", "vae", "text_encoder", "tokenizer")
_PARTS = {
    "StableDiffusionPipeline": _SD_PARTS,
    "StableDiffusionXLPipeline": (*_SD_PARTS, "text_encoder_2", "tokenizer_2"),
}
_NO_SAFETY_CHECKER = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}


def load_pipeline(
    name: str | Path = "emoji-world",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Pipeline:
    """Load a Stable Diffusion 1.x, 2.x or XL pipeline, without safety checker and without pickle.

    `name` is a key of `MODELS`, a diffusers folder, or a Hugging Face id "owner/model". Raises
    `PipelineError` when it is none of them, when the folder is damaged, when it has no
    safetensors weights, when it asks for classes outside diffusers and transformers, or when it is
    the refiner of XL, which lacks the first text encoder.
    """
    source = _locate(name)
    pipeline_class = _checked_class(_read_index(source), str(name))
    pipe = _from_pretrained(source, str(name), pipeline_class)
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
    pipe: Pipeline,
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


def base_model_hash(pipe: Pipeline) -> str:
    """Return the SHA-256 over names, types, shapes and bytes of U-Net and text-encoder weights.

    The hash names the base model: it is the same whether weight deltas are applied or not, and
    whatever version of transformers loaded the model. Another dtype gives another hash.
    """
    return hash_weights({name: base_weights(pipe, name) for name in hashed_components(pipe)})


def hashed_components(pipe: Pipeline) -> tuple[str, ...]:
    """Return the components whose weights make up `base_model_hash`."""
    return ("unet", *text_encoders(pipe))


def text_encoders(pipe: Pipeline) -> dict[str, nn.Module]:
    """Return the text encoders of `pipe` by component name: one, or two for XL."""
    found = {name: getattr(pipe, name, None) for name in TEXT_ENCODERS}
    return {name: module for name, module in found.items() if module is not None}


def base_weights(pipe: Pipeline, component: str) -> dict[str, Tensor]:
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
            f"Convert a single-file checkpoint with {' or '.join(_PARTS)}.from_single_file(...)"
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


def _checked_class(index: Mapping[str, Any], name: str) -> str:
    """Return the pipeline's class; refuse other families and code that comes with a model."""
    pipeline_class = str(index.get("_class_name"))
    parts = {key: entry for key, entry in index.items() if entry != [None, None]}
    if pipeline_class.startswith("StableDiffusionXL") and "text_encoder" not in parts:
        raise PipelineError(
            f"{name!r} has no first text encoder, as the refiner of Stable Diffusion XL; load the "
            "base model, such as stabilityai/stable-diffusion-xl-base-1.0"
        )
    if pipeline_class not in _PARTS:
        raise PipelineError(
            f"{name!r} is a {pipeline_class!r}; unweave works on {' and '.join(_PARTS)} (Stable "
            "Diffusion 1.x, 2.x and XL)"
        )
    for component, entry in parts.items():
        if component.startswith("_") or not isinstance(entry, list):
            continue
        if len(entry) != 2 or entry[0] not in _LIBRARIES or not isinstance(entry[1], str):
            raise PipelineError(
                f"{name!r} asks for the class {entry!r} as {component!r}, which is neither in "
                "diffusers nor in transformers; unweave never runs code that comes with a model"
            )
    missing = [part for part in _PARTS[pipeline_class] if part not in parts]
    if missing:
        raise PipelineError(f"the model_index.json of {name!r} has no {missing[0]!r}")
    return pipeline_class


def _from_pretrained(source: str | Path, name: str, pipeline_class: str) -> Pipeline:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    is_xl = pipeline_class == "StableDiffusionXLPipeline"
    family = StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline
    try:
        pipe: Pipeline = family.from_pretrained(
            source,
            use_safetensors=True,
            local_files_only=isinstance(source, Path),
            **({} if is_xl else _NO_SAFETY_CHECKER),
        )
    except Exception as error:
        raise PipelineError(
            f"cannot load the pipeline {name!r}: {error}; every component needs whole "
            ".safetensors weights (pickled .bin files are never opened)"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_loaded_weights(folder: Path, pipe: Pipeline) -> None:
    """Put every saved text-encoder weight in place, and refuse files that lack weights.

    Across the renaming of transformers 5.6 its loader can leave weights random with no more than
    a warning.
    """
    for component, module in text_encoders(pipe).items():
        path = folder / component / "model.safetensors"
        if path.is_file():
            _put_in_place(component, module, path)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if path.is_file():
        with safe_open(path, "pt") as file:
            names = set(file.keys())
        for name in base_parameters("unet", pipe.unet):
            _require(name, names, path)


def _put_in_place(component: str, text_encoder: nn.Module, path: Path) -> None:
    saved = {canonical_key(component, name): tensor for name, tensor in load_tensors(path).items()}
    for name, parameter in base_parameters(component, text_encoder).items():
        _require(name, saved, path)
        with torch.no_grad():
            parameter.copy_(saved[name])


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
