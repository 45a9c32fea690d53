"""Weights that others publish for an erased model, read once and kept as a safe erasure.

Such files are usually pickles, which unweave never loads: this conversion is asked for by name,
and lets torch build tensors and plain containers from them and nothing else.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from unweave.diffusion_core.changes import Change, LowRank
from unweave.diffusion_core.errors import ArtifactError
from unweave.diffusion_core.files import load_tensors, sha256_of
from unweave.diffusion_core.pipelines import Pipeline, base_model_hash, base_weights
from unweave.diffusion_core.weight_delta import DeltaMeta, WeightDelta
from unweave.erasure.protocol import Erasure, ErasureRequest, check_pipeline

_COMPVIS = "model.diffusion_model."
_COMPVIS_PARTS = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "out.")
_DIFFUSERS = "unet."
_FORMS = (
    'expected {"unet": {name: tensor}}, as Concept Ablation, DoCo and Custom Diffusion save it, or '
    "the state dict of a U-Net in the names of diffusers or of CompVis"
)


def convert_delta(
    path: str | Path, pipe: Pipeline, method: str, request: ErasureRequest
) -> Erasure:
    """Return the erasure that makes the U-Net of `pipe` the one in the file `path`.

    `pipe` must be the model that was edited; deltas applied to it are left out of account. The file
    is a safetensors file or a pickle (.bin, .pt, .ckpt) and holds new weights, all of the U-Net's
    or some, or the factors {"u", "v"} of their changes. Weights in a smaller dtype than the model's
    count as changed only if they differ in that dtype. `method` and `request` say what was done and
    are kept with the erasure. Raises `ArtifactError` when the file is damaged, holds more than
    tensors, does not fit the U-Net, or changes nothing.
    """
    check_pipeline(pipe)
    path = Path(path)
    base = base_weights(pipe, "unet")
    changes: dict[str, Change] = {}
    for name, value in _unet_weights(_read(path), pipe, path).items():
        change = _change(name, value, base, path)
        if change is not None:
            changes[name] = change
    if not changes:
        raise ArtifactError(
            f"{str(path)!r} holds the very weights of the model: nothing was erased in it"
        )
    source = {"converted_from": path.name, "sha256": sha256_of(path)}
    meta = DeltaMeta(base_model_hash(pipe), method, source)
    return Erasure(WeightDelta({"unet": changes}, meta), request)


def _read(path: Path) -> Mapping[str, Any]:
    """Return what the file holds, unwrapped from the dictionaries that tools put around it."""
    content: Any = load_tensors(path) if path.suffix == ".safetensors" else _unpickled(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if isinstance(content, Mapping) and isinstance(content.get("unet"), Mapping):
        others = [key for key, value in content.items() if key != "unet" and value]
        if others:
            raise ArtifactError(
                f"{str(path)!r} holds {others[0]!r} beside the U-Net, such as learned words, which "
                "an erasure of the U-Net cannot keep"
            )
        content = content["unet"]
    if not isinstance(content, Mapping) or not content:
        raise ArtifactError(f"{str(path)!r} holds no weights: {_FORMS}")
    return content


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ArtifactError(
            f"cannot read {str(path)!r} as tensors ({reason}); it is missing, damaged, or a pickle "
            "with more than tensors in it, which could run any code and is not opened"
        ) from error


def _unet_weights(content: Mapping[str, Any], pipe: Pipeline, path: Path) -> Mapping[str, Any]:
    """Return the weights by their names in diffusers, whichever names the file has."""
    if any(name.startswith(_COMPVIS_PARTS) for name in content):
        content = {_COMPVIS + name: value for name, value in content.items()}
    if not any(name.startswith(_COMPVIS) for name in content):
        return {name.removeprefix(_DIFFUSERS): value for name, value in content.items()}
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    try:
        found: dict[str, Any] = convert_ldm_unet_checkpoint(dict(content), pipe.unet.config)
    except KeyError as error:
        raise ArtifactError(
            f"{str(path)!r} has CompVis names of another U-Net or of a part of one: {error} is "
            "missing"
        ) from error
    missing = sorted(base_weights(pipe, "unet").keys() - found.keys())
    if missing:
        raise ArtifactError(
            f"{str(path)!r} has CompVis names but not the whole of this U-Net: {missing[0]!r} is "
            "missing; give the complete file, or one in the names of diffusers"
        )
    return found


def _change(name: str, value: object, base: Mapping[str, Tensor], path: Path) -> Change | None:
    """Return by how much the file changes one weight, None for not at all."""
    if name not in base:
        raise ArtifactError(
            f"{str(path)!r} has {name!r}, which this U-Net lacks: give the model that was edited; "
            f"{_FORMS}"
        )
    old = base[name].cpu()
    if isinstance(value, Tensor):
        if value.shape != old.shape:
            raise ArtifactError(_misfit(path, name, value.shape, old.shape))
        if torch.equal(old.to(value.dtype), value):
            return None
        return value.float() - old.float()
    if _is_factors(value):
        change = LowRank(value["v"].float(), value["u"].float())
        if change.shape != old.shape:
            raise ArtifactError(_misfit(path, name, change.shape, old.shape))
        return change
    raise ArtifactError(f"{str(path)!r} has {type(value).__name__} at {name!r}: {_FORMS}")


def _is_factors(value: object) -> TypeGuard[Mapping[str, Tensor]]:
    return (
        isinstance(value, Mapping)
        and value.keys() == {"u", "v"}
        and all(isinstance(factor, Tensor) for factor in value.values())
    )


def _misfit(path: Path, name: str, found: torch.Size, expected: torch.Size) -> str:
    return (
        f"{str(path)!r} has {name!r} of shape {tuple(found)} and the model has {tuple(expected)}: "
        "give the model that was edited"
    )
