"""T2I-Zero: the corrected embedding and the suppressed maps are those of the two algorithms."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from unweave.attention_tools import (
    AttentionCall,
    AttentionError,
    AttentionLayer,
    TokenError,
    find_tokens,
    intercept_attention,
    select_layers,
)
from unweave.attention_tools.interception import DenoiserCall
from unweave.attention_tools.t2i_zero import (
    T2IZero,
    T2IZeroConfig,
    correction_by_similarities,
    cross_token_nms,
    gaussian_smoothing,
    winning_concepts,
)

PROMPT = "a cat face and a rocket"
CONCEPTS = ["cat face", "rocket"]
NMS = T2IZeroConfig(similarities=False, end_step=100)


def slow_correction(f, positions, tau, gamma, alpha, allowed=None):
    """Algorithm 1 as loops over rows and channels."""
    allowed = range(len(f)) if allowed is None else allowed
    new = f.clone()
    for c in positions:
        largest = max(float(f[c, j] * f[i, j]) for i in allowed for j in range(f.shape[1]))
        for j in range(f.shape[1]):
            total = 0.0
            for i in allowed:
                share = float(f[c, j] * f[i, j]) / largest
                if share > tau and abs(i - c) <= gamma:
                    total += share * float(f[i, j])
            new[c, j] = (1 - alpha) * float(f[c, j]) + alpha * total
    return new


ROWS = torch.tensor([[1.0, -2, 3], [2, 1, -1], [-1, 4, 2], [3, 2, -2]])


@pytest.mark.parametrize("tau", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("gamma", [0, 1, 3])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_correction_is_the_slow_loop_and_leaves_other_rows(tau, gamma, alpha):
    new = correction_by_similarities(ROWS[None], [1, 3], tau=tau, gamma=gamma, alpha=alpha)[0]
    torch.testing.assert_close(
        new, slow_correction(ROWS, [1, 3], tau, gamma, alpha), atol=1e-6, rtol=0
    )
    assert torch.equal(new[[0, 2]], ROWS[[0, 2]])
    if alpha == 0:
        assert torch.equal(new, ROWS)


def test_correction_by_hand():
    # Products of row 1 = (2, 1, -1): (2, -2, -3), (4, 1, 1), (-2, 4, -2), (6, 2, 2); largest 6.
    new = correction_by_similarities(ROWS[None], [1], tau=0.3, gamma=1, alpha=0.5)[0, 1]
    first = (2 / 6) * 1 + (4 / 6) * 2
    second = (4 / 6) * 4
    torch.testing.assert_close(
        new, torch.tensor([1 + first / 2, 0.5 + second / 2, -0.5]), atol=1e-6, rtol=0
    )


def test_correction_stays_within_the_allowed_tokens():
    new = correction_by_similarities(
        ROWS[None], [1, 2], tau=0.1, gamma=3, alpha=0.7, allowed=[1, 2]
    )[0]
    slow = slow_correction(ROWS, [1, 2], 0.1, 3, 0.7, allowed=[1, 2])
    torch.testing.assert_close(new, slow, atol=1e-6, rtol=0)
    with pytest.raises(TokenError, match="must be among"):
        correction_by_similarities(ROWS[None], [3], allowed=[1, 2])


def test_the_quantile_threshold_keeps_only_the_largest_products():
    products = ROWS[3] * ROWS
    least = products.flatten().quantile(1 - math.exp(-10 * 0.1))
    weights = torch.where(products > least.clamp(min=0), products / products.max(), 0)
    new = correction_by_similarities(
        ROWS[None], [3], tau=0.1, gamma=3, alpha=1, threshold="quantile"
    )
    torch.testing.assert_close(new[0, 3], (weights * ROWS).sum(0))


def test_renorm_keeps_the_norm_and_half_precision_its_dtype():
    rows = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0)).half()
    new = correction_by_similarities(rows, [4], alpha=0.5, renorm=True)
    assert new.dtype == torch.float16
    torch.testing.assert_close(new[:, 4].norm(dim=-1), rows[:, 4].norm(dim=-1), rtol=2e-3, atol=0)


def test_the_order_of_concepts_does_not_matter():
    rows = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0))
    first, second = (correction_by_similarities(rows, at, gamma=6) for at in ([4, 9], [9, 4]))
    assert torch.equal(first, second)


def test_correction_sheds_what_far_tokens_carry():
    """Row 5 carries u too, as a concept's second token does; without it v need not fall."""
    cosines = []
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(20, 64, generator=generator)
        u, v = torch.randn(2, 64, generator=generator)
        rows[4], rows[11], rows[12] = u + 0.6 * v, v, v
        rows[5] = u + 0.1 * rows[5]
        near, wide = (
            correction_by_similarities(rows[None], [4], tau=0.1, gamma=gamma, alpha=0.5)[0, 4]
            for gamma in (2, 20)
        )
        cosines.append(
            [
                *(cosine_similarity(row, v, dim=0) for row in (rows[4], near, wide)),
                *(cosine_similarity(row, u, dim=0) for row in (rows[4], near)),
            ]
        )
    before, near, wide, kept, own = torch.tensor(cosines).T
    assert (near < before).float().mean() >= 0.95
    assert abs(float(own.mean() - kept.mean())) <= 0.03
    assert wide.mean() > before.mean()


