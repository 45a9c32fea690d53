"""Handlers in place of attention: nothing else changes, and everything is restored."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor2_0

from unweave.attention_tools import (
    attention_layers,
    capture_attention,
    intercept_attention,
    select_layers,
)
from unweave.attention_tools.errors import AttentionError, UnsupportedLayerError
from unweave.attention_tools.interception import grid_of

PROMPT = "a cat face and a rocket on a red background"


def run(pipe, steps=2, **settings):
    generator = torch.Generator().manual_seed(0)
    return pipe(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=4.0,
        generator=generator,
        output_type="latent",
        **settings,
    ).images


def processors(pipe):
    return [layer.module.processor for layer in attention_layers(pipe)]


def same_objects(before, after):
    return len(before) == len(after) and all(
        one is other for one, other in zip(before, after, strict=True)
    )


@pytest.fixture
def unet(make_unet):
    """A tiny U-Net of this test's own."""
    return make_unet(sample_size=8)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(1, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, 5, 12, generator=generator),
    }


def test_a_handler_that_proceeds_changes_no_bit(pipe):
    plain, before = run(pipe), processors(pipe)
    everything, calls = select_layers(pipe, lambda layer: True), []

    def proceed(call):
        calls.append((call.layer.name, call.denoiser.step, call.denoiser.guided))
        return call.proceed()

    with intercept_attention(pipe, everything, proceed):
        out = run(pipe)
    assert out.equal(plain)
    assert same_objects(before, processors(pipe))
    assert len(calls) == 2 * len(everything)
    assert {step for _, step, _ in calls} == {0, 1}
    assert all(guided for *_, guided in calls)
    assert run(pipe).equal(plain)


def test_a_handler_may_change_what_attention_gets(pipe):
    plain = run(pipe)
    with intercept_attention(pipe, select_layers(pipe), lambda call: call.proceed(v=call.v * 0)):
        assert not run(pipe).equal(plain)
    assert run(pipe).equal(plain)


def test_outer_handler_comes_first_and_its_proceed_calls_the_next(unet, inputs):
    layer, order = select_layers(unet)[:1], []

    def handler(name):
        def handle(call):
            order.append(f"{name} in")
            out = call.proceed(v=call.v * 2)
            order.append(f"{name} out")
            return out

        return handle

    before = processors(unet)
    with torch.no_grad():
        with intercept_attention(unet, layer, handler("outer")):
            between = processors(unet)
            with intercept_attention(unet, layer, handler("inner")):
                nested = unet(**inputs).sample
            assert same_objects(between, processors(unet))
        with intercept_attention(unet, layer, lambda call: call.proceed(v=call.v * 4)):
            once = unet(**inputs).sample
    assert order == ["outer in", "inner in", "inner out", "outer out"]
    assert torch.allclose(nested, once, atol=1e-6)
    assert same_objects(before, processors(unet))


def test_nested_captures_see_the_same_maps(unet, inputs):
    plain = unet(**inputs).sample
    with capture_attention(unet) as outer, capture_attention(unet, tokens=[2]) as inner:
        out = unet(**inputs).sample
    assert torch.allclose(out, plain, atol=1e-6)
    for key, values in inner.values.items():
        assert torch.allclose(values, outer.values[key][..., [2]], atol=1e-6)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("failing", ["handler", "block", "denoiser"])
def test_processors_are_restored_when_an_exception_flies(unet, inputs, failing, nested):
    before, hooks = processors(unet), len(unet._forward_pre_hooks)

    def fail(call):
        raise RuntimeError("handler")

    def attempt():
        with intercept_attention(
            unet, select_layers(unet), fail if failing == "handler" else lambda c: c.proceed()
        ):
            if failing == "block":
                raise RuntimeError("block")
            wrong = {"encoder_hidden_states": torch.zeros(1, 5, 99)}
            unet(**{**inputs, **(wrong if failing == "denoiser" else {})})

    with pytest.raises(RuntimeError):
        if nested:
            with capture_attention(unet):
                attempt()
        else:
            attempt()
    assert same_objects(before, processors(unet))
    assert len(unet._forward_pre_hooks) == hooks
    with torch.no_grad():
        assert unet(**inputs).sample.isfinite().all()


def test_processors_are_restored_when_a_generator_is_closed(unet):
    before = processors(unet)

    def interrupted():
        with capture_attention(unet):
            yield

    running = interrupted()
    next(running)
    assert not same_objects(before, processors(unet))
    running.close()
    assert same_objects(before, processors(unet))


