"""Super-resolution: a step by its definition, the plain pipelines of diffusers, a whole cascade."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    IFSuperResolutionPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)

from unweave.attention_tools import (
    AVERAGING,
    AnagramConfig,
    AnagramMTL,
    AttentionError,
    get_view,
)
from unweave.attention_tools.anagram import Anagram
from unweave.attention_tools.mixing import balancing_weights
from unweave.attention_tools.upscaling import UPSCALING, AnagramUpscaler

PROMPTS = ("a painting of a red fox", "a painting of an old tree")
SMALL, LARGE = 16, 32
SCORES = (0.3, 0.2)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def steady(views, t, prompts):
    return torch.diag(torch.tensor(SCORES))


def super_resolution(pixel_pipe, size, blocks=1, text=True):
    """A tiny random pipeline of the form of DeepFloyd IF's stage II, for images of `size`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=size,
            layers_per_block=1,
            block_out_channels=(8,) * blocks + (16,),
            down_block_types=("ResnetDownsampleBlock2D",) * blocks
            + ("SimpleCrossAttnDownBlock2D",),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D",) + ("ResnetUpsampleBlock2D",) * blocks,
            in_channels=6,
            out_channels=6,
            cross_attention_dim=32,
            encoder_hid_dim=32,
            attention_head_dim=8,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            class_embed_type="timestep",
            cross_attention_norm="group_norm",
            resnet_time_scale_shift="scale_shift",
            resnet_skip_time_act=True,
            act_fn="gelu",
            norm_num_groups=8,
        )
    cosine = {"beta_schedule": "squaredcos_cap_v2"}
    pipe = IFSuperResolutionPipeline(
        tokenizer=pixel_pipe.tokenizer if text else None,
        text_encoder=pixel_pipe.text_encoder if text else None,
        unet=unet.double().eval(),
        scheduler=DDPMScheduler(
            **cosine,
            thresholding=True,
            dynamic_thresholding_ratio=0.95,
            sample_max_value=1.5,
            variance_type="learned_range",
        ),
        image_noising_scheduler=DDPMScheduler(**cosine),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def stage_2(pixel_pipe):
    return super_resolution(pixel_pipe, LARGE)


@pytest.fixture(scope="module")
def stage_3(pipe):
    """A tiny random x4 upscaler with the text encoder of the embedded pipeline."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = UNet2DConditionModel(
            sample_size=LARGE,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            in_channels=7,
            out_channels=4,
            cross_attention_dim=128,
            attention_head_dim=8,
            num_class_embeds=1000,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=8,
            scaling_factor=0.08333,
        )
    upscaler = StableDiffusionUpscalePipeline(
        vae=vae.eval(),
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        unet=unet.eval(),
        low_res_scheduler=DDPMScheduler(),
        scheduler=DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
        watermarker=None,
    )
    upscaler.set_progress_bar_config(disable=True)
    return upscaler


def small_anagram(views=("identity", "flip"), prompts=PROMPTS, count=1, side=SMALL, seed=9):
    pixels = torch.rand(count, 3, side, side, generator=seeded(seed))
    return Anagram(pixels, tuple(map(get_view, views)), {"prompts": list(prompts)})


def enlarged(pipe, anagram, config=UPSCALING, seed=0, **more):
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, **more}
    return AnagramUpscaler(pipe, config, scorer=steady)(anagram, generator=seeded(seed), **settings)


# Against the definition, one call of the U-Net a view


def by_definition(pipe, anagram, balancing, rectification, steps, guidance, level, seed):
    """Upscaling written out: views, guidance, weights, correlation and scale in plain loops."""
    pipe.scheduler.set_timesteps(steps)
    generator, count = seeded(seed), len(anagram.views)
    x = torch.randn(1, 3, LARGE, LARGE, generator=generator, dtype=torch.float64)
    large = torch.nn.functional.interpolate(
        (2 * anagram.pixels - 1).double(), (LARGE, LARGE), mode="bilinear", align_corners=True
    )
    noise = torch.randn(large.shape, generator=generator, dtype=torch.float64)
    kept = pipe.image_noising_scheduler.alphas_cumprod[level].double()
    low = kept**0.5 * large + (1 - kept) ** 0.5 * noise
    text, empty = pipe.encode_prompt(anagram.record["prompts"], True, device="cpu")
    label = torch.tensor([level])
    for index, t in enumerate(pipe.scheduler.timesteps):
        noises, variances = [], []
        for k, view in enumerate(anagram.views):
            given = view.view(torch.cat([x, low], dim=1))
            with torch.no_grad():
                plain, prompted = (
                    pipe.unet(
                        given, t, encoder_hidden_states=own[k : k + 1], class_labels=label
                    ).sample
                    for own in (empty, text)
                )
            guided = plain[:, :3] + guidance * (prompted[:, :3] - plain[:, :3])
            noises.append(view.inverse_view(guided))
            variances.append(view.inverse_map(prompted[:, 3:]))
        weights = [1 / count] * count
        if balancing:
            weights = balancing_weights(torch.tensor(SCORES), index, steps).tolist()
        total = 1.0
        if rectification:
            rho = torch.corrcoef(torch.stack([one.flatten() for one in noises]))
            pairs = [(j, k) for j in range(count) for k in range(count)]
            total = sum(weights[j] * weights[k] * float(rho[j, k]) for j, k in pairs)
        mixed = sum(w * one for w, one in zip(weights, noises, strict=True)) / total**0.5
        variance = sum(w * one for w, one in zip(weights, variances, strict=True))
        output = torch.cat([mixed, variance], dim=1)
        x = pipe.scheduler.step(output, t, x, generator=generator).prev_sample
    return (x / 2 + 0.5).clamp(0, 1).float()


@pytest.mark.parametrize("second", ("flip", "rotate_cw", "negate", "jigsaw"))
@pytest.mark.parametrize("config", (AVERAGING, UPSCALING), ids=("averaging", "mtl"))
def test_stages_are_those_of_the_definition(stage_2, second, config):
    anagram = small_anagram(("identity", second))
    ours = enlarged(stage_2, anagram, config, seed=3, num_inference_steps=2, noise_level=120)
    parts = config.balancing, config.rectification is not None
    theirs = by_definition(stage_2, anagram, *parts, 2, 4.0, 120, 3)
    torch.testing.assert_close(ours.pixels, theirs, atol=1e-5, rtol=0)


# Against the pipelines of diffusers


@pytest.mark.parametrize("guidance", (1.0, 4.0))
@pytest.mark.parametrize("config", (AVERAGING, UPSCALING), ids=("averaging", "mtl"))
def test_one_identity_view_is_the_plain_super_resolution(stage_2, guidance, config):
    anagram = small_anagram(["identity"], PROMPTS[:1])
    settings = {"num_inference_steps": 3, "guidance_scale": guidance, "noise_level": 70}
    ours = enlarged(stage_2, anagram, config, seed=5, **settings)
    theirs = stage_2(
        PROMPTS[0],
        image=2 * anagram.pixels - 1,
        generator=seeded(5),
        output_type="pt",
        **settings,
    ).images
    expected = (theirs / 2 + 0.5).clamp(0, 1).float()
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.pixels, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("guidance", (1.0, 4.0))
def test_one_identity_view_is_the_plain_x4_upscaler(stage_3, guidance):
    anagram = small_anagram(["identity"], ["a cat face"])
    settings = {"num_inference_steps": 3, "guidance_scale": guidance, "noise_level": 20}
    ours = enlarged(stage_3, anagram, seed=5, **settings)
    theirs = stage_3(
        "a cat face", image=anagram.pixels, generator=seeded(5), output_type="pt", **settings
    ).images
    assert ours.pixels.shape == (1, 3, 4 * SMALL, 4 * SMALL)
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours.pixels, theirs, atol=1e-5, rtol=0)


def test_images_of_a_batch_are_those_made_alone(stage_2):
    both = small_anagram(count=2)
    upscaler = AnagramUpscaler(stage_2, scorer=steady)
    settings = {"num_inference_steps": 2}
    made = upscaler(both, generator=[seeded(0), seeded(1)], **settings)
    second = Anagram(both.pixels[1:], both.views, both.record)
    alone = upscaler(second, generator=seeded(1), **settings)
    torch.testing.assert_close(made.pixels[1], alone.pixels[0], atol=1e-5, rtol=0)


# What the model is given


def given_to(unet):
    """What the U-Net reads at each call, as a list that fills, and the hook that fills it."""
    calls = []

    def keep(module, arguments, keywords):
        calls.append((arguments[0], keywords["class_labels"]))

    return calls, unet.register_forward_pre_hook(keep, with_kwargs=True)


def test_views_turn_the_smaller_image_with_x_and_the_level_is_told(stage_2):
    anagram = small_anagram(("identity", "rotate_cw"), count=2)
    calls, hook = given_to(stage_2.unet)
    with hook:
        enlarged(stage_2, anagram, AVERAGING, noise_level=33)
    assert len(calls) == 3
    lows = []
    for given, labels in calls:
        assert given.shape == (8, 6, LARGE, LARGE)  # guidance, views, images
        assert labels.tolist() == [33] * 8
        halves = given.unflatten(0, (2, 2, 2))
        assert torch.equal(halves[0], halves[1])
        assert torch.equal(halves[0, 1], get_view("rotate_cw").view(halves[0, 0]))
        lows.append(halves[0, 0, :, 3:])
    assert torch.equal(lows[0], lows[2])


@pytest.mark.parametrize("level", (0, 50, 400, 999))
def test_noise_of_the_level_is_added_to_the_smaller_image(stage_2, level):
    grey = Anagram(torch.full((8, 3, SMALL, SMALL), 0.75), (get_view("flip"),), {"prompts": ["a"]})
    calls, hook = given_to(stage_2.unet)
    with hook:
        enlarged(stage_2, grey, num_inference_steps=1, guidance_scale=1.0, noise_level=level)
    low = calls[0][0][:, 3:]
    kept = float(stage_2.image_noising_scheduler.alphas_cumprod[level])
    assert float(low.mean()) == pytest.approx(0.5 * kept**0.5, abs=0.02)
    assert float(low.std()) == pytest.approx((1 - kept) ** 0.5, rel=0.02)


# A cascade


def test_three_stages_make_one_larger_anagram_with_all_its_views(pixel_pipe, pipe, stage_3):
    views = ["identity", "jigsaw"]
    prompts = ["a red fox", "a tree"]
    first = AnagramMTL(pixel_pipe, scorer=steady)(
        prompts, views, num_images=2, num_inference_steps=2, generator=seeded(0)
    )
    upscaler = AnagramUpscaler(
        super_resolution(pixel_pipe, 64, text=False), scorer=steady, text_from=pixel_pipe
    )
    second = upscaler(first, num_inference_steps=2, generator=seeded(1))
    third = AnagramUpscaler(stage_3, AVERAGING)(
        second, tasks=[0], noise_level=0, num_inference_steps=2, generator=seeded(2)
    )
    sizes = [made.pixels.shape[-1] for made in (first, second, third)]
    assert sizes == [32, 64, 256]
    assert third.seen().shape == (2, 2, 3, 256, 256)
    torch.testing.assert_close(third.seen()[1], get_view("jigsaw").view(third.pixels))
    record = json.loads(json.dumps(third.record))
    assert record["prompts"] == prompts and record["views"] == views
    assert record["tasks"] == [0] and record["noise_level"] == 0
    assert record["smaller"]["tasks"] == [0, 1] and record["smaller"]["noise_level"] == 50
    assert record["smaller"]["smaller"] == json.loads(json.dumps(first.record))
    assert len(record["smaller"]["steps"]) == 2
    weights = balancing_weights(torch.tensor(SCORES), 1, 2)
    found = torch.tensor(record["smaller"]["steps"][1]["alpha"])
    torch.testing.assert_close(found, weights.expand(2, 2))
    assert record["smaller"]["steps"][0]["L"] is None


def test_64_pixels_become_256(pixel_pipe):
    upscaler = AnagramUpscaler(super_resolution(pixel_pipe, 256, blocks=4), scorer=steady)
    anagram = small_anagram(("identity", "rotate_cw"), side=64)
    made = upscaler(anagram, num_inference_steps=1, generator=seeded(0))
    assert made.pixels.shape == (1, 3, 256, 256)
    assert made.strip().size == (512, 256)
    assert made.pixels.isfinite().all()


def test_text_of_another_pipeline_is_that_of_its_own(pixel_pipe, stage_2):
    anagram, settings = small_anagram(), {"num_inference_steps": 2}
    bare = super_resolution(pixel_pipe, LARGE, text=False)
    other = AnagramUpscaler(bare, scorer=steady, text_from=pixel_pipe)
    own = AnagramUpscaler(stage_2, scorer=steady)
    made = [one(anagram, generator=seeded(0), **settings).pixels for one in (own, other)]
    assert torch.equal(*made)


# Bad input


def test_pipelines_of_the_other_stage_are_refused(pixel_pipe, stage_2):
    with pytest.raises(AttentionError, match=r"IFPipeline has no `image_noising_scheduler`"):
        AnagramUpscaler(pixel_pipe, AVERAGING)
    with pytest.raises(AttentionError, match=r"give it to `AnagramUpscaler`"):
        AnagramMTL(stage_2, AVERAGING)


def test_a_pipeline_without_text_encoder_needs_another(pixel_pipe):
    with pytest.raises(AttentionError, match=r"no text encoder.*`text_from`"):
        AnagramUpscaler(super_resolution(pixel_pipe, LARGE, text=False), AVERAGING)


def test_balancing_needs_a_scorer(stage_2):
    with pytest.raises(AttentionError, match=r"needs a `scorer`"):
        AnagramUpscaler(stage_2, AnagramConfig())


@pytest.mark.parametrize("tasks", ([], [2], [0, 0], [-1]))
def test_tasks_that_the_anagram_lacks_are_named(stage_2, tasks):
    with pytest.raises(AttentionError, match=r"`tasks` must be different numbers below 2"):
        enlarged(stage_2, small_anagram(), tasks=tasks)


@pytest.mark.parametrize("level", (-1, 1000))
def test_noise_levels_beyond_the_schedule_are_named(stage_2, level):
    with pytest.raises(AttentionError, match=f"`noise_level` must be from 0 to 999, got {level}"):
        enlarged(stage_2, small_anagram(), noise_level=level)


def test_images_that_are_as_large_already_are_named(stage_2):
    with pytest.raises(AttentionError, match=r"images \(32, 32\) must be smaller than"):
        enlarged(stage_2, small_anagram(side=LARGE))


def test_generators_must_be_one_or_one_an_image(stage_2):
    with pytest.raises(AttentionError, match=r"one for each of 2 images, got 3"):
        AnagramUpscaler(stage_2, AVERAGING)(
            small_anagram(count=2), generator=[seeded(k) for k in range(3)]
        )
