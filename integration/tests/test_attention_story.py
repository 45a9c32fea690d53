"""A user erases a subject and looks at where the prompt's words look before and after."""

from __future__ import annotations

import pytest
import torch

from unweave.attention_tools import capture_attention, find_tokens, soft_iou
from unweave.diffusion_core import fingerprint, load_pipeline
from unweave.erasure import ErasureRequest, make_eraser

PROMPT = "a panda and a star on a purple background"


@pytest.fixture(scope="module")
def pipe():
    loaded = load_pipeline("emoji-world")
    loaded.set_progress_bar_config(disable=True)
    return loaded


def run(pipe, capture: bool = True):
    """Images of four seeds, and the maps of both words."""
    options = {
        "num_inference_steps": 10,
        "guidance_scale": 4.0,
        "output_type": "pt",
        "generator": [torch.Generator().manual_seed(seed) for seed in range(4)],
    }
    prompts = [PROMPT] * 4
    if not capture:
        return pipe(prompts, **options).images, None
    tokens = find_tokens(pipe, PROMPT, ["panda", "star"])
    with capture_attention(pipe, tokens=tokens) as maps:
        images = pipe(prompts, **options).images
    return images, maps.select(layer="up_blocks").aggregate()


def test_the_map_of_an_erased_word_changes_more_than_that_of_the_other(pipe):
    before = fingerprint(pipe.unet)
    _, maps = run(pipe)
    erasure = make_eraser("uce", "emoji-world").erase(
        pipe, ErasureRequest("panda", preserve=("star",))
    )
    with erasure.apply(pipe):
        plain, _ = run(pipe, capture=False)
        images, erased = run(pipe)
        assert torch.equal(plain, images)
    same = soft_iou(maps, erased).mean(0)
    assert same[0] < same[1]
    assert fingerprint(pipe.unet) == before
