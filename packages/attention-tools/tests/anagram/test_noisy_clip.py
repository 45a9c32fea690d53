"""The noise-aware CLIP: what it starts from, what noise it sees, and that learning helps."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler

from unweave.attention_tools import AnagramConfig, AnagramMTL, AttentionError
from unweave.attention_tools.noisy_clip import (
    NoisyCLIP,
    NoisyCLIPConfig,
    NoisyCLIPScorer,
    contrastive_loss,
    reduced,
    train_noisy_clip,
)
from unweave.emoji_world import load_clip

CAPTIONS = ("a cat face", "a rocket", "a pizza", "a cactus")
"""What the embedded texts know, each for one of four shapes."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def schedule():
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2")


@pytest.fixture(scope="module")
def clip():
    return load_clip()


def test_at_the_start_it_is_the_clip_it_came_from(clip):
    images = torch.rand(3, 3, 64, 64, generator=seeded(0))
    model = NoisyCLIP.of(clip.model, 1000).eval()
    with torch.no_grad():
        features = model(2 * images - 1, torch.tensor([0, 500, 999]))
    torch.testing.assert_close(features, clip.image_features(images), atol=1e-5, rtol=0)


def test_time_is_read_where_the_class_token_stands(clip):
    model = NoisyCLIP.of(clip.model, 10).eval()
    x, seen = torch.randn(2, 3, 64, 64, generator=seeded(0)), []
    with torch.no_grad():
        model.times.weight[7] = 1.0
        norm = model.tower.vision_model.pre_layrnorm
        with norm.register_forward_pre_hook(lambda _, given: seen.append(given[0])):
            for t in (0, 7):
                model(x, torch.full((2,), t))
    moved = seen[1] - seen[0]
    torch.testing.assert_close(moved[:, 0], torch.ones_like(moved[:, 0]), atol=1e-5, rtol=0)
    assert torch.equal(moved[:, 1:], torch.zeros_like(moved[:, 1:]))


def test_latents_are_read_by_as_many_patches(clip):
    model = NoisyCLIP.of(clip.model, 1000, channels=4, size=16)
    assert model.tower.config.patch_size == 2
    assert model(torch.randn(2, 4, 16, 16), torch.tensor([1, 2])).shape == (2, 128)
    with pytest.raises(AttentionError, match="`size` must be a multiple of 8 patches, got 20"):
        NoisyCLIP.of(clip.model, 1000, channels=4, size=20)


def test_loss_is_that_of_clip_with_equal_captions_shared():
    features = torch.randn(2, 3, 5, generator=seeded(0), dtype=torch.float64)
    images, texts = torch.nn.functional.normalize(features, dim=-1)
    captions, scale, total = ("a", "b", "a"), 7.0, 0.0
    for i in range(3):
        alike = [j for j in range(3) if captions[j] == captions[i]]
        rows = [scale * float(images[i] @ texts[j]) for j in range(3)]
        columns = [scale * float(images[j] @ texts[i]) for j in range(3)]
        for logits in (rows, columns):
            bottom = math.log(sum(math.exp(one) for one in logits))
            total += sum(bottom - logits[j] for j in alike) / len(alike) / 6
    same = torch.tensor([[a == b for a in captions] for b in captions]).double()
    assert float(contrastive_loss(images, texts, scale, same)) == pytest.approx(total)


@pytest.mark.parametrize("t", (300, 600, 900))
def test_larger_noisy_images_are_those_of_an_earlier_time(schedule, t):
    clean = torch.full((4, 3, 256, 256), 0.5)
    noise = torch.randn(clean.shape, generator=seeded(0))
    x, time = reduced(
        schedule.add_noise(clean, noise, torch.tensor(t)), t, 64, schedule.alphas_cumprod
    )
    share = float(schedule.alphas_cumprod[time])
    assert x.shape[-1] == 64
    assert time < t
    assert float(x.mean()) == pytest.approx(0.5 * share**0.5, abs=0.02)
    assert float(x.std()) == pytest.approx((1 - share) ** 0.5, abs=0.02)


def test_images_of_the_size_of_the_model_are_left(schedule):
    x = torch.randn(1, 3, 64, 64, generator=seeded(0))
    same, time = reduced(x, 700, 64, schedule.alphas_cumprod)
    assert time == 700 and torch.equal(same, x)


@pytest.mark.parametrize("shape", ((96, 96), (64, 128), (32, 32)))
def test_sizes_that_cannot_be_averaged_are_named(schedule, shape):
    with pytest.raises(AttentionError, match=f"multiples of 64, got {shape[0]}x{shape[1]}"):
        reduced(torch.zeros(1, 3, *shape), 5, 64, schedule.alphas_cumprod)


# Learning: four shapes under noise, by a tiny encoder


