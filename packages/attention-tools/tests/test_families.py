"""Wiring on tiny random models of every family: what is recorded is the softmax over the text.

Queries and keys are read off the plain run of each model. Where text and image stand among them is
written here by hand, and checked against the projections of the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from unweave.attention_tools import (
    MapReader,
    attention_layers,
    capture_attention,
    intercept_attention,
    select_layers,
)
from unweave.attention_tools.errors import AttentionError

TEXT, BATCH = 7, 3


def unet_inputs(text_width: int = 12, channels: int = 4, size: int = 16) -> dict[str, Any]:
    return {
        "sample": torch.randn(BATCH, channels, size, size),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, text_width),
    }


def stable_diffusion_1(make_unet):
    return make_unet(), unet_inputs()


def stable_diffusion_2(make_unet):
    model = make_unet(use_linear_projection=True, attention_head_dim=(2, 4))
    return model, unet_inputs()


def stable_diffusion_xl(make_unet):
    model = make_unet(
        use_linear_projection=True,
        transformer_layers_per_block=(2, 1),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 10,
    )
    added = {"text_embeds": torch.randn(BATCH, 10), "time_ids": torch.rand(BATCH, 6)}
    return model, {**unet_inputs(), "added_cond_kwargs": added}


def deepfloyd_if(make_unet):
    model = make_unet(
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        in_channels=3,
        out_channels=6,
        block_out_channels=(16, 32),
        attention_head_dim=8,
        cross_attention_dim=32,
        encoder_hid_dim=12,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
    )
    return model, unet_inputs(channels=3)


def stable_diffusion_3(make_unet, **config: Any):
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
        **config,
    )
    return model, {
        "hidden_states": torch.randn(BATCH, 4, 8, 12),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "pooled_projections": torch.randn(BATCH, 10),
        "timestep": torch.full((BATCH,), 500.0),
    }


def stable_diffusion_3_5(make_unet):
    return stable_diffusion_3(make_unet, dual_attention_layers=(0,), qk_norm="rms_norm")


def flux(make_unet):
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 4, 8),
    )
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(6.0))
    return model, {
        "hidden_states": torch.randn(BATCH, 24, 4),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "pooled_projections": torch.randn(BATCH, 10),
        "timestep": torch.full((BATCH,), 0.5),
        "img_ids": places,
        "txt_ids": torch.zeros(TEXT, 3),
    }


def pixart(make_unet):
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        norm_num_groups=4,
        use_additional_conditions=False,
    )
    mask = torch.ones(BATCH, TEXT)
    mask[0, 4:] = 0
    return model, {
        "hidden_states": torch.randn(BATCH, 4, 8, 8),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 12),
        "encoder_attention_mask": mask,
        "timestep": torch.full((BATCH,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


@dataclass(frozen=True)
class Family:
    build: Callable[[Callable[..., nn.Module]], tuple[nn.Module, dict[str, Any]]]
    text: slice
    """The text among the keys."""
    image: slice
    """The image among the queries."""
    crossed: int
    """How many layers look at text."""
    selves: int
    """How many layers do not."""
    text_keys: str | None
    """The module whose output the text's keys are, if one makes them."""


ALL, FIRST, LAST = slice(None), slice(0, TEXT), slice(-TEXT, None)
FAMILIES = {
    "SD 1": Family(stable_diffusion_1, ALL, ALL, 4, 4, "to_k"),
    "SD 2": Family(stable_diffusion_2, ALL, ALL, 4, 4, "to_k"),
    "SDXL": Family(stable_diffusion_xl, ALL, ALL, 7, 7, "to_k"),
    "IF": Family(deepfloyd_if, FIRST, ALL, 4, 0, "add_k_proj"),
    "SD 3": Family(stable_diffusion_3, LAST, slice(0, -TEXT), 2, 0, "add_k_proj"),
    "SD 3.5": Family(stable_diffusion_3_5, LAST, slice(0, -TEXT), 2, 1, "norm_added_k"),
    "Flux": Family(flux, FIRST, slice(TEXT, None), 3, 0, "norm_added_k"),
    "PixArt": Family(pixart, ALL, ALL, 2, 2, "to_k"),
}


