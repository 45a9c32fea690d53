"""The attention layers of a denoiser, by name and kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from unweave.attention_tools.errors import AttentionError, UnsupportedLayerError

Kind = Literal["cross", "self"]
Layers = Kind | Callable[["AttentionLayer"], bool]

TEXT_BESIDE = ("AttnProcessor2_0", "FusedAttnProcessor2_0", "IPAdapterAttnProcessor2_0")
TEXT_FIRST = ("AttnAddedKVProcessor2_0", "FluxAttnProcessor")
IMAGE_FIRST = ("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0")
ORDER = {
    **dict.fromkeys((*TEXT_BESIDE, "CustomDiffusionAttnProcessor2_0"), "beside"),
    **dict.fromkeys(TEXT_FIRST, "text first"),
    **dict.fromkeys(IMAGE_FIRST, "image first"),
}
"""Where a processor puts the text among its keys: alone, before or after the image."""

EQUAL = {
    "AttnProcessor": "AttnProcessor2_0",
    "SlicedAttnProcessor": "AttnProcessor2_0",
    "XFormersAttnProcessor": "AttnProcessor2_0",
    "AttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
    "SlicedAttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
    "XFormersAttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
}
"""Processors that do not call torch's fused attention, and one that gives the same output."""


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer."""

    name: str
    """Its path in the denoiser, as in `denoiser.attn_processors` without `.processor`."""

    kind: Kind
    """"cross" where the text is among its keys, joint attention included; else "self"."""

    place: str
    """The first part of its path: `down_blocks`, `mid_block`, `up_blocks`, `transformer_blocks`."""

    processor: str
    """The class of its processor."""

    module: nn.Module = field(repr=False, compare=False)

    @property
    def order(self) -> str:
        """Where the text is among the keys: "beside", "text first" or "image first"."""
        return ORDER[EQUAL.get(self.processor, self.processor)]


def denoiser_of(pipe: Any) -> nn.Module:
    """Return the U-Net or transformer of a pipeline, or `pipe` itself when it is one.

    Raises `AttentionError` when there is neither, or when it was compiled.
    """
    model = pipe if isinstance(pipe, nn.Module) else None
    for name in ("unet", "transformer"):
        model = getattr(pipe, name, None) if model is None else model
    if not isinstance(model, nn.Module):
        raise AttentionError(
            f"{type(pipe).__name__} has no `unet` and no `transformer`; give a diffusers pipeline, "
            "or its denoiser"
        )
    if hasattr(model, "_orig_mod"):
        raise AttentionError(
            "the denoiser was compiled by torch.compile, whose graph holds the old attention; put "
            "`pipe.unet = pipe.unet._orig_mod` (or `transformer`) back before, and compile after"
        )
    for name, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise AttentionError(
                f"{name or 'the denoiser'} was compiled in place, by `.compile()` or "
                "`compile_repeated_blocks`, whose graph holds the old attention; compile after"
            )
    return model


def attention_layers(pipe: Any) -> list[AttentionLayer]:
    """Return all attention layers of a pipeline's denoiser, in the order of its modules."""
    return [
        _described(name, module)
        for name, module in denoiser_of(pipe).named_modules()
        if hasattr(module, "processor") and hasattr(module, "set_processor")
    ]


def select_layers(pipe: Any, layers: Layers = "cross") -> list[AttentionLayer]:
    """Return the attention layers of one kind, or those for which a predicate is true.

    Raises `AttentionError` when there is none, and `UnsupportedLayerError` listing the chosen
    layers whose processor is of a class that is not known.
    """
    known = attention_layers(pipe)
    if layers in ("cross", "self"):
        chosen = [layer for layer in known if layer.kind == layers]
    elif callable(layers):
        chosen = [layer for layer in known if layers(layer)]
    else:
        raise AttentionError(
            f'`layers` must be "cross", "self" or a function of a layer, got {layers!r}'
        )
    if not chosen:
        raise AttentionError(
            f"{layers!r} chooses none of the {len(known)} attention layers of "
            f"{type(denoiser_of(pipe)).__name__}: {_listed(known) or 'it has none'}"
        )
    strange = [
        layer for layer in chosen if EQUAL.get(layer.processor, layer.processor) not in ORDER
    ]
    if strange:
        raise UnsupportedLayerError(
            f"the attention of {len(strange)} of {len(chosen)} layers cannot be recorded or "
            f"changed: {_listed(strange)}; known processors: {', '.join(sorted({*ORDER, *EQUAL}))}"
        )
    return chosen


def _described(name: str, module: nn.Module) -> AttentionLayer:
    running = module.processor
    while hasattr(running, "original"):
        running = running.original
    processor = type(running).__name__
    joint = processor == "FluxAttnProcessor"
    crossed = bool(getattr(module, "is_cross_attention", False))
    added = getattr(module, "added_kv_proj_dim", None) is not None
    kind: Kind = "cross" if joint or crossed or added else "self"
    return AttentionLayer(name, kind, name.split(".")[0], processor, module)


def _listed(layers: list[AttentionLayer]) -> str:
    shown = ", ".join(f"{layer.name} ({layer.processor})" for layer in layers[:8])
    return f"{shown}, ..." if len(layers) > 8 else shown
