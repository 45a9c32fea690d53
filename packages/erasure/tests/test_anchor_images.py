"""Anchor images: prompts and their pairs, versions of images, masks, and what is computed once."""

import pytest
import torch

from unweave.diffusion_core.errors import PromptError, SelectionError
from unweave.diffusion_core.latents import encode_images
from unweave.diffusion_core.pipelines import generate
from unweave.diffusion_core.prompts import OBJECT_TEMPLATES, encode_conditions, encode_prompts
from unweave.diffusion_core.testing import tiny_xl_pipeline
from unweave.erasure.anchor_images import (
    STYLE_ANCHOR_PROMPTS,
    STYLE_PAIRS,
    UNSAFE_PAIRS,
    AnchorImagesConfig,
    anchor_pairs,
    anchor_prompts,
    latent_mask,
    paired_prompt,
    random_view,
)
from unweave.erasure.protocol import ErasureRequest

OBJECT = ErasureRequest("cat", replacement="dog")
STYLE = ErasureRequest("monet", replacement="painting", kind="style")
QUICK = {"num_images": 3, "views": 2, "num_inference_steps": 2}


def quick_pairs(pipe, request=OBJECT, seed=0, **settings):
    return anchor_pairs(pipe, request, AnchorImagesConfig(**{**QUICK, **settings}), seed=seed)


def views(count, size=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.ones(3, size, size)
    return [random_view(image, generator) for _ in range(count)]


def test_prompts_name_the_anchor():
    config = AnchorImagesConfig()
    assert len(anchor_prompts(OBJECT, config)) == len(OBJECT_TEMPLATES)
    assert anchor_prompts(STYLE, config)[0] == STYLE_ANCHOR_PROMPTS[0].format("painting")
    given = AnchorImagesConfig(anchor_prompts=("a dog", "one {}"))
    assert anchor_prompts(OBJECT, given) == ["a dog", "one dog"]


def test_target_takes_the_anchors_place_as_a_whole_word():
    assert paired_prompt("Dog and hotdog", "dog", "cat") == "cat and hotdog"
    assert paired_prompt("a dog", "dog", r"c\1t") == r"a c\1t"
    with pytest.raises(PromptError, match="does not name the anchor 'dog'"):
        paired_prompt("a hotdog", "dog", "cat")


def test_templates_of_styles_and_unsafe_content():
    texts = [paired_prompt("a boat", "painting", "monet", text) for text in STYLE_PAIRS]
    assert texts == ["a boat, in the style of monet", *["in monet's style, a boat"] * 2]
    assert paired_prompt("a boat", "", "blood", UNSAFE_PAIRS[0]) == "blood, a boat"


@pytest.mark.parametrize("replacement", [None, " "])
def test_missing_anchor_is_an_error_that_says_what_to_give(pipe, replacement):
    with pytest.raises(PromptError, match=r'`replacement`.*"painting" for the style'):
        quick_pairs(pipe, ErasureRequest("monet", replacement=replacement, kind="style"))


def test_latents_and_states_are_those_of_the_pipeline(pipe):
    pairs = quick_pairs(pipe, augment=False, anchor_prompts=("a {}", "one {}"))
    assert pairs.anchor_prompts == ("a dog", "a dog", "one dog", "one dog", "a dog", "a dog")
    assert pairs.target_prompts == ("a cat", "a cat", "one cat", "one cat", "a cat", "a cat")
    assert len(pairs.states.hidden_states) == 4 and bool((pairs.mask == 1).all())
    batch = pairs.batch(len(pairs), seed=0, step=0)
    images = generate(
        pipe, ["a dog", "one dog", "a dog"], seeds=[0, 1, 2], num_inference_steps=2,
        guidance_scale=6.0,
    )  # fmt: skip
    with torch.no_grad():
        means = encode_images(pipe.vae, images * 2 - 1, None)
        spread = pipe.vae.config.scaling_factor * pipe.vae.encode(images * 2 - 1).latent_dist.std
        states = encode_prompts(pipe, ["a dog", "one dog", "a cat", "one cat"])
    drawn = (pairs.latents - means.repeat_interleave(2, 0)) / spread.repeat_interleave(2, 0)
    assert abs(drawn.mean()) < 0.1 and 0.9 < drawn.std() < 1.1
    for row in range(len(batch.latents)):
        number = int((pairs.latents == batch.latents[row]).flatten(1).all(1).nonzero())
        assert torch.equal(batch.whole[row], pairs.whole[number // 2])
        is_one = int(pairs.anchor_prompts[number] == "one dog")
        torch.testing.assert_close(batch.anchor.hidden_states[row], states[is_one])
        torch.testing.assert_close(batch.target.hidden_states[row], states[2 + is_one])


def test_batches_go_through_all_pairs(pipe):
    pairs = quick_pairs(pipe)
    seen = torch.cat([pairs.batch(4, seed=1, step=step).latents for step in range(2)])
    assert len(seen) == len(pairs) == len(seen.flatten(1).unique(dim=0))


def test_several_targets_take_turns(pipe):
    request = ErasureRequest("cat; fox ;owl", replacement="dog")
    pairs = quick_pairs(pipe, request, views=3, anchor_prompts=("{}",), augment=False)
    assert pairs.target_prompts == ("cat", "fox", "owl", "fox", "owl", "cat", "owl", "cat", "fox")


def test_styles_are_paired_by_both_templates_and_not_augmented(pipe):
    pairs = quick_pairs(pipe, STYLE, num_images=2, views=30, anchor_prompts=("a {}",))
    first = sum(text == "a painting, in the style of monet" for text in pairs.target_prompts)
    second = sum(text == "in monet's style, a painting" for text in pairs.target_prompts)
    assert first + second == 60 and 10 <= first <= 30
    assert bool((pairs.mask == 1).all())


def test_augmented_objects_say_so_in_the_targets_prompt_only(pipe):
    pairs = quick_pairs(pipe, views=20, anchor_prompts=("a {}",))
    prefixes = {text.removesuffix("a cat") for text in pairs.target_prompts}
    assert prefixes == {"", "a far away ", "very small ", "zoomed in ", "close up "}
    assert set(pairs.anchor_prompts) == {"a dog"}
    far = [text.startswith(("a far", "very")) for text in pairs.target_prompts]
    assert pairs.mask[torch.tensor(far)].mean() < 0.5
    assert pairs.whole.shape == (3, *pairs.latents.shape[1:])


def test_sizes_of_versions_follow_the_recipe():
    shown = views(600)
    sizes = torch.tensor([view.mask.sum().sqrt().item() for view in shown])
    near = torch.tensor([view.prefix in ("zoomed in ", "close up ") for view in shown])
    far = torch.tensor([view.prefix in ("a far away ", "very small ") for view in shown])
    assert 0.28 < near.float().mean() < 0.40
    assert bool((sizes[near] == 60).all()) and bool((sizes[far] < 36).all())
    assert sizes.min() >= 20 and bool((sizes[~near & ~far] >= 36).all())
    assert 0.33 < (far.sum() / (~near).sum()) < 0.47


def test_content_lies_where_the_mask_says():
    for view in views(50):
        inside = view.mask.bool().expand(3, -1, -1)
        assert bool((view.image[inside] > 0.99).all()) and bool((view.image[~inside] == 0.5).all())


def test_larger_versions_show_a_part_of_the_image():
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, 60).expand(3, 60, 60)
    for _ in range(20):
        view = random_view(ramp, generator)
        if view.prefix in ("zoomed in ", "close up "):
            seen = (view.image[0, 30, -1] - view.image[0, 30, 0]).item()
            assert 1 / 1.45 < seen < 1 / 1.15


def test_latent_mask_leaves_out_what_touches_the_border():
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 2:15, 4:16] = 1
    expected = torch.zeros(1, 1, 8, 8)
    expected[..., 2:6, 3:8] = 1
    assert torch.equal(latent_mask(mask, 8), expected)
    assert torch.equal(latent_mask(torch.ones(1, 1, 16, 16), 8), torch.ones(1, 1, 8, 8))


def test_latent_mask_is_never_empty():
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:8, 4:8] = 1
    assert latent_mask(mask, 8).sum() == 4


