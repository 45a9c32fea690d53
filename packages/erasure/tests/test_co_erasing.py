import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from unweave.diffusion_core.denoiser import Denoiser
from unweave.diffusion_core.errors import ImageError, PipelineError, SelectionError
from unweave.diffusion_core.parameters import fingerprint
from unweave.diffusion_core.prompts import PromptStates, encode_conditions
from unweave.diffusion_core.teacher import frozen_teacher
from unweave.diffusion_core.testing import tiny_pipeline, tiny_xl_pipeline
from unweave.diffusion_core.trajectories import TrajectoryBank
from unweave.erasure.co_erasing import (
    CONTRASTS,
    CoErasing,
    CoErasingConfig,
    co_erasing_loss,
    contrast,
    gaussian_blur,
    legacy_bank,
    refined_tokens,
    refinement_weights,
)
from unweave.erasure.esd import esd_loss, trainable_parameters
from unweave.erasure.image_prompts import (
    ADAPTER_FILE,
    ImagePrompts,
    ImagePromptsConfig,
    train_image_prompts,
    with_image,
)
from unweave.erasure.protocol import Erasure, ErasureRequest

QUICK = {
    "text_steps": 2,
    "image_steps": 2,
    "num_inference_steps": 3,
    "num_trajectories": 2,
    "num_images": 3,
    "refresh_every": 2,
    "lr": 1e-3,
    "image_guidance_scale": 2.0,
}


class RandomProjection(nn.Module):
    """An encoder of images of which nothing is learned: a fixed projection of all pixels."""

    def __init__(self, side, width):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(width, 3 * side * side, generator=generator) / (3 * side * side) ** 0.5
        self.weight = nn.Parameter(weight, requires_grad=False)

    @property
    def device(self):
        return self.weight.device

    @property
    def dtype(self):
        return self.weight.dtype

    def forward(self, pixels):
        return SimpleNamespace(image_embeds=pixels.flatten(1) @ self.weight.T)


def seeing(pipe, side, width=24):
    """Give `pipe` eyes and take its pictures to be of `side` pixels."""
    from transformers import CLIPImageProcessor

    pipe.image_encoder = RandomProjection(side, width)
    pipe.feature_extractor = CLIPImageProcessor(size=side, crop_size=side, resample=0)
    return pipe


def loaded(pipe, side=32, seed=0):
    """Give `pipe` an adapter as `pipe.load_ip_adapter` leaves it, barely trained."""
    pictures = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed))
    config = ImagePromptsConfig(num_steps=1, batch_size=2)
    adapter, _ = train_image_prompts(
        seeing(pipe, side), pictures, ["a cat", "a dog"], config, seed=seed, progress=False
    )
    put_on(pipe, adapter)
    return pipe


def put_on(pipe, adapter):
    tensors = adapter.to_tensors()
    parts = {
        part: {k.removeprefix(part + "."): v for k, v in tensors.items() if k.startswith(part)}
        for part in ("image_proj", "ip_adapter")
    }
    pipe.load_ip_adapter(parts, subfolder="", weight_name="", image_encoder_folder=None)


def erase(pipe, request=None, seed=0, **settings):
    eraser = CoErasing(CoErasingConfig(**{**QUICK, **settings}))
    return eraser.erase(pipe, request or ErasureRequest("cat"), seed=seed, progress=False)


# Maths


def test_refined_tokens_lie_in_the_convex_hull_of_the_text():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(3, 4, 16, generator=generator)
    text = torch.randn(1, 7, 16, generator=generator)
    weights = refinement_weights(image, text)
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4), rtol=0, atol=1e-6)
    torch.testing.assert_close(refined_tokens(image, text), weights @ text, rtol=0, atol=1e-6)
    score = (image[1, 2].double() @ text[0].T.double() / 4).exp()
    torch.testing.assert_close(weights[1, 2].double(), score / score.sum(), rtol=1e-5, atol=1e-7)


def test_an_image_that_is_a_token_of_the_text_points_at_it():
    text = 5 * torch.eye(6, 16)[None]
    weights = refinement_weights(text[:, 3:4], text)
    assert weights[0, 0].argmax() == 3 and weights[0, 0, 3] > 0.9


def test_contrast_of_pairs_by_hand():
    positive, negative = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, -5.0]])
    wanted = {"signed": [[-2.0, 3.0]], "absolute": [[2.0, 3.0]], "squared": [[4.0, 9.0]]}
    assert wanted.keys() == set(CONTRASTS)
    for kind, values in wanted.items():
        assert contrast(positive, negative, kind).tolist() == values