class Seen(TorchFunctionMode):
    """Keeps queries, keys and masks of each attention layer of a run, and the keys of its text."""

    def __init__(self, model: nn.Module, text_keys: str | None) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
        self.text_keys: dict[str, Tensor] = {}
        self.handles = []
        for layer in attention_layers(model):
            self.handles.append(layer.module.register_forward_pre_hook(self.entering(layer.name)))
            projection = getattr(layer.module, text_keys or "", None)
            if projection is not None:
                self.handles.append(projection.register_forward_hook(self.projected(layer.name)))

    def entering(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.layer = name

        return hook

    def projected(self, name: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, out: Tensor) -> None:
            self.text_keys[name] = out

        return hook

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            self.calls[self.layer] = named["query"], named["key"], named.get("attn_mask")
        return func(*args, **kwargs)

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()
        super().__exit__(*error)

    def softmax(self, name: str) -> Tensor:
        """Return the mean over heads of softmax(q k^T / sqrt(d)), in float64."""
        q, k, mask = self.calls[name]
        scores = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = scores if mask is None else scores + mask
        return scores.softmax(-1).mean(1)


@pytest.fixture(params=FAMILIES, scope="module")
def family(request, make_unet):
    """A family, its model and inputs, its plain output and what was seen in that run."""
    own = FAMILIES[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = own.build(make_unet)
        model = model.eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Sharper than at initialisation, so that a wrong column cannot pass for another.
                parameter.add_(0.2 * torch.randn_like(parameter))
    with torch.no_grad(), Seen(model, own.text_keys) as seen:
        plain = model(**inputs).sample
    assert plain.isfinite().all()
    return own, model, inputs, plain, seen


def test_layers_are_known_by_kind(family):
    own, model, _, _, seen = family
    kinds = [layer.kind for layer in attention_layers(model)]
    assert (kinds.count("cross"), kinds.count("self")) == (own.crossed, own.selves)
    assert {layer.name for layer in attention_layers(model)} == set(seen.calls)


def test_the_text_stands_where_this_file_says(family):
    own, model, _, _, seen = family
    assert seen.text_keys
    for layer in select_layers(model, "cross"):
        if layer.name in seen.text_keys:
            projected = seen.text_keys[layer.name]
            projected = projected.transpose(1, 2) if projected.shape[1] != TEXT else projected
            keys = seen.calls[layer.name][1][:, :, own.text].transpose(1, 2)
            assert torch.allclose(keys.flatten(2), projected.flatten(2), atol=1e-6), layer.name


def test_maps_are_the_softmax_over_the_text(family):
    own, model, inputs, plain, seen = family
    with torch.no_grad(), capture_attention(model) as maps:
        out = model(**inputs).sample
    assert torch.allclose(out, plain, atol=1e-5, rtol=1e-5)
    assert sorted(maps.layers) == sorted(layer.name for layer in select_layers(model, "cross"))
    for (name, _), values in maps.values.items():
        expected = seen.softmax(name)[:, own.image, own.text]
        assert values.shape == expected.shape
        assert torch.allclose(values.double(), expected, atol=1e-6), name
        height, width = maps.grids[name]
        assert height * width == values.shape[1]


def test_chosen_columns_and_groups(family):
    own, model, inputs, _, seen = family
    with torch.no_grad(), capture_attention(model, tokens=[[1, 2], [5]]) as maps:
        model(**inputs)
    for (name, _), values in maps.values.items():
        text = seen.softmax(name)[:, own.image, own.text]
        expected = torch.stack([text[..., 1] + text[..., 2], text[..., 5]], -1)
        assert torch.allclose(values.double(), expected, atol=1e-6), name


def test_self_attention_maps(family):
    own, model, inputs, plain, seen = family
    if not own.selves:
        with pytest.raises(AttentionError, match="chooses none"):
            select_layers(model, "self")
        return
    with torch.no_grad(), capture_attention(model, layers="self") as maps:
        out = model(**inputs).sample
    assert torch.allclose(out, plain, atol=1e-5, rtol=1e-5)
    assert len(maps.layers) == own.selves
    for (name, _), values in maps.values.items():
        assert torch.allclose(values.double(), seen.softmax(name), atol=1e-6), name


def test_a_handler_that_proceeds_changes_no_bit(family):
    _, model, inputs, plain, _ = family
    before = [layer.module.processor for layer in attention_layers(model)]
    everything = select_layers(model, lambda layer: True)
    with torch.no_grad(), intercept_attention(model, everything, lambda call: call.proceed()):
        out = model(**inputs).sample
    assert out.equal(plain)
    after = [layer.module.processor for layer in attention_layers(model)]
    assert all(one is other for one, other in zip(before, after, strict=True))


def test_gradients_of_maps_reach_the_latents(family):
    _, model, inputs, _, _ = family
    name = "sample" if "sample" in inputs else "hidden_states"
    latents = inputs[name].clone().requires_grad_()
    reader = MapReader(model, tokens=[2])
    for _ in range(2):
        maps = reader(lambda: model(**{**inputs, name: latents}))
        (gradient,) = torch.autograd.grad(maps.aggregate().pow(2).sum(), latents)
        assert gradient.isfinite().all() and gradient.abs().max() > 0
