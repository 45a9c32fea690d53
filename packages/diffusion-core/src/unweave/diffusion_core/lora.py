"""Low-rank adapters: training them without peft, and files that every other tool reads.

LoRA: Hu et al. 2021, arXiv:2106.09685. A layer computes W x + up (down x), with alpha = r.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from unweave.diffusion_core.errors import ArtifactError, NonFiniteError, SelectionError
from unweave.diffusion_core.files import (
    atomic_write_bytes,
    load_metadata,
    load_tensors,
    save_tensors,
)
from unweave.diffusion_core.keys import canonical_text_encoder_key, to_kohya_key

LORA_FILE = "pytorch_lora_weights.safetensors"
CONFIG_FILE = "adapter_config.json"
_PEFT_METADATA = "lora_adapter_metadata"
_PATHS_METADATA = "unweave_module_paths"
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_OLD_FORMS = {
    ".lora.down.weight": _DOWN,
    ".lora.up.weight": _UP,
    ".lora_linear_layer.down.weight": _DOWN,
    ".lora_linear_layer.up.weight": _UP,
}

ModuleFactors = Mapping[str, tuple[Tensor, Tensor]]
"""Factors of one component, {path of an nn.Linear: (down (r, in), up (out, r))}."""


class LoraLayers:
    """Trainable factors beside the frozen linear layers of one module, until `remove`."""

    def __init__(
        self, module: nn.Module, paths: Iterable[str], rank: int, generator: torch.Generator | None
    ) -> None:
        """Add factors to the layers at `paths`; see `add_lora`."""
        self._handles: list[RemovableHandle] = []
        self._factors: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        layers = {path: _linear(module, path) for path in paths}
        if not layers:
            raise SelectionError("`paths` must name at least one nn.Linear, got none")
        if rank < 1:
            raise SelectionError(f"`rank` must be at least 1, got {rank}")
        for path, layer in layers.items():
            down = torch.randn(rank, layer.in_features, generator=generator) / rank
            up = torch.zeros(layer.out_features, rank)
            pair = (nn.Parameter(down.to(layer.weight)), nn.Parameter(up.to(layer.weight)))
            self._factors[path] = pair
            self._handles.append(layer.register_forward_hook(_adding_hook(*pair)))

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The factors to train, {"<path>.lora_A.weight" and "<path>.lora_B.weight": parameter}."""
        named: dict[str, Tensor] = {}
        for path, (down, up) in self._factors.items():
            named[path + _DOWN], named[path + _UP] = down, up
        return named

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return copies of the factors, {path: (down, up)}, as `save_lora` takes them."""
        return {
            path: (down.detach().clone(), up.detach().clone())
            for path, (down, up) in self._factors.items()
        }

    def remove(self) -> None:
        """Take the factors off the module, whose own weights were never changed."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> LoraLayers:
        """Return self: the factors are already in place."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take the factors off the module."""
        self.remove()


def add_lora(
    module: nn.Module, paths: Iterable[str], rank: int, *, generator: torch.Generator | None = None
) -> LoraLayers:
    """Put trainable factors beside the `nn.Linear` layers of `module` at `paths`.

    `down` (rank, in) starts from a normal distribution with standard deviation 1 / rank drawn
    from `generator` (on the CPU), `up` (out, rank) from zero, so that the module computes what it
    did. Raises `SelectionError` for a path that is no `nn.Linear`.
    """
    return LoraLayers(module, paths, rank, generator)


def save_lora(
    folder: str | Path,
    unet_factors: ModuleFactors,
    text_encoder_factors: ModuleFactors | None = None,
    *,
    key_style: Literal["diffusers", "kohya"] = "diffusers",
) -> Path:
    """Write `pytorch_lora_weights.safetensors` and `adapter_config.json` into `folder`.

    Load the result with `pipe.load_lora_weights(folder)`; "kohya" keys are those of A1111 and
    ComfyUI. Text-encoder keys are always in the canonical `text_model.` form. Returns the path
    of the safetensors file. Raises `SelectionError` for factors whose shapes do not fit.
    """
    if key_style not in ("diffusers", "kohya"):
        raise SelectionError(f'`key_style` must be "diffusers" or "kohya", got {key_style!r}')
    components = {
        "unet": dict(unet_factors),
        "text_encoder": {
            canonical_text_encoder_key(path): pair
            for path, pair in (text_encoder_factors or {}).items()
        },
    }
    _check_factors(components)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot make the folder {str(folder)!r}: {error.strerror}") from error
    tensors, metadata = (
        _kohya_file(components) if key_style == "kohya" else _diffusers_file(components)
    )
    config = json.dumps(_adapter_config(components), indent=2, sort_keys=True)
    atomic_write_bytes(folder / CONFIG_FILE, config.encode() + b"\n")
    save_tensors(folder / LORA_FILE, tensors, metadata)
    return folder / LORA_FILE


