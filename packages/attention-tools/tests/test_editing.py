"""Edited attention: words dropped, reweighted, kept to regions, and prompt-to-prompt."""

from __future__ import annotations

import math

import pytest
import torch

from unweave.attention_tools import (
    AttentionError,
    MapError,
    TokenError,
    capture_attention,
    find_tokens,
    intercept_attention,
    select_layers,
)
from unweave.attention_tools.editing import (
    PromptToPrompt,
    PromptToPromptConfig,
    edit_attention,
    token_mapping,
)
from unweave.emoji_world.world import BACKGROUNDS

PROMPT = "a cat face and a rocket on a red background"
SHORT = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}
SOURCE, TARGET = "a cat face on a red background", "a dog face on a red background"


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_dropped_word_is_looked_at_by_nothing(pipe):
    words = find_tokens(pipe, PROMPT, ["cat face", "rocket"])
    with (
        edit_attention(pipe, PROMPT, drop=["rocket"]),
        capture_attention(pipe, tokens=words) as maps,
    ):
        dropped = pipe(PROMPT, generator=seeded(0)[0], **SHORT).images
    assert maps.select(token="rocket").aggregate().abs().max() == 0
    assert maps.select(token="cat face").aggregate().min() > 0
    plain = pipe(PROMPT, generator=seeded(0)[0], **SHORT).images
    assert not torch.allclose(dropped, plain, atol=1e-3)


def explicit(pipe, change, prompt=PROMPT):
    """Latents with maps of the conditional half made explicitly and changed by `change`."""

    def handler(call):
        maps = (call.q @ call.k.mT * (call.scale or call.q.shape[-1] ** -0.5)).softmax(-1)
        part = call.conditional
        maps[part] = change(maps[part], call.grid)
        return maps @ call.v

    with intercept_attention(pipe, select_layers(pipe), handler):
        return pipe(prompt, generator=seeded(0)[0], **SHORT).images


def test_reweighting_multiplies_the_maps_of_a_word(pipe):
    positions = list(find_tokens(pipe, PROMPT, ["cat face"]).positions[0])

    def change(maps, _grid):
        maps[..., positions] *= 2.5
        return maps

    with edit_attention(pipe, PROMPT, reweight={"cat face": 2.5}):
        ours = pipe(PROMPT, generator=seeded(0)[0], **SHORT).images
    torch.testing.assert_close(ours, explicit(pipe, change), atol=1e-4, rtol=1e-4)


def test_factors_of_one_change_nothing(pipe):
    with edit_attention(pipe, PROMPT, reweight={"rocket": 1.0}):
        ours = pipe(PROMPT, generator=seeded(0)[0], **SHORT).images
    assert torch.equal(ours, pipe(PROMPT, generator=seeded(0)[0], **SHORT).images)