def test_blur_of_a_point_is_the_kernel_and_keeps_a_plain():
    point = torch.zeros(1, 2, 9, 9)
    point[0, 1, 4, 4] = 1
    blurred = gaussian_blur(point, 5)
    line = torch.tensor([math.exp(-(x**2) / (2 * 1.1**2)) for x in (-2, -1, 0, 1, 2)])
    kernel = torch.outer(line, line) / line.sum() ** 2
    torch.testing.assert_close(blurred[0, 1, 2:7, 2:7], kernel, rtol=0, atol=1e-6)
    assert blurred[0, 0].abs().max() == 0 and blurred[0, 1, 0].abs().max() == 0
    plain = torch.full((1, 1, 6, 6), 3.0)
    torch.testing.assert_close(gaussian_blur(plain, 3), plain)
    with pytest.raises(SelectionError, match="`kernel_size`"):
        gaussian_blur(plain, 13)


def test_without_negative_guidance_the_target_is_the_unconditional_output():
    pipe = tiny_pipeline()
    denoiser = Denoiser.from_pipeline(pipe)
    noisy, t = (
        torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
        torch.tensor([500]),
    )
    with torch.no_grad():
        concept, empty = (encode_conditions(pipe, [text]) for text in ("cat", ""))
        first, second = (denoiser.predict(noisy, t, states).raw for states in (concept, empty))
        loss = co_erasing_loss(denoiser, denoiser, noisy, t, concept, empty, 0.0)
        full = co_erasing_loss(denoiser, denoiser, noisy, t, concept, empty, 1.0)
    assert loss == (first - second).square().mean()
    torch.testing.assert_close(full, 4 * loss)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_without_image_it_is_the_loss_of_esd(prediction_type):
    pipe = tiny_pipeline(prediction_type)
    parameters = trainable_parameters(pipe.unet, "esd-x")
    teacher = Denoiser(frozen_teacher(pipe.unet, parameters), pipe.scheduler)
    with torch.no_grad():
        next(iter(parameters.values())).mul_(1.5)
        concept, empty = (encode_conditions(pipe, [text]) for text in ("cat", ""))
    generator = torch.Generator().manual_seed(0)
    noisy, t = torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([500])
    student = Denoiser.from_pipeline(pipe)
    with torch.no_grad():
        ours = co_erasing_loss(student, teacher, noisy, t, concept, empty, 0.8)
        esd = esd_loss(student, teacher, noisy, t, concept, empty, empty, 0.8)
    torch.testing.assert_close(ours, esd)


class NothingClean(nn.Module):
    """Predicts a clean latent of zeros."""

    config = SimpleNamespace(in_channels=4, sample_size=16)

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        return (torch.zeros_like(sample),)