def test_lora_layers_keep_their_adapters(unet, inputs):
    peft = pytest.importorskip("peft")
    with torch.no_grad():
        bare = unet(**inputs).sample
    unet.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    )
    unet.eval()
    with torch.no_grad():
        adapted = unet(**inputs).sample
        assert not torch.allclose(adapted, bare, atol=1e-3)
        everything, before = select_layers(unet, lambda layer: True), processors(unet)
        with intercept_attention(unet, everything, lambda call: call.proceed()):
            assert unet(**inputs).sample.equal(adapted)
        keys = {}
        handles = [
            layer.module.to_k.register_forward_hook(
                lambda _, __, out, name=layer.name: keys.__setitem__(name, out)
            )
            for layer in select_layers(unet)
        ]
        queries = {}
        handles += [
            layer.module.to_q.register_forward_hook(
                lambda _, __, out, name=layer.name: queries.__setitem__(name, out)
            )
            for layer in select_layers(unet)
        ]
        with capture_attention(unet) as maps:
            assert torch.allclose(unet(**inputs).sample, adapted, atol=1e-6)
    for (name, _), values in maps.values.items():
        q, k = (x[name].unflatten(-1, (2, -1)).transpose(1, 2).double() for x in (queries, keys))
        expected = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)
        assert torch.allclose(values.double(), expected, atol=1e-6)
    for handle in handles:
        handle.remove()
    assert same_objects(before, processors(unet))


def test_attention_slicing_gives_the_same_maps(pipe):
    with capture_attention(pipe) as fused:
        run(pipe)
    original = pipe.unet.attn_processors
    try:
        pipe.enable_attention_slicing(1)
        before = processors(pipe)
        assert type(before[0]).__name__ == "SlicedAttnProcessor"
        sliced_run = run(pipe)
        with capture_attention(pipe) as sliced:
            out = run(pipe)
        assert same_objects(before, processors(pipe))
    finally:
        pipe.unet.set_attn_processor(original)
    assert torch.allclose(out, sliced_run, atol=1e-4)
    for key, values in fused.values.items():
        assert torch.allclose(values, sliced.values[key], atol=1e-5)


def test_plain_processor_gives_the_same_maps(unet, inputs):
    from diffusers.models.attention_processor import AttnProcessor

    with torch.no_grad(), capture_attention(unet) as fused:
        unet(**inputs)
    unet.set_attn_processor(AttnProcessor())
    with torch.no_grad(), capture_attention(unet) as plain:
        unet(**inputs)
    assert fused.layers == plain.layers
    for key, values in fused.values.items():
        assert torch.allclose(values, plain.values[key], atol=1e-6)


def test_compiled_denoisers_are_refused(unet):
    with pytest.raises(AttentionError, match="_orig_mod"), capture_attention(torch.compile(unet)):
        pass
    in_place = copy.deepcopy(unet)
    in_place.compile()
    with pytest.raises(AttentionError, match="compiled in place"), capture_attention(in_place):
        pass
    by_block = copy.deepcopy(unet)
    by_block.mid_block.compile()
    with pytest.raises(AttentionError, match="mid_block"), capture_attention(by_block):
        pass


def test_unknown_processors_are_refused_by_name(unet):
    class HomemadeProcessor(AttnProcessor2_0):
        pass

    layer = select_layers(unet)[1]
    layer.module.set_processor(HomemadeProcessor())
    with pytest.raises(UnsupportedLayerError) as caught, capture_attention(unet):
        pass
    assert layer.name in str(caught.value)
    assert "HomemadeProcessor" in str(caught.value)
    assert "AttnProcessor2_0" in str(caught.value)
    others = [one.name for one in select_layers(unet, "self")]
    with capture_attention(unet, layers="self"):
        assert len(others) == 4


def test_processors_without_fused_attention_are_named(unet, inputs):
    class Silent:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            return hidden_states

    Silent.__name__ = "AttnProcessor2_0"
    layer = select_layers(unet)[0]
    layer.module.set_processor(Silent())
    with pytest.raises(UnsupportedLayerError, match="made no call"), capture_attention(unet):
        unet(**inputs)


def test_pipeline_without_cross_attention_is_named():
    model = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    pipe = DDPMPipeline(model, DDPMScheduler())
    with (
        pytest.raises(AttentionError, match="'cross' chooses none of the"),
        capture_attention(pipe),
    ):
        pass
    plain = model(torch.ones(1, 3, 8, 8), 10).sample
    with capture_attention(pipe, layers="self") as maps:
        out = model(torch.ones(1, 3, 8, 8), 10).sample
    assert torch.allclose(out, plain, atol=1e-6)
    assert set(maps.grids.values()) == {(4, 4)}


def test_things_that_are_no_pipeline_are_named():
    with pytest.raises(AttentionError, match="no `unet` and no `transformer`"):
        select_layers(object())
    with pytest.raises(AttentionError, match="crossed"):
        select_layers(UNet2DModel(block_out_channels=(32, 32, 32, 32)), "crossed")


def test_grids_of_odd_sizes():
    assert grid_of(9, (5, 5)) == (3, 3)
    assert grid_of(6, (8, 12)) == (2, 3)
    assert grid_of(21, (5, 13)) == (3, 7)
    with pytest.raises(AttentionError, match="7 image tokens"):
        grid_of(7, (8, 8))


def test_video_latents_are_refused(unet):
    with pytest.raises(AttentionError, match="video"), capture_attention(unet):
        unet(torch.zeros(1, 4, 2, 8, 8), 1, torch.zeros(1, 5, 12))