def load_lora_factors(
    folder: str | Path,
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, tuple[Tensor, Tensor]]]:
    """Read (unet_factors, text_encoder_factors) from a LoRA file or the folder that holds it.

    Reads what `save_lora` wrote in either style and the diffusers files of others; alpha is
    folded into `up`. Text-encoder paths are canonical. Raises `ArtifactError` for other files.
    """
    path = Path(folder) / LORA_FILE if Path(folder).is_dir() else Path(folder)
    tensors, metadata = load_tensors(path), load_metadata(path)
    if any(key.startswith("lora_") for key in tensors):
        tensors = _from_kohya(path, tensors, metadata)
    tensors = {_current_form(key): tensor for key, tensor in tensors.items()}
    scales = _saved_scales(path, metadata)
    components: dict[str, dict[str, tuple[Tensor, Tensor]]] = {"unet": {}, "text_encoder": {}}
    for key in tensors:
        component, _, rest = key.partition(".")
        if component not in components or not rest.endswith((_DOWN, _UP, ".alpha")):
            raise ArtifactError(
                f"{str(path)!r} holds {key!r}, which is no LoRA factor of a U-Net or text encoder "
                "in diffusers form; load it with pipe.load_lora_weights instead"
            )
        if not rest.endswith(_DOWN):
            continue
        module_path = rest.removesuffix(_DOWN)
        down, up = tensors[key], tensors.get(f"{component}.{module_path}{_UP}")
        if up is None:
            raise ArtifactError(f"{str(path)!r} holds {key!r} without its {_UP}")
        scale = scales(component, module_path, down.shape[0])
        alpha = tensors.get(f"{component}.{module_path}.alpha")
        if alpha is not None:
            scale = float(alpha) / down.shape[0]
        if component == "text_encoder":
            module_path = canonical_text_encoder_key(module_path)
        components[component][module_path] = (down, up if scale == 1.0 else up * scale)
    return components["unet"], components["text_encoder"]


def _current_form(key: str) -> str:
    for old, new in _OLD_FORMS.items():
        if key.endswith(old):
            return key.removesuffix(old) + new
    return key


def _linear(module: nn.Module, path: str) -> nn.Linear:
    try:
        layer = module.get_submodule(path)
    except AttributeError as error:
        raise SelectionError(f"the module has no layer {path!r}") from error
    if not isinstance(layer, nn.Linear):
        raise SelectionError(f"{path!r} is a {type(layer).__name__}, and LoRA needs an nn.Linear")
    return layer


def _adding_hook(down: Tensor, up: Tensor) -> Any:
    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        low = nn.functional.linear(inputs[0].to(down), down)
        return output + nn.functional.linear(low, up).to(output)

    return add


def _check_factors(components: Mapping[str, ModuleFactors]) -> None:
    if not any(components.values()):
        raise SelectionError("a LoRA must hold the factors of at least one layer, got none")
    for component, factors in components.items():
        for path, (down, up) in factors.items():
            if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
                raise SelectionError(
                    f"the factors of {component}.{path} must be down (r, in) and up (out, r), got "
                    f"{tuple(down.shape)} and {tuple(up.shape)}"
                )
            if not (down.isfinite().all() and up.isfinite().all()):
                raise NonFiniteError(f"the factors of {component}.{path} have NaN or infinity")


