"""Claims about Attend-and-Excite, the baseline."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from unweave.attention_tools.attend_and_excite import (
    AttendAndExcite,
    AttendAndExciteConfig,
    attend_and_excite_loss,
)
from unweave.attention_tools.errors import GuidanceError, TokenError
from unweave.attention_tools.guidance import DenoisingStep
from unweave.attention_tools.latent_update import LatentUpdate
from unweave.attention_tools.layers import attention_layers

PROMPT, CONCEPTS = "a cat face and a rocket", ["cat face", "rocket"]


def call(pipe, config: AttendAndExciteConfig, prompts, concepts, seeds, steps=3):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    guide = AttendAndExcite(pipe, config)
    out = guide(
        prompts,
        concepts,
        generator=generators,
        num_inference_steps=steps,
        guidance_scale=4.0,
        output_type="latent",
    )
    return out.images, guide.record


def test_the_loss_is_that_of_the_least_attended_concept():
    maps = torch.zeros(2, 2, 4, 4)
    maps[0, 0, 1, 1], maps[0, 1, 2, 2] = 0.9, 0.3
    maps[1, 0, 0, 0] = 0.8
    torch.testing.assert_close(attend_and_excite_loss(maps), torch.tensor([0.7, 0.2]))


def test_the_gradient_is_that_of_finite_differences():
    maps = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(attend_and_excite_loss, maps)


def test_the_settings_are_those_of_the_published_code():
    config = AttendAndExciteConfig()
    assert config.max_iter_to_alter == 25 and config.max_refinement_steps == 20
    assert config.thresholds == {0: 0.05, 10: 0.5, 20: 0.8}
    assert (config.scale_factor, config.scale_range) == (20, (1.0, 0.5))


def test_steps_after_the_last_altered_are_plain(pipe):
    config = AttendAndExciteConfig(max_iter_to_alter=2, thresholds={}, resolution=8)
    _, record = call(pipe, config, PROMPT, CONCEPTS, [0])
    assert [seen.step for seen in record] == [0, 1]


def test_refinement_stops_at_its_limit_or_when_attended(pipe):
    hard = AttendAndExciteConfig(1, {0: 1.0}, max_refinement_steps=3, resolution=8)
    with pytest.warns(UserWarning, match="step 0 ended after 3 updates"):
        assert call(pipe, hard, PROMPT, CONCEPTS, [0], 1)[1][0].refinements == 3
    easy = AttendAndExciteConfig(1, {0: 0.0}, resolution=8)
    assert call(pipe, easy, PROMPT, CONCEPTS, [0], 1)[1][0].refinements == 0


@pytest.fixture(scope="module")
def sharp(tiny, make_unet):
    """The tiny pipeline with weights moved so far that attention is uneven before any update."""
    unet = make_unet(cross_attention_dim=tiny.unet.config.cross_attention_dim)
    rng = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    parts = {**tiny.components, "unet": unet.requires_grad_(False)}
    made = type(tiny)(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.filterwarnings("error:refinement at step")
def test_refinement_brings_the_least_attended_concept_to_the_threshold(sharp):
    """Four seeds: the loss 1 - attention falls under 1 - 0.2, with the published step size."""
    seeds = range(4)
    plain = AttendAndExciteConfig(1, {}, resolution=16)
    before = call(sharp, plain, [PROMPT] * 4, [CONCEPTS] * 4, seeds, 2)[1][0].losses["loss"]
    config = AttendAndExciteConfig(1, {0: 0.2}, resolution=16)
    _, (seen,) = call(sharp, config, [PROMPT] * 4, [CONCEPTS] * 4, seeds, 2)
    after = seen.losses["loss"]
    assert 0 < seen.refinements < 20
    assert after.max() <= 0.8
    there = before <= 0.8
    assert there.sum() == 1 and (before[~there] > 0.9).all()
    torch.testing.assert_close(after[there], before[there], atol=1e-4, rtol=0)


def test_refinement_that_cannot_reach_its_threshold_warns_and_goes_on(sharp):
    """A place cannot give 0.8 of its attention to each of two concepts where both are highest."""
    config = AttendAndExciteConfig(2, {0: 0.2, 1: 0.8}, max_refinement_steps=12, resolution=16)
    with pytest.warns(UserWarning, match=r"step 1 ended after 12 updates .* above 0\.2, at most"):
        latents, record = call(sharp, config, [PROMPT], [CONCEPTS], [0], 3)
    assert latents.isfinite().all()
    assert [seen.step for seen in record] == [0, 1] and record[1].refinements == 12
    assert record[0].losses["loss"].item() <= 0.8 and record[1].losses["loss"].item() > 0.2


def test_attention_of_the_least_attended_concept_rises_on_a_toy():
    """Linear queries over 7 random keys, of which two are concepts: at every one of 8 seeds."""
    for seed in range(8):
        rng = torch.Generator().manual_seed(seed)
        keys = torch.randn(7, 4, generator=rng)
        latents = torch.randn(1, 4, 8, 8, generator=rng)

        def maps(z: Tensor, keys: Tensor = keys) -> Tensor:
            return torch.einsum("bdhw,kd->bkhw", z, keys).softmax(1)[:, :2]

        update = LatentUpdate(
            lambda forward: forward(), {"loss": (1.0, attend_and_excite_loss)}, lambda *_: 2.0
        )
        before = attend_and_excite_loss(maps(latents))
        for index in range(10):
            latents = update(DenoisingStep(index, 10, latents, maps))
        assert attend_and_excite_loss(maps(latents)) < before


@pytest.mark.filterwarnings("ignore:refinement at step")
def test_a_batch_is_as_single_runs(pipe):
    config = AttendAndExciteConfig(2, {0: 0.2}, max_refinement_steps=2, resolution=8)
    prompts = [PROMPT, "a pizza on red"]
    concepts = [CONCEPTS, ["pizza"]]
    together, _ = call(pipe, config, prompts, concepts, [0, 1])
    for index in range(2):
        alone, _ = call(pipe, config, [prompts[index]], [concepts[index]], [index])
        torch.testing.assert_close(together[index], alone[0], atol=1e-4, rtol=0)


def test_everything_is_as_before_afterwards(pipe):
    before = [layer.module.processor for layer in attention_layers(pipe)]
    call(pipe, AttendAndExciteConfig(1, {}, resolution=8), PROMPT, CONCEPTS, [0], 1)
    after = [layer.module.processor for layer in attention_layers(pipe)]
    assert all(old is new for old, new in zip(before, after, strict=True))
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())


@pytest.mark.parametrize(
    "settings",
    [{"max_iter_to_alter": 0}, {"thresholds": {25: 0.5}}, {"max_refinement_steps": -1}],
)
def test_wrong_settings_are_named(settings):
    with pytest.raises(GuidanceError, match=next(iter(settings))):
        AttendAndExciteConfig(**settings)


def test_a_word_that_is_not_there_is_named(pipe):
    with pytest.raises(TokenError, match="'frog'"):
        AttendAndExcite(pipe)(PROMPT, ["frog"])