def a_call(grid=(6, 6), tokens=7, heads=2, batch=1, guided=False, mask=None, seed=0):
    """A call of attention whose values are unit vectors, so that its output is the maps."""
    generator = torch.Generator().manual_seed(seed)
    places = grid[0] * grid[1]
    q = torch.randn(batch, heads, places, 8, generator=generator)
    k = torch.randn(batch, heads, tokens, 8, generator=generator)
    v = torch.eye(tokens).expand(batch, heads, -1, -1)
    layer = AttentionLayer("attn2", "cross", "mid_block", "AttnProcessor2_0", torch.nn.Identity())
    denoiser = DenoiserCall(step=0, batch=batch, guided=guided, size=grid, text=tokens)
    everything, nothing = slice(0, places), slice(0, 0)
    return AttentionCall(
        layer, denoiser, q, k, v, mask, None, slice(0, tokens), everything, nothing, True
    )


def explicit_nms(maps, groups, grid, config):
    """Algorithm 2 on probabilities (B, H, Q, t)."""
    concepts = torch.stack([maps[..., own].sum(-1) for own in groups], -1)
    winners = winning_concepts(concepts, grid, config.kernel, config.sigma)
    keep = torch.zeros_like(maps) if config.mode == "strict" else torch.ones_like(maps)
    for concept, own in enumerate(groups):
        for at in own:
            keep[..., at] = (winners == concept).to(maps)
    new = (1 - config.strength) * maps + config.strength * keep * maps
    return new / new.sum(-1, keepdim=True) if config.renormalize else new


def tables(groups):
    columns = torch.tensor([[at for own in groups for at in own]])
    members = torch.zeros(1, columns.shape[1], len(groups))
    place = 0
    for concept, own in enumerate(groups):
        members[0, place : place + len(own), concept] = 1
        place += len(own)
    return columns, members


