"""Claims about names: files have one form, modules are found in theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from torch import nn

from unweave.diffusion_core.keys import (
    base_parameters,
    canonical_text_encoder_key,
    native_text_encoder_key,
    to_kohya_key,
)

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

_KEY = "encoder.layers.0.mlp.fc1.weight"


def _encoder(nested: bool) -> nn.Module:
    encoder = nn.Module()
    inner = encoder
    if nested:
        encoder.text_model = inner = nn.Module()
    inner.encoder = nn.Module()
    inner.encoder.layers = nn.ModuleList([nn.Module()])
    inner.encoder.layers[0].mlp = nn.Module()
    inner.encoder.layers[0].mlp.fc1 = nn.Linear(2, 2)
    return encoder


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("key", [_KEY, "text_model." + _KEY])
def test_a_key_of_either_form_is_found_in_either_encoder(nested: bool, key: str) -> None:
    encoder = _encoder(nested)
    assert canonical_text_encoder_key(key) == "text_model." + _KEY
    assert native_text_encoder_key(key, encoder) in dict(encoder.named_parameters())


def test_both_encoders_have_the_same_canonical_parameters() -> None:
    names = [set(base_parameters("text_encoder", _encoder(nested))) for nested in (True, False)]
    assert names[0] == names[1] == {"text_model." + _KEY, "text_model." + _KEY[:-6] + "bias"}


def test_the_projection_is_not_part_of_the_text_model() -> None:
    assert canonical_text_encoder_key("text_projection.weight") == "text_projection.weight"


def test_every_parameter_of_the_loaded_encoder_is_found(pipe: StableDiffusionPipeline) -> None:
    native = dict(pipe.text_encoder.named_parameters())
    for name in base_parameters("text_encoder", pipe.text_encoder):
        assert name.startswith("text_model.")
        assert native_text_encoder_key(name, pipe.text_encoder) in native


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_kohya_keys_have_the_form_that_webuis_read(prefix: str) -> None:
    key = f"text_encoder.{prefix}encoder.layers.0.mlp.fc1.lora_B.weight"
    assert to_kohya_key(key) == "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"
    assert to_kohya_key("unet.conv_in.alpha") == "lora_unet_conv_in.alpha"


@pytest.mark.parametrize("key", ["vae.x.lora_A.weight", "unet.x.weight", ""])
def test_other_keys_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="got"):
        to_kohya_key(key)
