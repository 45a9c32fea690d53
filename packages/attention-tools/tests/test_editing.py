"""Edited attention: words dropped, reweighted and kept to regions."""

from __future__ import annotations

import math

import pytest
import torch

from unweave.attention_tools import (
    AttentionError,
    MapError,
    TokenError,
    capture_attention,
    edit_attention,
    find_tokens,
    intercept_attention,
    select_layers,
)

PROMPT = "a cat face and a rocket on a red background"
SHORT = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}


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
    ):
        raise KeyboardInterrupt
    after = pipe.unet.attn_processors
    assert all(after[name] is processor for name, processor in before.items())


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
