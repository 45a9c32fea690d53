"""Choosing what to train by its part in a model, and proving that the rest is untouched."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from unweave.diffusion_core.errors import SelectionError, UnweaveError

TEXT_ENCODER_ROLES: dict[str, str] = {
    "mlp-only": "the MLPs of a CLIP text encoder",
    "attn-only": "the attentions of a CLIP text encoder",
    "mlp-attn": "the MLPs and the attentions of a CLIP text encoder",
    "mlp-final-attn": "the MLPs and the last attention of a CLIP text encoder",
}
"""Parts of a text encoder, by role, with one sentence about each."""

UNET_ROLES: dict[str, str] = {
    "cross-attention": "the attentions of a U-Net that read text",
    "cross-attention-kv": "the keys and values of those attentions",
    "self-attention": "the attentions of a U-Net within the image",
    "not-cross-attention": "everything in a U-Net but the attentions that read text",
}
"""Parts of a U-Net, by role, with one sentence about each."""

ROLES: dict[str, str] = {
    **TEXT_ENCODER_ROLES,
    **UNET_ROLES,
    "all": "everything in a text encoder or U-Net",
}
"""All roles that `select_parameters` knows, with one sentence about each."""


def select_parameters(module: nn.Module, role: str) -> dict[str, nn.Parameter]:
    """Return the parameters that play `role`, one of `ROLES`, by their name in `module`.

    Parts are found by their class and their position, so that the names a library version gives
    them do not matter. Weights of LoRA adapters are never part of a selection. Raises
    `SelectionError` for an unknown role or when `module` has no such part.

    >>> from unweave.diffusion_core.testing import tiny_pipeline
    >>> text_encoder = tiny_pipeline().text_encoder
    >>> len(select_parameters(text_encoder, "mlp-only")), len(list(text_encoder.parameters()))
    (8, 36)
    """
    if role not in ROLES:
        raise SelectionError(f"`role` must be one of {', '.join(ROLES)}, got {role!r}")
    chosen = {id(parameter) for parameter in _members(module, role)}
    found = {
        name: parameter
        for name, parameter in module.named_parameters()
        if id(parameter) in chosen and ".lora_" not in name
    }
    if not found:
        raise SelectionError(
            f"{type(module).__name__} has no parameters with the role {role!r} ({ROLES[role]}); a "
            f"text encoder has the roles {', '.join(TEXT_ENCODER_ROLES)}, all, and a U-Net has "
            f"{', '.join(UNET_ROLES)}, all"
        )
    return found


@contextlib.contextmanager
def train_only(
    modules: Iterable[nn.Module], params: Mapping[str, nn.Parameter] | Iterable[nn.Parameter]
) -> Iterator[None]:
    """Let only `params` in `modules` collect gradients while the block runs.

    At the end every parameter has its old `requires_grad`, and no gradients are left. Train and
    eval modes stay as they are. Raises `SelectionError` when `params` is empty or holds a
    parameter of none of the `modules`.
    """
    chosen = list(params.values() if isinstance(params, Mapping) else params)
    everything = list(chain.from_iterable(module.parameters() for module in modules))
    foreign = {id(parameter) for parameter in chosen} - {id(parameter) for parameter in everything}
    if not chosen or foreign:
        raise SelectionError(
            f"`params` must be parameters of `modules`: got {len(chosen)}, of which "
            f"{len(foreign)} are in none of them"
        )
    before = [(parameter, parameter.requires_grad) for parameter in everything]
    try:
        for parameter in everything:
            parameter.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
            parameter.grad = None


def fingerprint(module: nn.Module) -> dict[str, str]:
    """Return the SHA-256 of type, shape and bytes of every parameter and buffer by name."""
    named = chain(module.named_parameters(), module.named_buffers())
    return {name: _hash(tensor) for name, tensor in named}


def assert_untouched(
    before: Mapping[str, str], after: Mapping[str, str], except_names: Iterable[str] = ()
) -> None:
    """Raise `UnweaveError` if two fingerprints differ in more than the tensors `except_names`.

    An exception that neither fingerprint has is a `SelectionError`: it protects against typos.
    """
    allowed = set(except_names)
    unknown = sorted(allowed - before.keys() - after.keys())
    if unknown:
        raise SelectionError(f"`except_names` holds {unknown[0]!r}, which is no tensor of either")
    names = before.keys() | after.keys()
    changed = sorted(name for name in names - allowed if before.get(name) != after.get(name))
    if changed:
        raise UnweaveError(
            f"{len(changed)} tensors changed that should not have: {', '.join(changed[:5])}"
            + (", ..." if len(changed) > 5 else "")
        )


def _members(module: nn.Module, role: str) -> Iterator[nn.Parameter]:
    if role == "all":
        return module.parameters()
    if role in TEXT_ENCODER_ROLES:
        return _parameters_of(_text_encoder_parts(module, role))
    crossing = _unet_attentions(module, lambda attention: bool(attention.is_cross_attention))
    if role == "self-attention":
        within = _unet_attentions(module, lambda attention: not attention.is_cross_attention)
        return _parameters_of(within)
    if role == "cross-attention":
        return _parameters_of(crossing)
    if role == "cross-attention-kv":
        parts = [part for attention in crossing for part in (attention.to_k, attention.to_v)]
        return _parameters_of([part for part in parts if isinstance(part, nn.Module)])
    excluded = {id(parameter) for parameter in _parameters_of(crossing)}
    everything = module.parameters() if crossing else ()
    return (parameter for parameter in everything if id(parameter) not in excluded)


def _text_encoder_parts(module: nn.Module, role: str) -> list[nn.Module]:
    from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention

    mlps: list[nn.Module] = [part for part in module.modules() if isinstance(part, CLIPMLP)]
    attentions: list[nn.Module] = [
        part for part in module.modules() if isinstance(part, CLIPAttention)
    ]
    return {
        "mlp-only": mlps,
        "attn-only": attentions,
        "mlp-attn": mlps + attentions,
        "mlp-final-attn": mlps + attentions[-1:],
    }[role]


def _unet_attentions(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[nn.Module]:
    from diffusers.models.attention_processor import Attention

    return [part for part in module.modules() if isinstance(part, Attention) and wanted(part)]


def _parameters_of(parts: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    return chain.from_iterable(part.parameters() for part in parts)


def _hash(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
