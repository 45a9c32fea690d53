"""Anagram-MTL: the baseline, the record, what the scorer gets, and bad input."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from unweave.attention_tools import (
    AVERAGING,
    AnagramConfig,
    AnagramMTL,
    AttentionError,
    MapError,
    TokenError,
    View,
    ViewError,
    get_view,
)
from unweave.attention_tools.mixing import balancing_weights
from unweave.attention_tools.scores import CLIPScorer
from unweave.emoji_world import load_clip

PROMPTS = ("a painting of a red fox", "a painting of an old tree")
SIDE = 32


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def steady_scorer(*scores: float):
    def score(views, t, prompts):
        return torch.diag(torch.tensor(scores))

    return score


def run(pipe, config, views=("identity", "flip"), prompts=PROMPTS, scorer=None, seed=0, **more):
    arguments = {"num_inference_steps": 4, "guidance_scale": 3.0, **more}
    maker = AnagramMTL(pipe, config, scorer=scorer or steady_scorer(0.3, 0.2))
    return maker(list(prompts), list(views), generator=seeded(seed), **arguments)


def averaged(pipe, views, prompts, seed, steps, guidance):
    """Visual anagrams by their definition: the mean of guided noises, view after view."""
    pipe.scheduler.set_timesteps(steps)
    generator = seeded(seed)
    x = torch.randn(1, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    text, empty = pipe.encode_prompt(list(prompts), True, device="cpu")
    for t in pipe.scheduler.timesteps:
        noises, variances = [], []
        for k, view in enumerate(views):
            with torch.no_grad():
                seen = view.view(x)
                plain = pipe.unet(seen, t, encoder_hidden_states=empty[k : k + 1]).sample
                prompted = pipe.unet(seen, t, encoder_hidden_states=text[k : k + 1]).sample
            guided = plain[:, :3] + guidance * (prompted[:, :3] - plain[:, :3])
            noises.append(view.inverse_view(guided))
            variances.append(view.inverse_map(prompted[:, 3:]))
        mixed = torch.cat([torch.stack(noises).mean(0), torch.stack(variances).mean(0)], 1)
        x = pipe.scheduler.step(mixed, t, x, generator=generator).prev_sample
    return (x / 2 + 0.5).clamp(0, 1).float()


@pytest.mark.parametrize("second", ("flip", "rotate_cw", "negate", "jigsaw"))
def test_with_everything_off_it_is_the_average_of_views(pixel_pipe, second):
    views = [get_view("identity"), get_view(second)]
    ours = run(pixel_pipe, AVERAGING, views)
    theirs = averaged(pixel_pipe, views, PROMPTS, 0, 4, 3.0)
    torch.testing.assert_close(ours.pixels, theirs, atol=1e-6, rtol=0)


def test_one_identity_view_is_the_plain_pixel_pipeline(pixel_pipe):
    theirs = pixel_pipe(
        PROMPTS[0], num_inference_steps=4, guidance_scale=3.0, generator=seeded(1), output_type="pt"
    ).images
    for config in (AVERAGING, AnagramConfig()):
        ours = run(pixel_pipe, config, ["identity"], PROMPTS[:1], seed=1)
        torch.testing.assert_close(
            ours.pixels, (theirs / 2 + 0.5).clamp(0, 1).float(), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("guidance", (1.0, 4.0))
def test_one_identity_view_is_the_plain_latent_pipeline(pipe, guidance):
    prompt, settings = "a cat face", {"num_inference_steps": 3, "guidance_scale": guidance}
    theirs = pipe(prompt, generator=seeded(2), output_type="pt", **settings).images
    ours = run(pipe, AnagramConfig(), ["identity"], [prompt], seed=2, **settings)
    torch.testing.assert_close(ours.pixels, theirs, atol=1e-5, rtol=0)


def test_learning_rate_zero_is_no_anti_segregation(pixel_pipe):
    off = run(pixel_pipe, AnagramConfig(anti_segregation=False))
    zero = run(pixel_pipe, AnagramConfig(lr=0.0))
    on = run(pixel_pipe, AnagramConfig())
    assert torch.equal(zero.pixels, off.pixels)
    assert not torch.equal(on.pixels, off.pixels)


def test_record_tells_every_step_and_is_json(pixel_pipe):
    made = run(pixel_pipe, AnagramConfig(), num_images=2)
    record = json.loads(json.dumps(made.record))
    assert record["prompts"] == list(PROMPTS)
    assert record["views"] == ["identity", "flip"]
    assert record["concepts"] == ["fox", "tree"]
    assert record["seeds"] == [0]
    steps = record["steps"]
    assert [step["L"] is None for step in steps] == [False, False, False, True]
    for index, step in enumerate(steps):
        weights = balancing_weights(torch.tensor([0.3, 0.2]), index, 4)
        torch.testing.assert_close(torch.tensor(step["alpha"]), weights.expand(2, 2))
        torch.testing.assert_close(torch.tensor(step["s"]), torch.tensor([[0.3, 0.2]] * 2))
        assert len(step["c"]) == 2 and all(1 <= c <= 10 for c in step["c"])


def test_images_and_strip(pixel_pipe):
    made = run(pixel_pipe, AVERAGING, num_images=2)
    assert [image.size for image in made.images] == [(SIDE, SIDE)] * 2
    assert made.strip(1).size == (2 * SIDE, SIDE)
    torch.testing.assert_close(made.seen()[1], made.pixels.flip(-2))


def test_images_of_a_batch_are_those_made_alone(pixel_pipe):
    maker = AnagramMTL(pixel_pipe, scorer=steady_scorer(0.3, 0.2))
    settings = {"views": ["identity", "flip"], "num_inference_steps": 3}
    both = maker(PROMPTS, generator=[seeded(0), seeded(1)], num_images=2, **settings)
    alone = maker(PROMPTS, generator=seeded(1), **settings)
    torch.testing.assert_close(both.pixels[1], alone.pixels[0], atol=1e-4, rtol=1e-4)


def test_equal_views_are_not_taken_for_guidance(pixel_pipe):
    made = run(pixel_pipe, AnagramConfig(), ["identity", "identity"])
    assert made.record["steps"][0]["L"] is not None


def test_the_pipeline_is_left_as_it_was(pixel_pipe):
    processors = pixel_pipe.unet.attn_processors
    run(pixel_pipe, AnagramConfig())
    after = pixel_pipe.unet.attn_processors
    assert all(after[name] is processor for name, processor in processors.items())
    assert all(parameter.requires_grad for parameter in pixel_pipe.unet.parameters())


def test_three_views_of_latents_with_an_ordinary_clip(pipe):
    clip, middle, given = load_clip(), (0.5, 0.5, 0.5), []
    inner = CLIPScorer(clip.model, clip.tokenizer, mean=middle, std=middle)

    def scorer(views, t, prompts):
        given.append(views)
        return inner(views, t, prompts)

    prompts = ["a cat face", "a rocket", "a pizza"]
    made = run(pipe, AnagramConfig(), ["identity", "flip", "rotate_cw"], prompts, scorer)
    assert made.pixels.shape == (1, 3, 64, 64)
    assert given[0].shape == (3, 3, 64, 64)
    assert min(float(views.min()) for views in given) >= -1
    assert [step["L"] is None for step in made.record["steps"]] == [False, False, False, True]
    text = clip.text_features(prompts)
    wanted = clip.image_features(given[0] / 2 + 0.5) @ text.T
    torch.testing.assert_close(inner(given[0], 0.0, prompts), wanted, atol=1e-5, rtol=1e-5)


def test_noisy_views_are_given_when_asked_for(pixel_pipe):
    given = []

    def scorer(views, t, prompts):
        given.append((views, t))
        return torch.full((2, 2), 0.2)

    run(pixel_pipe, AnagramConfig(score_on="noisy"), scorer=scorer)
    noise = torch.randn(1, 3, SIDE, SIDE, generator=seeded(0), dtype=torch.float64)
    assert torch.equal(given[0][0][0], noise[0])
    assert torch.equal(given[0][0][1], noise[0].flip(-2))
    assert given[0][1] == float(pixel_pipe.scheduler.timesteps[0])


def test_absent_concept_is_named(pixel_pipe):
    with pytest.raises(TokenError, match="'bear' is not among the words"):
        run(pixel_pipe, AnagramConfig(), concepts=["fox", "bear"])
    with pytest.raises(TokenError, match="2 prompts need as many"):
        run(pixel_pipe, AnagramConfig(), concepts=["fox"])


def test_balancing_without_a_scorer_says_so(pixel_pipe):
    with pytest.raises(AttentionError, match=r"needs a `scorer`.*balancing=False"):
        AnagramMTL(pixel_pipe)


def test_other_pipelines_are_refused():
    with pytest.raises(AttentionError, match="SimpleNamespace has no `unet`"):
        AnagramMTL(SimpleNamespace(), AVERAGING)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rectification": "rank"}, "rectification"),
        ({"score_on": "x0"}, "score_on"),
        ({"smallest_score": 0.0}, "smallest_score"),
        ({"inner_steps": 0}, "inner_steps"),
    ],
)
def test_settings_are_checked(settings, named):
    with pytest.raises(AttentionError, match=f"`{named}`"):
        AnagramConfig(**settings)


def test_prompts_and_views_must_pair(pixel_pipe):
    with pytest.raises(AttentionError, match="of one length"):
        run(pixel_pipe, AVERAGING, ["identity"])
    with pytest.raises(AttentionError, match="of one length"):
        AnagramMTL(pixel_pipe, AVERAGING)("fox", ["flip"])


def test_maps_that_no_layer_has_are_named(pixel_pipe):
    with pytest.raises(MapError, match=r"maps of \(5, 5\).*`map_resolution`"):
        run(pixel_pipe, AnagramConfig(map_resolution=5))


def test_wrong_scores_are_named(pixel_pipe):
    with pytest.raises(AttentionError, match=r"cosines \(2, 2\)"):
        run(pixel_pipe, AnagramConfig(), scorer=lambda *_: torch.ones(2))


def test_view_that_fits_no_image_of_the_pipeline_is_named(pixel_pipe):
    def turned(x):
        return x.flip(-1) if x.shape[-1] == 64 else x[..., :1] * x

    with pytest.raises(ViewError, match=r"'mine' cannot be used on 32x32"):
        run(pixel_pipe, AVERAGING, ["identity", View("mine", turned, turned)])
