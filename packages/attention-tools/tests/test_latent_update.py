"""Claims about the latent-update loop that guidance methods share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unweave.attention_tools.capture import capture_attention
from unweave.attention_tools.errors import GuidanceError
from unweave.attention_tools.guidance import DenoisingStep, guide_latents
from unweave.attention_tools.latent_update import (
    ConceptMaps,
    ConceptReader,
    LatentUpdate,
    find_resolution,
    step_sizes,
)
from unweave.attention_tools.tokens import find_concepts

PROMPT = "a cat face and a rocket"


def step(latents: Tensor, index: int = 0, count: int = 10) -> DenoisingStep:
    """A step of a denoiser whose maps are its latents."""
    return DenoisingStep(index, count, latents, lambda x: x)


def half_square(maps: Tensor) -> Tensor:
    return (maps**2).flatten(1).sum(1) / 2


def quick(pipe, prompts: str | list[str], seeds: list[int], **kwargs) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    usual = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}
    return pipe(prompts, generator=generators, **{**usual, **kwargs}).images


def test_one_step_is_alpha_times_the_gradient():
    z = torch.randn(3, 1, 4, 4)
    update = LatentUpdate(lambda forward: forward(), {"own": (0.5, half_square)}, lambda *_: 0.1)
    torch.testing.assert_close(update(step(z)), z - 0.05 * z)
    assert torch.allclose(update.record[0].losses["own"], half_square(z))


def test_losses_are_summed_with_their_weights():
    z = torch.randn(2, 1, 4, 4)
    losses = {"a": (1.0, half_square), "b": (3.0, lambda maps: maps.flatten(1).sum(1))}
    update = LatentUpdate(lambda forward: forward(), losses, lambda *_: 0.1)
    torch.testing.assert_close(update(step(z)), z - 0.1 * (z + 3))


def test_refinement_repeats_for_samples_that_are_behind_alone():
    z = torch.stack([torch.full((1, 2, 2), 0.1), torch.ones(1, 2, 2)])
    update = LatentUpdate(
        lambda forward: forward(),
        {"own": (1.0, half_square)},
        lambda *_: 0.1,
        targets={1: 1.0},
    )
    plain = update(step(z, 0))
    torch.testing.assert_close(plain, 0.9 * z)
    refined = update(step(z, 1))
    # 2 * 0.9^(2 n) falls to 1 after n = 4 steps; the step itself follows.
    torch.testing.assert_close(refined, z * torch.tensor([0.9, 0.9**5]).view(-1, 1, 1, 1))
    assert [seen.refinements for seen in update.record] == [0, 4]


def test_refinement_ends_after_its_limit():
    update = LatentUpdate(
        lambda forward: forward(),
        {"own": (1.0, half_square)},
        lambda *_: 0.0,
        targets={0: 0.0},
        max_refinement_steps=3,
    )
    with pytest.warns(UserWarning, match=r"step 0 ended after 3 updates .* 1 of 1 images above 0,"):
        update(step(torch.ones(1, 1, 2, 2)))
    assert update.record[0].refinements == 3


def test_a_loss_without_gradient_moves_nothing():
    z = torch.randn(1, 1, 2, 2)
    zeros = {"none": (1.0, lambda maps: maps.new_zeros(1))}
    assert torch.equal(LatentUpdate(lambda forward: forward(), zeros, lambda *_: 1.0)(step(z)), z)


def test_not_a_number_is_a_named_error():
    update = LatentUpdate(lambda forward: forward(), {"own": (1.0, half_square)}, lambda *_: 1.0)
    with pytest.raises(GuidanceError, match="not finite"):
        update(step(torch.full((1, 1, 2, 2), float("nan"))))


def test_an_update_larger_than_the_latents_warns_once():
    update = LatentUpdate(lambda forward: forward(), {"own": (1.0, half_square)}, lambda *_: 2.0)
    with pytest.warns(UserWarning, match="larger than the latents") as warned:
        update(step(torch.ones(1, 1, 2, 2), 0))
        update(step(torch.ones(1, 1, 2, 2), 1))
    assert len(warned) == 1


def test_step_sizes_follow_the_published_schedule():
    alpha = step_sizes(20.0, (1.0, 0.5))
    expected = 20 * torch.linspace(1, 0.5, 50).sqrt()
    torch.testing.assert_close(torch.tensor([alpha(i, 50) for i in range(50)]), expected)


def test_softmax_over_tokens_leaves_out_the_first_and_the_last(pipe):
    spans = find_concepts(pipe, PROMPT, ["cat face", "rocket"])
    recorded = torch.rand(1, 32, 8, 8) * 0.05
    own = ConceptMaps(spans, sigma=0.01)(recorded)
    expected = (100 * recorded[:, 1:-1]).softmax(1)
    torch.testing.assert_close(own[:, 0], (expected[:, 1] + expected[:, 2]) / 2)
    torch.testing.assert_close(own[:, 1], expected[:, 5])


def test_raw_maps_are_the_mean_over_tokens_and_can_be_normalised(pipe):
    spans = find_concepts(pipe, [PROMPT, "a rocket"], [["cat face", "rocket"], ["rocket"]])
    maps = ConceptMaps(spans, "raw")
    assert maps.columns == [2, 3, 6]
    recorded = torch.rand(2, 3, 4, 4)
    own = maps(recorded)
    torch.testing.assert_close(own[0], torch.stack([recorded[0, :2].mean(0), recorded[0, 2]]))
    torch.testing.assert_close(own[1], torch.stack([recorded[1, 0], torch.zeros(4, 4)]))
    scaled = ConceptMaps(spans, "raw", normalize=True)(recorded)
    assert scaled.flatten(2).amax(2).tolist() == [[1, 1], [1, 0]]


def test_the_usual_resolution_is_a_quarter_of_the_latents(pipe):
    assert find_resolution(pipe, None) == (4, 4)
    assert find_resolution(pipe, None, height=68, width=128) == (5, 8)
    assert find_resolution(pipe, None, latents=torch.zeros(1, 4, 64, 96)) == (16, 24)
    assert find_resolution(pipe, 8) == (8, 8)


def test_a_resolution_that_no_layer_has_is_a_named_error(pipe):
    reader = ConceptReader(pipe, ConceptMaps(find_concepts(pipe, PROMPT, ["rocket"])), (5, 5))
    update = LatentUpdate(reader, {"own": (1.0, half_square)}, lambda *_: 0.0)
    with guide_latents(pipe, update), pytest.raises(GuidanceError, match="5x5 positions"):
        quick(pipe, PROMPT, [0])


def test_more_images_than_concepts_is_a_named_error(pipe):
    reader = ConceptReader(pipe, ConceptMaps(find_concepts(pipe, PROMPT, ["rocket"])), (8, 8))
    update = LatentUpdate(reader, {"own": (1.0, half_square)}, lambda *_: 0.0)
    with guide_latents(pipe, update), pytest.raises(GuidanceError, match="makes 2"):
        quick(pipe, [PROMPT] * 2, [0, 1])


def test_two_images_of_one_seed_are_not_taken_for_guidance(pipe):
    """An inner pass of two equal latents is conditional in both."""
    prompts = [PROMPT, "a pizza and a rocket"]
    reader = ConceptReader(
        pipe, ConceptMaps(find_concepts(pipe, prompts, ["rocket"]), "raw"), (8, 8)
    )
    update = LatentUpdate(reader, {"own": (1.0, half_square)}, lambda *_: 0.0)
    with guide_latents(pipe, update, steps=[0]):
        quick(pipe, prompts, [3, 3])
    assert update.record[0].maps.shape == (2, 1, 8, 8)


def test_a_capture_around_guidance_sees_the_steps_alone(pipe):
    """Whichever block is opened first, maps are those of the guided pass."""
    concepts = ConceptMaps(find_concepts(pipe, PROMPT, ["rocket"]), "raw")

    def still() -> LatentUpdate:
        reader = ConceptReader(pipe, concepts, (8, 8))
        return LatentUpdate(reader, {"own": (1.0, half_square)}, lambda *_: 0.0)

    with capture_attention(pipe, tokens=[6], resolution=8, each_step=True) as plain:
        quick(pipe, PROMPT, [0])
    with (
        capture_attention(pipe, tokens=[6], resolution=8, each_step=True) as around,
        guide_latents(pipe, still()),
    ):
        quick(pipe, PROMPT, [0])
    with (
        guide_latents(pipe, still()),
        capture_attention(pipe, tokens=[6], resolution=8, each_step=True) as within,
    ):
        quick(pipe, PROMPT, [0])
    for seen in (around, within):
        assert seen.steps == plain.steps == [0, 1]
        for key, values in plain.values.items():
            torch.testing.assert_close(seen.values[key], values)