def shapes(seed, count=32):
    """Images (n, 3, 16, 16) of a circle or square, red or blue, somewhere, and their captions."""
    generator = seeded(seed)
    kinds = torch.randint(4, (count,), generator=generator)
    middle = torch.randint(5, 11, (count, 2), generator=generator)
    rows, columns = (torch.arange(16) - middle[:, k, None] for k in range(2))
    down, right = torch.broadcast_tensors(rows[:, :, None], columns[:, None])
    circle, square = down**2 + right**2 < 18, (down.abs() < 5) & (right.abs() < 5)
    inside = torch.where((kinds % 2 == 0)[:, None, None], circle, square)
    colours = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]])[kinds // 2]
    images = torch.where(inside[:, None], colours[:, :, None, None], torch.tensor(-0.2))
    return images, [CAPTIONS[kind] for kind in kinds]


@pytest.fixture(scope="module")
def small_clip(clip):
    """The embedded texts with a tiny image encoder that has learned nothing."""
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    vision |= {"num_hidden_layers": 2, "image_size": 16, "patch_size": 4}
    text = clip.model.config.text_config.to_dict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    known = clip.model.state_dict()
    for name, value in model.state_dict().items():
        if name.startswith("text_") or name == "logit_scale":
            value.copy_(known[name])
    return model.eval()


@pytest.fixture(scope="module")
def learned(small_clip, clip, schedule):
    """Encoders of one recipe, learned with noise and without."""
    config = NoisyCLIPConfig(steps=200, lr=3e-3)
    almost_clean = DDPMScheduler(trained_betas=[1e-9] * 1000)
    return {
        name: train_noisy_clip(small_clip, clip.tokenizer, scheduler, shapes, config)
        for name, scheduler in (("noisy", schedule), ("clean", almost_clean))
    }


def share_right(model, clip, schedule, t):
    """How often the caption is the nearest of the four, of new images at a time."""
    images, captions = shapes(10_000, 400)
    x = schedule.add_noise(images, torch.randn(images.shape, generator=seeded(1)), torch.tensor(t))
    with torch.no_grad():
        seen = model(x, torch.full((400,), t))
    nearest = (seen @ clip.text_features(list(CAPTIONS)).T).argmax(1)
    return sum(CAPTIONS[k] == caption for k, caption in zip(nearest, captions, strict=True)) / 400


def test_noise_aware_knows_noisy_images_better_than_the_same_without_noise(learned, clip, schedule):
    found = {
        name: [share_right(model, clip, schedule, t) for t in (0, 500, 999)]
        for name, model in learned.items()
    }
    assert found["clean"][0] > 0.95
    assert found["noisy"][0] > 0.9
    assert found["noisy"][1] > found["clean"][1] + 0.1
    assert abs(found["noisy"][2] - 0.25) < 0.1  # nothing is left to see


def test_learning_leaves_the_clip_and_is_the_same_again(small_clip, clip, schedule):
    before = {name: value.clone() for name, value in small_clip.state_dict().items()}
    made = [
        train_noisy_clip(small_clip, clip.tokenizer, schedule, shapes, NoisyCLIPConfig(steps=3))
        for _ in range(2)
    ]
    assert all(torch.equal(value, before[name]) for name, value in small_clip.state_dict().items())
    first, second = (model.state_dict() for model in made)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    start = NoisyCLIP.of(small_clip, 1000).state_dict()
    assert not torch.equal(
        first["tower.visual_projection.weight"], start["tower.visual_projection.weight"]
    )


def test_a_saved_encoder_is_the_same(learned, tmp_path):
    learned["noisy"].save(tmp_path / "clip")
    loaded = NoisyCLIP.load(tmp_path / "clip")
    x, t = torch.randn(2, 3, 16, 16, generator=seeded(0)), torch.tensor([3, 800])
    assert torch.equal(loaded(x, t), learned["noisy"](x, t))
    with pytest.raises(AttentionError, match=r"config.json is missing; `NoisyCLIP.save"):
        NoisyCLIP.load(tmp_path / "nowhere")


def test_it_scores_the_noisy_views_of_an_anagram(learned, small_clip, clip, schedule, pixel_pipe):
    scorer = NoisyCLIPScorer(learned["noisy"], small_clip, clip.tokenizer, schedule)
    made = AnagramMTL(pixel_pipe, AnagramConfig(score_on="noisy"), scorer=scorer)(
        ["a fox", "a tree"], ["identity", "flip"], num_inference_steps=3, generator=seeded(0)
    )
    x = torch.randn(1, 3, 32, 32, generator=seeded(0), dtype=torch.float64)
    views, t = torch.cat([x, x.flip(-2)]), made.record["steps"][0]["t"]
    expected = scorer(views, t, ["a fox", "a tree"])
    assert expected.shape == (2, 2)
    torch.testing.assert_close(
        torch.tensor(made.record["steps"][0]["s"])[0], expected.diagonal(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("settings", ({"steps": 0}, {"lr": 0.0}, {"weight_decay": -1.0}))
def test_settings_are_checked(settings):
    with pytest.raises(AttentionError, match="`steps` must be at least 1"):
        NoisyCLIPConfig(**settings)


def test_a_loss_that_is_not_finite_stops(small_clip, clip, schedule):
    def broken(step):
        return torch.full((4, 3, 16, 16), torch.nan), list(CAPTIONS)

    with pytest.raises(AttentionError, match="not finite at step 0"):
        train_noisy_clip(small_clip, clip.tokenizer, schedule, broken)
