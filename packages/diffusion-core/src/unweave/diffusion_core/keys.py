"""Names of text-encoder and LoRA tensors, the same whatever version of transformers wrote them.

transformers >= 5.6 builds `CLIPTextModel` flat (`encoder.layers...`), older versions nest it
under `text_model.`. Files hold the nested, canonical form, which both worlds and kohya's tools
read; loaded modules are reached by their native form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from unweave.diffusion_core.errors import SelectionError

if TYPE_CHECKING:
    from torch.nn import Parameter

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
"""The text encoders that a pipeline can have, by component name; Stable Diffusion XL has both."""

_PREFIX = "text_model."
_KOHYA_COMPONENTS = {"unet": "lora_unet", "text_encoder": "lora_te"}
_KOHYA_FACTORS = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "alpha": "alpha",
}


def canonical_text_encoder_key(key: str) -> str:
    """Return the `text_model.` form of a parameter or module name of a CLIP text encoder.

    >>> canonical_text_encoder_key("encoder.layers.0.mlp.fc1.weight")
    'text_model.encoder.layers.0.mlp.fc1.weight'
    """
    if key.startswith((_PREFIX, "text_projection.")):
        return key
    return _PREFIX + key


def canonical_key(component: str, key: str) -> str:
    """Return the name that a file gives to parameter `key` of a pipeline component."""
    return canonical_text_encoder_key(key) if component in TEXT_ENCODERS else key


def native_text_encoder_key(key: str, text_encoder: nn.Module) -> str:
    """Return the name under which `text_encoder`, as it is loaded, holds `key` of either form."""
    canonical = canonical_text_encoder_key(key)
    nested = any(name == "text_model" for name, _ in text_encoder.named_children())
    return canonical if nested else canonical.removeprefix(_PREFIX)


def to_kohya_key(key: str) -> str:
    """Return the kohya name of a LoRA key, as A1111 and ComfyUI read it for Stable Diffusion 1.x.

    Raises `SelectionError` for a key that is no LoRA tensor of a U-Net or text encoder.

    >>> to_kohya_key("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight")
    'lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight'
    """
    component, _, rest = key.partition(".")
    for ending, factor in _KOHYA_FACTORS.items():
        if component in _KOHYA_COMPONENTS and rest.endswith("." + ending):
            path = rest.removesuffix("." + ending)
            if component == "text_encoder":
                path = canonical_text_encoder_key(path)
            return f"{_KOHYA_COMPONENTS[component]}_{path.replace('.', '_')}.{factor}"
    raise SelectionError(
        f"`key` must be unet.<path> or text_encoder.<path> ending in one of "
        f"{', '.join(_KOHYA_FACTORS)}, got {key!r}"
    )


def base_parameters(component: str, module: nn.Module) -> dict[str, Parameter]:
    """Return the own parameters of a pipeline component by canonical name.

    Names are those of the component without any adapter: layers that peft wrapped keep their
    name, and the adapter's own weights are left out.
    """
    found = {}
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        found[canonical_key(component, name)] = parameter
    return found
