"""Prompt-to-prompt: which maps tokens take, injection, and edits kept to a region."""

from __future__ import annotations

import pytest
import torch

from unweave.attention_tools import (
    AttentionError,
    LocalBlend,
    MapError,
    PromptToPrompt,
    PromptToPromptConfig,
    TokenError,
    find_tokens,
    intercept_attention,
    select_layers,
)
from unweave.attention_tools.prompt_to_prompt import blend_mask
from unweave.attention_tools.token_mapping import token_mapping
from unweave.emoji_world.world import BACKGROUNDS

SOURCE, TARGET = "a cat face on a red background", "a dog face on a red background"
SHORT = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_mistakes_are_named(pipe):
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


def test_a_blend_mask_is_the_union_of_both_words_grown_and_cut_at_a_share_of_the_maximum():
    source, target = torch.zeros(2, 1, 5, 5), torch.zeros(2, 1, 5, 5)
    source[0, 0, 0, 0], source[0, 0, 4, 4], target[0, 0, 2, 4] = 1.0, 0.29, 0.01
    source[1, 0, 2, 2] = 1e-3
    mask = blend_mask(source, target, (5, 5), widen=0)[:, 0]
    assert mask[0].nonzero().tolist() == [[0, 0], [2, 4]]
    assert mask[1].nonzero().tolist() == [[2, 2]]
    wide = blend_mask(source, None, (5, 5))[:, 0]
    assert wide[0].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert wide[1].sum() == 9
    assert blend_mask(source, None, (10, 10), widen=0).shape == (2, 1, 10, 10)


def blended(pipe, blend, seeds=(0,), steps=4, **settings):
    """Latents of pairs, and those after each step."""
    seen = []

    def keep(_pipe, _step, _timestep, own):
        seen.append(own["latents"])
        return {}

    arguments = {"num_inference_steps": steps, "guidance_scale": 4.0, "output_type": "latent"}
    out = PromptToPrompt(pipe, PromptToPromptConfig(**settings))(
        SOURCE,
        TARGET,
        blend=blend,
        generator=seeded(*seeds),
        callback_on_step_end=keep,
        **arguments,
    )
    return out.images, torch.stack(seen)


def test_outside_the_masks_latents_are_those_of_the_source_after_every_step(pipe):
    """The masks come here from maps made explicitly, of words before injection, averaged so far."""
    blend = LocalBlend(["cat face"], ["dog face"], resolution=16, threshold=0.6, widen=0)
    words = [
        list(find_tokens(pipe, prompt, words).positions[0])
        for prompt, words in ((SOURCE, blend.source), (TARGET, blend.target))
    ]
    recorded: dict[int, list[torch.Tensor]] = {}

    def look(call):
        if call.grid == (16, 16):
            maps = (call.q @ call.k.mT * call.q.shape[-1] ** -0.5).softmax(-1).mean(1)
            own = torch.stack([maps[2][:, words[0]].sum(-1), maps[3][:, words[1]].sum(-1)])
            recorded.setdefault(call.denoiser.step, []).append(own.unflatten(-1, (16, 16)))
        return call.proceed()

    with intercept_attention(pipe, select_layers(pipe), look):
        _, seen = blended(pipe, blend, cross_steps=0.5)
    means = torch.stack([torch.stack(recorded[step]).mean(0) for step in range(4)])
    so_far = means.cumsum(0) / torch.arange(1, 5).view(-1, 1, 1, 1)
    allowed = (so_far >= 0.6 * so_far.amax((-2, -1), keepdim=True)).any(1)
    assert 0.02 < allowed.float().mean() < 0.6
    for step, (source, target) in enumerate(seen):
        changed = (source != target).any(0)
        assert changed.any() and not (changed & ~allowed[step]).any(), step
        assert (changed == allowed[step]).float().mean() > 0.98, step


def test_a_blend_that_begins_late_leaves_the_steps_before(pipe):
    blend = LocalBlend(["cat face"], ["dog face"], resolution=16, threshold=0.6, widen=0, start=0.5)
    _, free = blended(pipe, None)
    _, late = blended(pipe, blend)
    torch.testing.assert_close(late[:2], free[:2], atol=0, rtol=0)
    assert not torch.equal(late[2], free[2])


def test_runs_in_one_block_and_pairs_of_one_batch_are_apart(pipe):
    blend = LocalBlend(["cat face"], ["dog face"], resolution=16, threshold=0.6)
    alone = [blended(pipe, blend, [seed], steps=2)[0] for seed in (0, 1)]
    draw = PromptToPrompt(pipe)
    with draw.applied(SOURCE, TARGET, blend=blend):
        for seed in (0, 1):
            own = pipe([SOURCE, TARGET], generator=seeded(seed, seed), **SHORT).images
            torch.testing.assert_close(own, alone[seed], atol=1e-4, rtol=1e-4)
    both, _ = blended(pipe, blend, [0, 1], steps=2)
    for seed in (0, 1):
        torch.testing.assert_close(both[seed::2], alone[seed], atol=1e-3, rtol=1e-3)


def test_mistakes_in_a_blend_are_named(pipe):
    for wrong, match in (
        ({"source": "cat", "target": []}, "list of words"),
        ({"source": [], "target": []}, "must name a word"),
        ({"threshold": 0.0}, "threshold"),
        ({"start": 1.0}, "start"),
        ({"widen": -1}, "widen"),
    ):
        with pytest.raises(AttentionError, match=match):
            LocalBlend(**{"source": ["cat face"], "target": ["dog face"], **wrong})
    with pytest.raises(TokenError, match="'dog face' is not among"):
        blended(pipe, LocalBlend(["dog face"], ["dog face"]))
    with pytest.raises(MapError, match="no cross-attention layer has the `resolution` 5"):
        blended(pipe, LocalBlend(["cat face"], ["dog face"], resolution=5))


def test_a_blend_swaps_the_object_and_keeps_the_background(pipe, recogniser):
    """The target also asks for a blue background, which six seeds of the plain edit give.

    The threshold is 0.75 instead of the paper's 0.3: no start token takes attention in the embedded
    model, so maps are flat, and nearly all places reach 0.3 of the maximum.
    """
    arguments = {"num_inference_steps": 10, "guidance_scale": 4.0, "output_type": "pt"}
    target = "a dog face on a blue background"
    blend = LocalBlend(["cat face"], ["dog face"], resolution=16, threshold=0.75)
    draw = PromptToPrompt(pipe, PromptToPromptConfig(cross_steps=0.3))
    red, blue = (torch.tensor(BACKGROUNDS[name]).view(3, 1, 1) / 255 for name in ("red", "blue"))
    red_share, dog = [], []
    for own in (None, blend):
        images = draw(SOURCE, target, blend=own, generator=seeded(*range(6)), **arguments).images
        away = [(images[6:] - colour).abs().mean(1) for colour in (red, blue)]
        red_share.append((away[0] < away[1]).float().mean((1, 2)))
        at = recogniser.concepts.index("dog face")
        dog.append(recogniser.probabilities(images[6:])[:, at].mean())
    assert red_share[0].max() < 0.4 and red_share[1].min() > 0.9
    assert min(dog) > 0.8