def test_latents_have_the_variance_of_their_timestep_in_the_correct_order_only():
    """With clean latents of zeros, x_t is sigma_t times noise: its variance is 1 - abar_t."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type="sample", clip_sample=False)
    denoiser = Denoiser(NothingClean(), scheduler)
    states = PromptStates(torch.zeros(1, 2, 8))
    common = {"num_trajectories": 8, "num_inference_steps": 10}
    bank = TrajectoryBank.collect(
        denoiser,
        scheduler,
        states,
        states,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        **common,
    )
    legacy = legacy_bank(denoiser, states, generator=torch.Generator().manual_seed(0), **common)

    def errors(drawn):
        wanted = 1 - denoiser.alphas_cumprod[drawn.t]
        found = drawn.noisy.flatten(1).var(1)
        steps = [drawn.t // 100 == k for k in range(1, 10)]
        return torch.stack([(found[s].mean() / wanted[s].mean() - 1).abs() for s in steps])

    assert errors(bank).max() < 0.05
    assert errors(legacy)[:5].min() > 0.2
    assert legacy.t.shape == bank.t.shape and set((legacy.t // 100).tolist()) == set(range(10))


# What is trained and what comes out


@pytest.mark.parametrize("build", [tiny_pipeline, tiny_xl_pipeline])
def test_the_result_is_of_the_plain_unet_and_the_adapter_stays_bit_identical(build, tmp_path):
    plain = fingerprint(build().unet)
    pipe = loaded(build())
    before = {part: fingerprint(getattr(pipe, part)) for part in ("unet", "image_encoder", "vae")}
    processors = dict(pipe.unet.attn_processors)
    erasure = erase(pipe)
    assert {part: fingerprint(getattr(pipe, part)) for part in before} == before
    assert all(pipe.unet.attn_processors[path] is part for path, part in processors.items())
    assert set(erasure.delta.deltas["unet"]) <= set(plain)
    assert len(erasure.history) == 4
    fresh = build()
    erasure.save(tmp_path / "erasure")
    with Erasure.load(tmp_path / "erasure").apply(fresh):
        after = fingerprint(fresh.unet)
        assert after.keys() == plain.keys() and after != plain
    assert fingerprint(fresh.unet) == plain


def test_text_only_output_of_the_result_is_that_at_image_scale_zero():
    pipe = loaded(tiny_pipeline())
    erasure = erase(pipe)
    noisy, t = (
        torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
        torch.tensor([300]),
    )
    with torch.no_grad():
        states = encode_conditions(pipe, ["a cat"])
    plain = tiny_pipeline()
    with torch.no_grad(), erasure.apply(plain):
        wanted = Denoiser.from_pipeline(plain).predict(noisy, t, states).raw
        adapter = ImagePrompts.of(pipe)
        tokens = adapter.tokens(torch.randn(2, 24))
        with adapter.attached(plain.unet, 77) as unet:
            for processor in adapter.processors.values():
                processor.scale = [0.0]
            scaled = Denoiser(unet, plain.scheduler).predict(noisy, t, with_image(states, tokens))
    torch.testing.assert_close(scaled.raw, wanted, rtol=0, atol=1e-6)


def test_a_saved_adapter_serves_instead_of_a_loaded_one(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    pipe = loaded(tiny_pipeline())
    settings = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            **settings, num_attention_heads=2, image_size=32, patch_size=8, projection_dim=24
        )
    )
    adapter = ImagePrompts.of(pipe)
    ImagePrompts(adapter.processors, adapter.projection, encoder, None).save(
        tmp_path / "adapter", torch.float32
    )
    assert (tmp_path / "adapter" / ADAPTER_FILE).is_file()
    erasure = erase(tiny_pipeline(), adapter=str(tmp_path / "adapter"))
    assert erasure.delta.meta.settings["adapter"] == str(tmp_path / "adapter")


def test_the_text_stage_can_be_left_out():
    assert len(erase(loaded(tiny_pipeline()), text_steps=0).history) == 2


def test_settings_of_the_images_change_the_image_stage():
    pipe = loaded(tiny_pipeline())
    request = ErasureRequest("cat", images=[torch.rand(3, 40, 40) for _ in range(2)])
    runs = {
        "plain": erase(pipe),
        "raw": erase(pipe, refine=False),
        "joint": erase(pipe, uncond="joint"),
        "sharp": erase(pipe, blur=0),
        "pairs": erase(pipe, contrast="signed"),
        "mean": erase(pipe, contrast="absolute", average_pairs=True),
        "given": erase(pipe, request),
        "statistics": erase(pipe, legacy_norm=True),
        "style": erase(pipe, ErasureRequest("cat", kind="style")),
    }
    assert len({run.history[-1] for run in runs.values()}) == len(runs)
    assert len({run.history[0] for name, run in runs.items() if name != "sharp"}) == 1


def test_same_seed_gives_identical_weights():
    pipe = loaded(tiny_pipeline())
    first, second, other = (erase(pipe, seed=seed) for seed in (1, 1, 2))
    for name, change in first.delta.deltas["unet"].items():
        assert torch.equal(change, second.delta.deltas["unet"][name])
    assert first.history == second.history != other.history


def test_pipelines_without_adapter_are_told_the_way_out(pipe):
    with pytest.raises(PipelineError, match=r"has no IP-Adapter.*load_ip_adapter"):
        erase(pipe)


def test_given_images_make_no_pairs():
    with pytest.raises(ImageError, match="`contrast` needs pairs"):
        erase(
            loaded(tiny_pipeline()),
            ErasureRequest("cat", images=[torch.rand(3, 32, 32)]),
            contrast="signed",
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"eta": -1},
        {"blur": 4},
        {"image_steps": 0},
        {"uncond": "image"},
        {"contrast": "cosine"},
        {"image_trainable": "full"},
        {"templates": ()},
    ],
)
def test_bad_settings_are_named(settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}`"):
        CoErasingConfig(**settings)