def _diffusers_file(
    components: Mapping[str, ModuleFactors],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    configs: dict[str, Any] = {}
    for component, factors in components.items():
        for path, (down, up) in factors.items():
            tensors[f"{component}.{path}{_DOWN}"] = down
            tensors[f"{component}.{path}{_UP}"] = up
        if factors:
            settings = _lora_settings(factors)
            configs |= {f"{component}.{key}": value for key, value in settings.items()}
    metadata = {"format": "pt", _PEFT_METADATA: json.dumps(configs, indent=2, sort_keys=True)}
    return tensors, metadata


def _kohya_file(
    components: Mapping[str, ModuleFactors],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Build a kohya file with the same alpha everywhere, which diffusers needs to read it right."""
    pairs = [pair for factors in components.values() for pair in factors.values()]
    alpha = max(down.shape[0] for down, _ in pairs)
    tensors: dict[str, Tensor] = {}
    paths: dict[str, str | None] = {}
    for component, factors in components.items():
        for path, (down, up) in factors.items():
            name = f"{component}.{path}"
            tensors[to_kohya_key(name + _DOWN)] = down
            tensors[to_kohya_key(name + _UP)] = up * (down.shape[0] / alpha)
            tensors[to_kohya_key(name + ".alpha")] = torch.tensor(float(alpha), dtype=down.dtype)
            paths[to_kohya_key(name + _DOWN).partition(".")[0]] = name
    for path, (down, up) in _filling(components["text_encoder"]).items():
        name = f"text_encoder.{path}"
        tensors[to_kohya_key(name + _DOWN)], tensors[to_kohya_key(name + _UP)] = down, up
        tensors[to_kohya_key(name + ".alpha")] = torch.tensor(float(alpha), dtype=down.dtype)
        paths[to_kohya_key(name + _DOWN).partition(".")[0]] = None
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(alpha),
        "ss_network_alpha": str(float(alpha)),
        _PATHS_METADATA: json.dumps(paths),
    }
    return tensors, metadata


def _filling(factors: ModuleFactors) -> dict[str, tuple[Tensor, Tensor]]:
    """Return zero factors for one `out_proj` where attention is edited but no `out_proj` is.

    diffusers 0.42 recognises kohya text-encoder files by that layer, and silently ignores the
    other attention layers without it.
    """
    if any(path.endswith(".out_proj") for path in factors):
        return {}
    for path, (down, _) in factors.items():
        attention, _, layer = path.rpartition(".")
        if layer in ("q_proj", "k_proj", "v_proj"):
            width = down.shape[1]
            return {f"{attention}.out_proj": (down.new_zeros(1, width), down.new_zeros(width, 1))}
    return {}


def _from_kohya(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, Tensor]:
    endings = {"lora_down.weight": _DOWN, "lora_up.weight": _UP, "alpha": ".alpha"}
    try:
        paths = json.loads(metadata[_PATHS_METADATA])
        renamed = {}
        for key, tensor in tensors.items():
            name, _, ending = key.partition(".")
            if paths[name] is not None:
                renamed[paths[name] + endings[ending]] = tensor
        return renamed
    except (KeyError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"{str(path)!r} has kohya keys without the module paths that unweave writes beside "
            "them; load it with pipe.load_lora_weights instead"
        ) from error


def _lora_settings(factors: ModuleFactors) -> dict[str, Any]:
    """Return the peft settings of one component; paths are read as endings of module names.

    Without the `text_model.` prefix they fit nested and flat text encoders alike.
    """
    ranks = {path.removeprefix("text_model."): down.shape[0] for path, (down, _) in factors.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {path: value for path, value in ranks.items() if value != rank}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": False,
        "lora_bias": False,
    }


def _adapter_config(components: Mapping[str, ModuleFactors]) -> dict[str, Any]:
    factors = {
        path: pair
        for component in ("unet", "text_encoder")
        for path, pair in components[component].items()
    }
    return _lora_settings(factors)


def _saved_scales(path: Path, metadata: Mapping[str, str]) -> Any:
    """Return a function (component, module path, rank) -> alpha / rank from the peft metadata."""
    try:
        configs = json.loads(metadata.get(_PEFT_METADATA, "{}"))
        defaults = {part: configs.get(f"{part}.lora_alpha") for part in ("unet", "text_encoder")}
        patterns = {part: configs.get(f"{part}.alpha_pattern") or {} for part in defaults}
    except (ValueError, AttributeError) as error:
        raise ArtifactError(f"{str(path)!r} has damaged LoRA metadata: {error}") from error

    def scale(component: str, module_path: str, rank: int) -> float:
        endings = (module_path, module_path.removeprefix("text_model."))
        for ending, alpha in patterns[component].items():
            if any(known == ending or known.endswith("." + ending) for known in endings):
                return float(alpha) / rank
        default = defaults[component]
        return 1.0 if default is None else float(default) / rank

    return scale