@pytest.mark.parametrize("mode", ["concepts", "strict"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("guided", [False, True])
def test_suppression_in_the_output_is_suppression_of_the_maps(mode, renormalize, strength, guided):
    config = replace(NMS, mode=mode, renormalize=renormalize, strength=strength)
    groups = [[1, 2], [5]]
    call = a_call(grid=(4, 9), batch=2 if guided else 1, guided=guided)
    maps = call.proceed()
    new = cross_token_nms(call, *tables(groups), config)
    expected = explicit_nms(maps[-1:], groups, (4, 9), config)
    torch.testing.assert_close(new[-1:], expected, atol=1e-6, rtol=1e-5)
    assert not guided or torch.equal(new[:1], maps[:1])


def test_suppression_follows_masks_and_different_concepts_in_one_batch():
    mask = torch.rand(2, 1, 36, 7, generator=torch.Generator().manual_seed(1)) > 0.2
    mask[..., 0] = True
    call = a_call(mask=mask, batch=2)
    columns = torch.tensor([[1, 2, 5], [3, 4, 0]])
    members = torch.tensor([[[1.0, 0, 0], [1, 0, 0], [0, 1, 0]], [[1, 0, 0], [0, 1, 0], [0, 0, 0]]])
    new, maps = cross_token_nms(call, columns, members, NMS), call.proceed()
    for row, groups in enumerate(([[1, 2], [5]], [[3], [4]])):
        expected = explicit_nms(maps[row, None], groups, (6, 6), NMS)
        torch.testing.assert_close(new[row, None], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", ["concepts", "strict"])
def test_renormalizing_stays_finite_where_losers_hold_all_attention(mode):
    call = a_call()
    call = replace(call, q=100 * call.q)
    config = replace(NMS, mode=mode, renormalize=True)
    new = cross_token_nms(call, *tables([[0, 1, 2], [3, 4], [5, 6]]), config)
    assert new.isfinite().all()
    assert new.abs().max() <= 1.01


def test_each_place_belongs_to_one_concept_and_other_tokens_keep_theirs():
    call = a_call()
    maps, new = call.proceed(), cross_token_nms(call, *tables([[2], [4]]), NMS)
    assert torch.equal((new[..., [2, 4]] > 1e-6).sum(-1), torch.ones(1, 2, 36, dtype=torch.int64))
    others = [0, 1, 3, 5, 6]
    torch.testing.assert_close(new[..., others], maps[..., others])
    strict = cross_token_nms(call, *tables([[2], [4]]), replace(NMS, mode="strict"))
    assert torch.equal((strict > 1e-6).sum(-1), torch.ones(1, 2, 36, dtype=torch.int64))


def test_smoothing_gives_salt_noise_to_the_concept_around_it():
    maps = torch.zeros(1, 1, 49, 2)
    maps[..., 0], maps[..., 1] = 0.3, 0.1
    maps[0, 0, 24, 1] = 0.5
    assert winning_concepts(maps, (7, 7))[0, 0, 24] == 0
    assert winning_concepts(maps, (7, 7), kernel=1)[0, 0, 24] == 1


def test_smoothing_keeps_constants_and_weighs_by_the_gaussian():
    assert torch.allclose(gaussian_smoothing(torch.full((2, 3, 5), 0.4)), torch.tensor(0.4))
    point = torch.zeros(5, 5, dtype=torch.float64)
    point[2, 2] = 1
    side = math.exp(-0.5) / (1 + 2 * math.exp(-0.5))
    middle = 1 / (1 + 2 * math.exp(-0.5))
    smooth = gaussian_smoothing(point)
    assert smooth[2, 2].item() == pytest.approx(middle**2)
    assert smooth[1, 2].item() == pytest.approx(side * middle)
    assert smooth[1, 1].item() == pytest.approx(side**2)


def overlap(maps):
    """Pairwise overlap of two maps (..., Q, 2): sum of minima over the sum."""
    return maps.amin(-1).sum(-1) / maps.sum((-1, -2))


def per_head_maps(pipe, config, seeds, steps=5):
    """Concept maps (seeds, H, Q, 2) at 16x16 of each step, as they come before suppression."""
    from unweave.kernels import attention_maps

    positions = find_tokens(pipe, PROMPT, CONCEPTS).positions
    recorded: dict[int, list[torch.Tensor]] = {}

    def record(call):
        if call.grid == (16, 16):
            part = call.conditional
            maps = attention_maps(
                call.q[part], call.k[part], groups=positions, reduce_heads="none", scale=call.scale
            )
            recorded.setdefault(call.denoiser.step, []).append(maps)
        return call.proceed()

    arguments = {
        "num_inference_steps": steps,
        "guidance_scale": 4.0,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "output_type": "latent",
    }
    with intercept_attention(pipe, select_layers(pipe, "cross"), record):
        if config is None:
            pipe([PROMPT] * len(seeds), **arguments)
        else:
            T2IZero(pipe, config)([PROMPT] * len(seeds), [CONCEPTS] * len(seeds), **arguments)
    return recorded


@pytest.fixture(scope="module")
def plain_seeds(pipe):
    return per_head_maps(pipe, None, range(30))


@pytest.fixture(scope="module")
def altered_seeds(pipe):
    return per_head_maps(pipe, NMS, range(30))


def test_suppressed_maps_do_not_overlap_per_head_and_less_on_average(plain_seeds):
    before = torch.stack([torch.stack(layers) for layers in plain_seeds.values()])
    winners = winning_concepts(before, (16, 16))
    after = before * torch.nn.functional.one_hot(winners, 2)
    assert overlap(after).abs().max() == 0
    fall = 1 - overlap(after.mean(3)).mean() / overlap(before.mean(3)).mean()
    assert fall >= 0.3


@pytest.mark.xfail(
    strict=True,
    reason="the spec never tried this: here it holds at some steps and for some prompts only; over "
    "30 random pairs 63 % of next steps overlap less",
)
def test_unmodified_maps_of_the_next_step_overlap_less(plain_seeds, altered_seeds):
    for step in range(1, 5):
        plain, altered = (
            overlap(torch.stack(run[step]).mean(2)).mean(0) for run in (plain_seeds, altered_seeds)
        )
        assert (altered < plain).float().mean() >= 0.7


def latents(pipe, zero=None, steps=4, prompts=PROMPT, concepts=CONCEPTS, guidance=4.0):
    seen = []

    def keep(_pipe, _step, _timestep, values):
        seen.append(values["latents"].clone())
        return values

    arguments = {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "generator": torch.Generator().manual_seed(3),
        "output_type": "latent",
        "callback_on_step_end": keep,
    }
    if zero is None:
        pipe(prompts, **arguments)
    else:
        zero(prompts, concepts, **arguments)
    return torch.stack(seen)


def test_nothing_changes_before_the_range_or_at_strength_and_alpha_zero(pipe):
    plain = latents(pipe)
    no_steps = T2IZero(pipe, T2IZeroConfig(similarities=False, end_step=0))
    assert torch.equal(latents(pipe, no_steps), plain)
    late = latents(pipe, T2IZero(pipe, T2IZeroConfig(similarities=False, start_step=2, end_step=4)))
    assert torch.equal(late[:2], plain[:2])
    assert not torch.allclose(late[2:], plain[2:], atol=1e-3)
    nothing = T2IZero(pipe, T2IZeroConfig(alpha=0.0, strength=0.0))
    torch.testing.assert_close(latents(pipe, nothing), plain, atol=1e-5, rtol=0)


def test_the_range_ends_after_half_of_the_steps_unless_given(pipe):
    half, given = (
        latents(pipe, T2IZero(pipe, T2IZeroConfig(similarities=False, end_step=end)))
        for end in (None, 2)
    )
    assert torch.equal(half, given)


def test_a_batch_gives_each_prompt_its_concepts(pipe):
    other, words = "a pizza and an octopus and a star", ["pizza", "octopus", "star"]
    zero = T2IZero(pipe, T2IZeroConfig(end_step=2))
    arguments = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}
    seeds = lambda: [torch.Generator().manual_seed(seed) for seed in (0, 1)]  # noqa: E731
    together = zero([PROMPT, other], [CONCEPTS, words], generator=seeds(), **arguments).images
    first = zero(PROMPT, CONCEPTS, generator=seeds()[0], **arguments).images
    second = zero(other, words, generator=seeds()[1], **arguments).images
    torch.testing.assert_close(together, torch.cat([first, second]), atol=1e-4, rtol=1e-4)


def test_several_images_a_prompt_and_no_guidance(pipe):
    zero = T2IZero(pipe)
    arguments = {"num_inference_steps": 2, "output_type": "latent", "num_images_per_prompt": 2}
    images = zero(
        [PROMPT] * 2,
        [CONCEPTS] * 2,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(0) for _ in range(4)],
        **arguments,
    ).images
    assert images.shape[0] == 4
    torch.testing.assert_close(images[0], images[3], atol=1e-4, rtol=1e-4)


def test_the_pipeline_is_as_before_and_no_gradient_is_made(pipe):
    processors, seen = dict(pipe.unet.attn_processors), []

    def watch(call):
        seen.append(torch.is_grad_enabled())
        return call.proceed()

    with intercept_attention(pipe, select_layers(pipe, "cross"), watch):
        latents(pipe, T2IZero(pipe), steps=2)
    assert seen and not any(seen)
    after = pipe.unet.attn_processors
    assert all(after[name] is processor for name, processor in processors.items())
    assert "encode_prompt" not in vars(pipe)
    assert not {"step", "set_timesteps"} & set(vars(pipe.scheduler))


def test_both_together_take_less_than_half_more_than_explicit_softmax(pipe):
    from diffusers.models.attention_processor import AttnProcessor

    zero, before = T2IZero(pipe, T2IZeroConfig(end_step=100)), pipe.unet.attn_processors
    ratios = []
    for _ in range(5):
        pipe.unet.set_attn_processor(AttnProcessor())
        start = time.perf_counter()
        latents(pipe, steps=6)
        plain = time.perf_counter() - start
        pipe.unet.set_attn_processor(dict(before))
        start = time.perf_counter()
        latents(pipe, zero, steps=6)
        ratios.append((time.perf_counter() - start) / plain)
    assert min(ratios) < 1.5


def test_warnings_for_strict_and_for_one_concept(pipe):
    with pytest.warns(UserWarning, match="washes out") as warned:
        strict = T2IZero(pipe, T2IZeroConfig(mode="strict"))
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latents(pipe, strict, steps=1)
    with pytest.warns(UserWarning, match="one concept"):
        latents(pipe, T2IZero(pipe), steps=1, concepts=["rocket"])


def test_one_concept_is_left_alone_by_suppression(pipe):
    zero = T2IZero(pipe, NMS)
    with pytest.warns(UserWarning):
        alone = latents(pipe, zero, steps=2, concepts=["rocket"])
    torch.testing.assert_close(alone, latents(pipe, steps=2), atol=1e-5, rtol=0)


def test_mistakes_are_named(pipe):
    zero = T2IZero(pipe)
    with pytest.raises(TokenError, match="'dragon' is not among the words"):
        zero(PROMPT, ["dragon", "rocket"])
    with pytest.raises(TokenError, match="share token"):
        zero(PROMPT, ["cat face", "cat"])
    with pytest.raises(TokenError, match="one for each of the 2 prompts, got 1"):
        zero([PROMPT, PROMPT], [CONCEPTS])
    with pytest.raises(TokenError, match="a list of words, got the text 'rocket'"):
        zero(PROMPT, "rocket")
    with (
        pytest.raises(AttentionError, match="do not fit"),
        zero.applied([PROMPT] * 2, [CONCEPTS] * 2),
    ):
        pipe(PROMPT, num_inference_steps=1, output_type="latent")
    with pytest.raises(TokenError, match="shorten the prompt"):
        zero(f"{PROMPT} and" + " a cactus and" * 12 + " a star", CONCEPTS)
    with pytest.raises(AttentionError, match="are no grid"):
        winning_concepts(torch.zeros(1, 5, 2), (2, 2))


@pytest.mark.parametrize(
    "wrong",
    [
        {"tau": 1.5},
        {"alpha": -0.1},
        {"strength": math.nan},
        {"mode": "soft"},
        {"threshold": "top"},
        {"gamma": -1},
        {"end_step": -1},
        {"kernel": 4},
        {"sigma": 0.0},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(AttentionError, match=next(iter(wrong))):
        T2IZeroConfig(**wrong)


def test_two_encoders_side_by_side_are_corrected_apart():
    from types import SimpleNamespace

    from unweave.attention_tools.t2i_zero import _widths

    encoder = lambda width: SimpleNamespace(config=SimpleNamespace(hidden_size=width))  # noqa: E731
    pair = SimpleNamespace(text_encoder=encoder(6), text_encoder_2=encoder(10))
    assert _widths(pair, 16) == [6, 10]
    assert _widths(SimpleNamespace(text_encoder=encoder(6)), 6) == [6]