def test_same_seed_gives_the_same_pairs(pipe):
    first, second, other = (quick_pairs(pipe, seed=seed) for seed in (0, 0, 7))
    assert torch.equal(first.latents, second.latents)
    assert first.target_prompts == second.target_prompts
    assert not torch.equal(first.latents, other.latents)


def test_pooled_states_of_xl_are_kept():
    pipe = tiny_xl_pipeline()
    pairs = quick_pairs(pipe, num_images=1, views=1, augment=False, anchor_prompts=("a {}",))
    wanted = encode_conditions(pipe, ["a cat"])
    torch.testing.assert_close(pairs.batch(1, 0, 0).target.pooled, wanted.pooled.detach())


@pytest.mark.parametrize(
    "settings",
    [
        {"num_images": 0},
        {"views": 0},
        {"guidance_scale": -1.0},
        {"anchor_prompts": ()},
        {"anchor_prompts": ("{} and {}",)},
        {"pair_templates": ("{target} alone",)},
    ],
)
def test_bad_settings_are_named(settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}`"):
        AnchorImagesConfig(**settings)


def test_empty_pair_templates_mean_replacing():
    assert AnchorImagesConfig(pair_templates=()).pair_templates == ()
    with pytest.raises(SelectionError, match="once each"):
        AnchorImagesConfig(pair_templates=("{anchor} {anchor} {target}",))