def test_a_word_is_looked_at_only_inside_its_region(pipe):
    right = torch.zeros(64, 64, dtype=torch.bool)
    right[:, 32:] = True
    words = find_tokens(pipe, PROMPT, ["cat face", "rocket"])
    with (
        edit_attention(pipe, PROMPT, region_masks={"rocket": right}),
        capture_attention(pipe, tokens=words) as maps,
    ):
        pipe([PROMPT] * 2, generator=seeded(0, 1), **SHORT)
    for side in (16, 8, 4):
        rocket = maps.select(token="rocket", resolution=side).aggregate()
        assert rocket[..., : side // 2].abs().max() == 0
    fine = maps.select(resolution=16)
    assert fine.select(token="rocket").aggregate()[..., 8:].min() > 0
    assert fine.select(token="cat face").aggregate().min() > 0


def test_floating_regions_are_added_to_scores(pipe):
    positions = list(find_tokens(pipe, PROMPT, ["rocket"]).positions[0])

    def change(maps, _grid):
        maps[..., positions] *= math.e**1.5
        return maps / maps.sum(-1, keepdim=True)

    with edit_attention(pipe, PROMPT, region_masks={"rocket": torch.full((8, 8), 1.5)}):
        ours = pipe(PROMPT, generator=seeded(0)[0], **SHORT).images
    torch.testing.assert_close(ours, explicit(pipe, change), atol=1e-4, rtol=1e-4)


def test_a_region_smaller_than_a_place_keeps_the_place_that_holds_it(pipe):
    point = torch.zeros(64, 64, dtype=torch.bool)
    point[10, 50] = True
    words = find_tokens(pipe, PROMPT, ["rocket"])
    with (
        edit_attention(pipe, PROMPT, region_masks={"rocket": point}),
        capture_attention(pipe, tokens=words, resolution=4) as maps,
    ):
        pipe(PROMPT, generator=seeded(0)[0], **SHORT)
    assert (maps.aggregate()[0, 0] > 0).nonzero().tolist() == [[0, 3]]


def test_edits_leave_everything_as_it_was_also_by_an_exception(pipe):
    before = dict(pipe.unet.attn_processors)
    with (
        pytest.raises(KeyboardInterrupt),
        edit_attention(pipe, PROMPT, drop=["rocket"]),
        PromptToPrompt(pipe).applied(SOURCE, TARGET),
    ):
        raise KeyboardInterrupt
    after = pipe.unet.attn_processors
    assert all(after[name] is processor for name, processor in before.items())
    assert not {"step", "set_timesteps"} & set(vars(pipe.scheduler))


def test_mistakes_are_named(pipe):
    for wrong, error, match in (
        ({"drop": ["dragon"]}, TokenError, "'dragon' is not among"),
        ({"reweight": {"rocket": math.inf}}, AttentionError, "finite factors"),
        ({"region_masks": {"rocket": torch.zeros(4, 4, dtype=torch.bool)}}, MapError, "is empty"),
        ({"region_masks": {"rocket": torch.ones(1, 4, 4)}}, MapError, r"\(H, W\)"),
        ({"region_masks": {"rocket": torch.ones(4, 4).int()}}, MapError, "boolean or floating"),
    ):
        with pytest.raises(error, match=match), edit_attention(pipe, PROMPT, **wrong):
            pass
    with pytest.raises(AttentionError, match="cross_steps"):
        PromptToPromptConfig(cross_steps=1.2)
    with pytest.raises(AttentionError, match="as many words"):
        PromptToPrompt(pipe)("a cat face", "a pizza", edit="replace")
    with pytest.raises(AttentionError, match='"replace" or "refine"'):
        token_mapping(pipe, "a cat", "a dog", "swap")
    with (
        pytest.raises(AttentionError, match="as many samples"),
        PromptToPrompt(pipe).applied(SOURCE, TARGET),
    ):
        pipe([SOURCE, TARGET, TARGET], **SHORT)


def test_word_swap_maps_each_word_to_the_word_in_its_place(pipe):
    mapping = token_mapping(pipe, "a cat face", "a dog face")
    assert torch.equal(mapping.weights, torch.eye(32))
    assert not mapping.own.any()


def test_a_word_of_more_tokens_shares_the_maps_of_its_partner(pipe):
    word = "zzxqv"
    pieces = len(find_tokens(pipe, f"a {word} face", [word]).positions[0])
    assert pieces > 1
    mapping = token_mapping(pipe, "a cat face", f"a {word} face", "replace")
    assert torch.equal(mapping.weights.sum(1), torch.ones(32))
    torch.testing.assert_close(
        mapping.weights[2, 2 : 2 + pieces], torch.full((pieces,), 1 / pieces)
    )
    assert mapping.weights[3, 2 + pieces] == 1
    assert mapping.weights[4, 3 + pieces] == 1
    back = token_mapping(pipe, f"a {word} face", "a cat face", "replace")
    assert torch.equal(back.weights[2 : 2 + pieces, 2], torch.ones(pieces))


def test_refining_gives_new_words_their_own_maps(pipe):
    mapping = token_mapping(pipe, "a cat on red", "a big cat on red")
    assert mapping.own.nonzero().flatten().tolist() == [2]
    pairs = [mapping.weights[at].nonzero().flatten().tolist() for at in range(1, 6)]
    assert pairs == [[1], [3], [4], [5], [6]]


@pytest.mark.parametrize("edit", ["replace", "refine"])
def test_injection_is_that_of_explicit_maps(pipe, edit):
    source, target = SOURCE, TARGET if edit == "replace" else "a blue cat face on a red background"
    mapping, positions = token_mapping(pipe, source, target, edit), [2]
    config = PromptToPromptConfig(cross_steps=0.5, self_steps=1.0)

    def handler(call):
        maps = (call.q @ call.k.mT * call.q.shape[-1] ** -0.5).softmax(-1)
        if call.layer.kind == "self":
            maps[3] = maps[2]
        else:
            if call.denoiser.step == 0:
                maps[3] = maps[2] @ mapping.weights + maps[3] * mapping.own
            maps[3][..., positions] *= 1.5
        return maps @ call.v

    layers = [*select_layers(pipe, "cross"), *select_layers(pipe, "self")]
    with intercept_attention(pipe, layers, handler):
        slow = pipe([source, target], generator=seeded(4, 4), **SHORT).images
    word = "dog" if edit == "replace" else "blue"
    ours = PromptToPrompt(pipe, config)(
        source, target, edit=edit, reweight={word: 1.5}, generator=seeded(4)[0], **SHORT
    ).images
    torch.testing.assert_close(ours, slow, atol=2e-4, rtol=1e-4)


def test_the_source_is_drawn_as_ever_and_without_injection_the_target_too(pipe):
    none = PromptToPrompt(pipe, PromptToPromptConfig(cross_steps=0.0, self_steps=0.0))
    plain = pipe([SOURCE, TARGET], generator=seeded(1, 1), **SHORT).images
    both = none(SOURCE, TARGET, generator=seeded(1)[0], **SHORT).images
    torch.testing.assert_close(both, plain, atol=1e-5, rtol=1e-5)
    injected = PromptToPrompt(pipe)(SOURCE, TARGET, generator=seeded(1)[0], **SHORT).images
    torch.testing.assert_close(injected[0], plain[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(injected[1], plain[1], atol=1e-2)


def test_two_images_of_one_pair_begin_from_the_same_noise(pipe):
    images = PromptToPrompt(pipe)(SOURCE, SOURCE, **SHORT).images
    torch.testing.assert_close(images[0], images[1], atol=1e-4, rtol=1e-4)


def object_masks(images, background="red"):
    """Where an image (n, 3, 64, 64) is not of the colour of its background."""
    colour = torch.tensor(BACKGROUNDS[background])[:, None, None] / 255
    return (images - colour).abs().amax(1) > 0.2


@pytest.fixture(scope="module")
def twelve_pairs(pipe):
    """Images of the source, of the target with injection and of the target alone."""
    arguments = {"num_inference_steps": 10, "guidance_scale": 4.0, "output_type": "pt"}
    seeds = range(12)
    both = PromptToPrompt(pipe)(SOURCE, TARGET, generator=seeded(*seeds), **arguments).images
    alone = pipe([TARGET] * 12, generator=seeded(*seeds), **arguments).images
    return both[:12], both[12:], alone


def test_with_injection_the_place_stays_closer_to_the_source(twelve_pairs):
    source, injected, alone = (object_masks(images) for images in twelve_pairs)

    def iou(masks):
        return (masks & source).sum((1, 2)) / (masks | source).sum((1, 2)).clamp(min=1)

    assert iou(injected).mean() > iou(alone).mean()
    assert (iou(injected) >= iou(alone)).float().mean() >= 0.7


def test_with_injection_the_picture_outside_the_object_stays(twelve_pairs):
    images, injected, alone = twelve_pairs
    outside = ~object_masks(images)

    def change(new):
        return ((new - images).abs().mean(1) * outside).sum((1, 2)) / outside.sum((1, 2))

    assert change(injected).mean() < change(alone).mean()


def test_the_swapped_word_appears(twelve_pairs, recogniser):
    _, injected, _ = twelve_pairs
    at = [recogniser.concepts.index(name) for name in ("cat face", "dog face")]
    cat, dog = recogniser.probabilities(injected)[:, at].mean(0)
    assert dog > cat
