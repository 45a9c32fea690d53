"""Claims about A-STAR: its losses, its toys, and a real U-Net."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn.functional import conv2d, mse_loss, silu

from unweave.attention_tools.a_star import (
    AStar,
    AStarConfig,
    attention_retention_loss,
    attention_segregation_loss,
    binarize,
    fit_masks,
)
from unweave.attention_tools.errors import GuidanceError, MapError, TokenError
from unweave.attention_tools.guidance import DenoisingStep
from unweave.attention_tools.latent_update import LatentUpdate, MapLoss, step_sizes
from unweave.attention_tools.layers import attention_layers
from unweave.attention_tools.masks import to_mask
from unweave.attention_tools.overlap import iou
from unweave.attention_tools.tokens import find_concepts

PROMPT, CONCEPTS = "a cat face and a rocket", ["cat face", "rocket"]
PROMPTS = [PROMPT, "a pizza, a guitar and a turtle", "a panda on red"]
LISTS = [CONCEPTS, ["turtle", "pizza", "guitar"], ["panda"]]
LEFT_RIGHT = torch.zeros(2, 16, 16, dtype=torch.bool)
LEFT_RIGHT[0, :, :8] = LEFT_RIGHT[1, :, 8:] = True


def toy_maps(seed: int) -> tuple[Tensor, Any]:
    """A latent, and a function to the maps of keys 1 and 2 of 7, which are correlated."""
    rng = torch.Generator().manual_seed(seed)
    weight = 2 * torch.randn(32, 4, 3, 3, generator=rng) / 6
    keys = torch.randn(7, 32, generator=rng)
    keys[2] = 0.8 * keys[1] + 0.6 * keys[2]
    latents = torch.randn(1, 4, 16, 16, generator=rng)

    def maps(z: Tensor) -> Tensor:
        queries = conv2d(z, weight, padding=1)
        return (torch.einsum("bdhw,kd->bkhw", queries, keys) / 32**0.5).softmax(1)[:, 1:3]

    return latents, maps


def toy_update(**losses: tuple[float, MapLoss]) -> LatentUpdate:
    return LatentUpdate(lambda forward: forward(), losses, step_sizes(20.0, (1.0, 1.0)))


@pytest.fixture(scope="module")
def tiny_xl(pipe, make_unet):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    width = pipe.text_encoder.config.hidden_size
    torch.manual_seed(0)
    second = CLIPTextConfig(
        vocab_size=len(pipe.tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=pipe.tokenizer.model_max_length,
        projection_dim=16,
        eos_token_id=pipe.tokenizer.eos_token_id,
    )
    made = StableDiffusionXLPipeline(
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(second).eval(),
        tokenizer=pipe.tokenizer,
        tokenizer_2=pipe.tokenizer,
        unet=make_unet(
            cross_attention_dim=width + 16,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def seeded(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sampled(pipe, settings: dict[str, Any], prompts, concepts, seeds, masks=None, steps=4):
    guide = AStar(pipe, AStarConfig(**settings))
    out = guide(
        prompts,
        concepts,
        masks,
        generator=seeded(seeds),
        num_inference_steps=steps,
        guidance_scale=4.0,
        output_type="latent",
    )
    return out.images, guide.record


def test_loss_bounds():
    square = torch.zeros(8, 8)
    square[2:5, 2:5] = 0.7
    apart = torch.zeros(8, 8)
    apart[6:, 6:] = 0.2
    same = torch.stack([square, square])[None]
    assert attention_segregation_loss(same).item() == pytest.approx(0.5, abs=1e-6)
    assert attention_segregation_loss(torch.stack([square, apart])[None]).item() == 0
    three = torch.stack([square, square, square])[None]
    assert attention_segregation_loss(three).item() == pytest.approx(1.5, abs=1e-6)
    mask = square[None, None] > 0
    assert attention_retention_loss(mask.float(), mask).item() == pytest.approx(0.5, abs=1e-6)
    assert attention_retention_loss(apart[None, None], mask).item() == pytest.approx(1, abs=1e-6)


def test_losses_of_a_hand_computed_case():
    maps = torch.tensor([[[[1.0, 3.0, 0.0]], [[2.0, 2.0, 2.0]]]])
    assert attention_segregation_loss(maps).item() == pytest.approx(3 / 10)
    masks = torch.tensor([[[[False, True, False]], [[True, True, False]]]])
    expected = (1 - 1 / 5) + (1 - 2 / 8)
    assert attention_retention_loss(maps, masks).item() == pytest.approx(expected)


def test_one_concept_has_nothing_to_segregate():
    assert attention_segregation_loss(torch.rand(2, 1, 4, 4)).tolist() == [0, 0]


def test_maps_of_zeros_stand_for_no_concept():
    maps, masks = torch.rand(1, 2, 4, 4), torch.rand(1, 2, 4, 4) > 0.5
    more, wider = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.bool)
    more[:, :2], wider[:, :2] = maps, masks
    torch.testing.assert_close(attention_segregation_loss(more), attention_segregation_loss(maps))
    torch.testing.assert_close(
        attention_retention_loss(more, wider), attention_retention_loss(maps, masks)
    )


def test_gradients_are_those_of_finite_differences():
    maps = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    masks = maps.detach() > 0.5
    assert gradcheck(attention_segregation_loss, maps, rtol=1e-3)
    assert gradcheck(lambda own: attention_retention_loss(own, masks), maps, rtol=1e-3)


@pytest.mark.parametrize("method", ["relative", "otsu", "mean"])
def test_no_gradient_flows_through_masks(method):
    maps = torch.rand(1, 2, 6, 6, requires_grad=True)
    masks = binarize(maps, AStarConfig(binarize=method))
    assert masks.dtype == torch.bool and not masks.requires_grad and masks.any()
    loss = attention_retention_loss(maps.detach(), masks)
    assert not loss.requires_grad


def test_segregation_works_on_a_toy():
    before, after = [], []
    for seed in range(8):
        latents, maps = toy_maps(seed)
        update = toy_update(seg=(1.0, attention_segregation_loss))
        for index in range(20):
            latents = update(DenoisingStep(index, 20, latents, maps))
        before.append(update.record[0].losses["seg"].item())
        after.append(attention_segregation_loss(maps(latents)).item())
    assert sum(after) <= 0.6 * sum(before)
    assert all(last <= 0.6 * first for first, last in zip(before, after, strict=True))


def test_without_its_weight_segregation_does_nothing_on_a_toy():
    for seed in range(8):
        latents, maps = toy_maps(seed)
        before = attention_segregation_loss(maps(latents)).item()
        update = toy_update(seg=(0.0, attention_segregation_loss))
        for index in range(20):
            latents = update(DenoisingStep(index, 20, latents, maps))
        after = attention_segregation_loss(maps(latents)).item()
        assert abs(after - before) < 0.05 * before


def test_retention_works_on_a_toy():
    kept = {1.0: [], 0.0: []}
    for weight, overlaps in kept.items():
        for seed in range(8):
            latents, maps = toy_maps(seed)
            masks = to_mask(maps(latents), "relative", 0.5)
            update = toy_update(
                ret=(weight, lambda own, masks=masks: attention_retention_loss(own, masks))
            )
            rng = torch.Generator().manual_seed(100 + seed)
            for index in range(20):
                noise = torch.randn(latents.shape, generator=rng)
                latents = 0.95**0.5 * latents + 0.05**0.5 * noise
                latents = update(DenoisingStep(index, 20, latents, maps))
            overlaps.append(iou(to_mask(maps(latents), "relative", 0.5), masks).mean().item())
    with_loss, without = sum(kept[1.0]) / 8, sum(kept[0.0]) / 8
    assert with_loss >= 0.6
    assert with_loss - without >= 0.3


@pytest.mark.parametrize("mask_from", ["pre", "post"])
@pytest.mark.parametrize("preprocess", ["aae", "raw"])
def test_without_a_step_size_latents_are_those_of_the_pipeline(tiny, preprocess, mask_from):
    plain = tiny(
        [PROMPT] * 2,
        generator=seeded([0, 1]),
        num_inference_steps=4,
        guidance_scale=4.0,
        output_type="latent",
    ).images
    before = [layer.module.processor for layer in attention_layers(tiny)]
    settings = {
        "alpha": 0.0,
        "preprocess": preprocess,
        "mask_from": mask_from,
        "resolution": 16,
    }
    own, record = sampled(tiny, settings, [PROMPT] * 2, CONCEPTS, [0, 1])
    after = [layer.module.processor for layer in attention_layers(tiny)]
    assert (own - plain).abs().max() < 1e-5
    assert all(old is new for old, new in zip(before, after, strict=True))
    assert len(record) == 4 and record[0].masks is None and record[3].masks is not None


def test_one_update_descends_on_a_real_unet(tiny):
    """Both losses together, at one timestep, for 20 seeds; with a negative step it ascends."""
    masks = LEFT_RIGHT[None].expand(20, -1, -1, -1)
    totals = {}
    for alpha in (1.0, -1.0):
        twice = _same_timestep(tiny, {"alpha": alpha, "alpha_range": (1, 1)}, masks)
        totals[alpha] = [seen.loss_seg + seen.loss_ret for seen in twice]
    assert (totals[1.0][1] < totals[1.0][0]).float().mean() >= 0.9
    assert (totals[-1.0][1] > totals[-1.0][0]).float().mean() >= 0.9


def _same_timestep(pipe, settings: dict[str, Any], masks: Tensor):
    """The records of two passes at one timestep, between which is one update."""
    from unweave.attention_tools.a_star import _Run
    from unweave.attention_tools.latent_update import ConceptMaps, ConceptReader

    spans = find_concepts(pipe, [PROMPT] * 20, CONCEPTS)
    embeds = pipe.encode_prompt([PROMPT] * 20, "cpu", 1, False)[0]
    latents = torch.cat([torch.randn(1, 4, 16, 16, generator=rng) for rng in seeded([*range(20)])])
    reader = ConceptReader(pipe.unet, ConceptMaps(spans, "raw", normalize=True), (16, 16))
    run = _Run(AStarConfig(**settings), reader, masks)

    def forward(x: Tensor) -> Any:
        return pipe.unet(x, 500, embeds)

    for index in range(2):
        # Weights are frozen by `guide_latents` in a pipeline; here they only cost.
        latents = run.update(DenoisingStep(index, 2, latents, forward)).detach()
    return run.record


class TwoSquares(nn.Module):
    """A toy text-to-image model: x0 of 12x12 scenes of two coloured squares, either one left.

    The text is two colours and an empty token; `maps` are those of its one cross-attention.
    """

    colours = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1]])

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.enter = nn.Conv2d(4, width, 3, padding=1)
        self.near = nn.Conv2d(width, width, 3, padding=1)
        self.far = nn.Conv2d(width, width, 3, padding=2, dilation=2)
        self.queries = nn.Conv2d(width, 16, 1)
        self.keys, self.values = nn.Embedding(5, 16), nn.Embedding(5, width)
        self.join = nn.Conv2d(2 * width, width, 3, padding=1)
        self.leave = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor, level: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        levels = level.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[-2:])
        hidden = silu(self.enter(torch.cat([x, levels], 1)))
        hidden = hidden + silu(self.near(hidden))
        hidden = hidden + silu(self.far(hidden))
        scores = torch.einsum("bdhw,bnd->bnhw", self.queries(hidden), self.keys(tokens)) / 4
        maps = scores.softmax(1)
        told = torch.einsum("bnhw,bnd->bdhw", maps, self.values(tokens))
        return self.leave(silu(self.join(torch.cat([hidden, told], 1)))), maps[:, :2]

    def scenes(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.stack([torch.randperm(4, generator=rng)[:2] for _ in range(count)])
        swapped = torch.rand(count, generator=rng) < 0.5
        rows = torch.randint(1, 7, (count, 2), generator=rng)
        images = torch.full((count, 3, 12, 12), -1.0)
        for image, own, swap, (top, other) in zip(images, chosen, swapped, rows, strict=True):
            left, right = self.colours[own.flip(0) if swap else own]
            image[:, top : top + 4, 1:5] = left[:, None, None]
            image[:, other : other + 4, 7:11] = right[:, None, None]
        return images, torch.cat([chosen, torch.full((count, 1), 4)], 1)

    def train_on_scenes(self, steps: int) -> TwoSquares:
        rng = torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(self.parameters(), 4e-3)
        images, texts = self.scenes(1024, rng)
        for _ in range(steps):
            batch = torch.randint(0, 1024, (32,), generator=rng)
            level = torch.rand(32, generator=rng)
            noise = torch.randn(32, 3, 12, 12, generator=rng)
            signal, rest = _schedule(level.view(-1, 1, 1, 1))
            predicted, _ = self(signal * images[batch] + rest * noise, level, texts[batch])
            optimizer.zero_grad()
            mse_loss(predicted, images[batch]).backward()
            optimizer.step()
        return self.requires_grad_(False)

    def sample(self, update: LatentUpdate | None, count: int = 24, steps: int = 12) -> Any:
        """Images of "red green" and the maps of the last step."""
        z = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(5))
        text, maps = torch.tensor([[0, 1, 4]]).expand(count, -1), torch.empty(0)
        levels = torch.linspace(1, 0, steps + 1)
        for index in range(steps):
            level = levels[index].expand(count)
            if update is not None:
                z = update(
                    DenoisingStep(index, steps, z, lambda x, level=level: self(x, level, text)[1])
                )
            predicted, maps = self(z, level, text)
            (signal, rest), (signal_next, rest_next) = map(_schedule, levels[index : index + 2])
            z = signal_next * predicted + rest_next * (z - signal * predicted) / rest
        return z, maps


def _schedule(level: Tensor) -> tuple[Tensor, Tensor]:
    return (torch.pi / 2 * level).cos(), (torch.pi / 2 * level).sin()


def test_layout_masks_hold_concepts_on_their_sides():
    """On a toy trained on scenes of two squares; swapping the masks swaps the sides."""
    torch.manual_seed(0)
    model = TwoSquares().train_on_scenes(150)
    left_right = torch.zeros(2, 12, 12, dtype=torch.bool)
    left_right[0, :, :6] = left_right[1, :, 6:] = True
    _, free = model.sample(None)
    assert 0.35 <= _inside(free, left_right) <= 0.65
    for masks, red_is_left in ((left_right, True), (left_right.flip(0), False)):
        held = masks.expand(24, -1, -1, -1)
        images, maps = model.sample(
            toy_update(
                seg=(1.0, attention_segregation_loss),
                ret=(1.0, lambda own, held=held: attention_retention_loss(own, held)),
            )
        )
        assert _inside(maps, masks) >= 0.7
        red = images[:, 0] - images[:, 1]
        left = red[..., :6].sum((1, 2)) > red[..., 6:].sum((1, 2))
        assert (left == red_is_left).float().mean() >= 0.7


def _inside(maps: Tensor, masks: Tensor) -> float:
    """The share of concepts with more than half of their mass inside of their mask."""
    mass = (maps * masks).sum((2, 3)) / maps.sum((2, 3))
    return (mass > 0.5).float().mean().item()


@pytest.mark.parametrize("settings", [{}, {"mask_from": "pre"}, {"preprocess": "raw"}])
def test_a_batch_is_as_single_runs(tiny, settings):
    settings = {"resolution": 16, **settings}
    together, record = sampled(tiny, settings, PROMPTS, LISTS, [0, 1, 2])
    for index in range(3):
        alone, own = sampled(tiny, settings, [PROMPTS[index]], [LISTS[index]], [index])
        torch.testing.assert_close(together[index], alone[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(record[3].loss_ret[index], own[3].loss_ret[0], atol=1e-3, rtol=0)


def test_the_embedded_model_is_guided_in_batches(pipe):
    settings = {"resolution": 8}
    together, _ = sampled(pipe, settings, PROMPTS, LISTS, [0, 1, 2], steps=2)
    alone, _ = sampled(pipe, settings, [PROMPTS[1]], [LISTS[1]], [1], steps=2)
    torch.testing.assert_close(together[1], alone[0], atol=1e-4, rtol=0)


def test_several_images_a_prompt_are_guided_alike(tiny):
    guide = AStar(tiny, AStarConfig(resolution=16))
    latents = guide(
        PROMPT,
        CONCEPTS,
        num_images_per_prompt=2,
        generator=seeded([0, 1]),
        num_inference_steps=2,
        output_type="latent",
    ).images
    expected, _ = sampled(tiny, {"resolution": 16}, [PROMPT] * 2, CONCEPTS, [0, 1], steps=2)
    assert latents.shape == expected.shape and guide.record[0].maps.shape == (2, 2, 16, 16)


def test_it_runs_in_stable_diffusion_xl(tiny_xl):
    """Without a step size as the pipeline itself, under a scheduler that scales latents."""
    calls = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}
    size = {"height": 64, "width": 96}
    plain = tiny_xl(PROMPT, generator=seeded([0]), **calls, **size).images
    still = AStar(tiny_xl, AStarConfig(alpha=0.0, resolution=(16, 24)))
    own = still(PROMPT, CONCEPTS, generator=seeded([0]), **calls, **size).images
    assert (own - plain).abs().max() < 1e-4
    guide = AStar(tiny_xl, AStarConfig(resolution=(16, 24)))
    moved = guide(PROMPT, CONCEPTS, generator=seeded([0]), **calls, **size).images
    assert moved.isfinite().all() and not torch.equal(moved, plain)
    assert guide.record[1].masks.shape == (1, 2, 16, 24)


def test_altering_can_stop_early(tiny):
    _, record = sampled(tiny, {"resolution": 16, "max_iter_to_alter": 2}, PROMPT, CONCEPTS, [0])
    assert len(record) == 2


def test_masks_stay_fixed_in_layout_mode(tiny):
    _, record = sampled(tiny, {"resolution": 16}, PROMPT, CONCEPTS, [0], LEFT_RIGHT)
    assert all(torch.equal(seen.masks[0], LEFT_RIGHT) for seen in record)
    assert (record[0].loss_ret > 0).all()


def test_masks_are_resized_by_area(pipe):
    spans = find_concepts(pipe, PROMPT, CONCEPTS)
    masks = torch.zeros(2, 8, 8)
    masks[0, :4, :3], masks[1, 4:] = 1, 1
    fitted = fit_masks(masks, spans, (4, 4))
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[:2, :2] = True
    assert torch.equal(fitted[0, 0], expected) and fitted[0, 1].sum() == 8


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.ones(3, 8, 8), "one for each of"),
        (torch.ones(2, 2, 8, 8), "for 1 images, got 2"),
        (torch.zeros(2, 8, 8), "the mask of 'cat face' is empty"),
        (torch.ones(8, 8), "one for each of"),
    ],
)
def test_wrong_masks_are_named(pipe, masks, message):
    with pytest.raises(MapError, match=message):
        fit_masks(masks, find_concepts(pipe, PROMPT, CONCEPTS), (4, 4))


@pytest.mark.parametrize(
    "settings",
    [
        {"preprocess": "softmax"},
        {"binarize": "half"},
        {"mask_from": "both"},
        {"threshold": 0.0},
        {"max_iter_to_alter": 0},
    ],
)
def test_wrong_settings_are_named(settings):
    with pytest.raises(GuidanceError, match=next(iter(settings))):
        AStarConfig(**settings)


def test_one_word_twice_is_an_error(tiny):
    with pytest.raises(TokenError, match="share token"):
        AStar(tiny)(PROMPT, ["rocket", "rocket"])
