"""Captured maps against an explicit softmax in float64, and what can be asked for."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from unweave.attention_tools import (
    MapReader,
    capture_attention,
    find_tokens,
    guide_latents,
    select_layers,
)
from unweave.attention_tools.errors import AttentionError, BudgetError

PROMPT = "a cat face and a rocket on a red background"


class ExplicitProcessor(AttnProcessor2_0):
    """Gives the usual output, and keeps softmax(q k^T / sqrt(d)) in float64, mean over heads."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        split = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2).double()  # noqa: E731
        q, k = split(attn.to_q(hidden_states)), split(attn.to_k(text))
        self.maps.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1))
        return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


def run(pipe, prompt=PROMPT, steps=3, guidance=4.0, **settings):
    count = 1 if isinstance(prompt, str) else len(prompt)
    return pipe(
        prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in range(count)],
        output_type="latent",
        **settings,
    ).images


def explicit(pipe, layers="cross", **settings):
    """Return maps (steps, B, Q, K) of the conditional half by layer."""
    chosen = select_layers(pipe, layers)
    before = pipe.unet.attn_processors
    own = {layer.name: ExplicitProcessor() for layer in chosen}
    for layer in chosen:
        layer.module.set_processor(own[layer.name])
    try:
        run(pipe, **settings)
    finally:
        pipe.unet.set_attn_processor(before)
    guided = settings.get("guidance") != 1.0
    return {
        name: torch.stack([x[x.shape[0] // 2 :] if guided else x for x in processor.maps])
        for name, processor in own.items()
    }


@pytest.fixture(scope="module")
def expected(pipe):
    return explicit(pipe)


@pytest.fixture
def unet(make_unet):
    """A tiny U-Net in float64, with weights that are moved so that no two layers look alike."""
    model = make_unet(sample_size=8)
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    return model.double().requires_grad_(False)


def test_maps_are_the_explicit_softmax_of_each_step(pipe, expected):
    with capture_attention(pipe, each_step=True) as maps:
        run(pipe)
    assert maps.steps == [0, 1, 2]
    assert set(maps.layers) == set(expected)
    for (name, step), values in maps.values.items():
        assert values.shape == (1, values.shape[1], 32)
        assert torch.allclose(values.double(), expected[name][step], atol=2e-5), (name, step)


def test_mean_over_steps(pipe, expected):
    with capture_attention(pipe) as maps:
        run(pipe)
    assert maps.steps == [-1]
    for (name, _), values in maps.values.items():
        assert maps.counts[name, -1] == 3
        assert torch.allclose(values.double(), expected[name].mean(0), atol=2e-5)


def test_recording_does_not_change_the_image(pipe):
    plain = run(pipe)
    with capture_attention(pipe, tokens=[2, 6]):
        out = run(pipe)
    assert torch.allclose(out, plain, atol=1e-4)


def test_without_guidance_the_whole_batch_is_recorded(pipe):
    prompts = [PROMPT, "a dog on a blue background"]
    expected = explicit(pipe, prompt=prompts, guidance=1.0)
    with capture_attention(pipe, each_step=True) as maps:
        run(pipe, prompts, guidance=1.0)
    for (name, step), values in maps.values.items():
        assert values.shape[0] == 2
        assert torch.allclose(values.double(), expected[name][step], atol=2e-5)


def test_under_guidance_the_conditional_half_is_recorded(pipe):
    prompts = [PROMPT, "a dog on a blue background"]
    expected = explicit(pipe, prompt=prompts)
    with capture_attention(pipe, each_step=True) as maps:
        run(pipe, prompts)
    for (name, step), values in maps.values.items():
        assert values.shape[0] == 2
        assert torch.allclose(values.double(), expected[name][step], atol=2e-5)


def test_a_denoiser_called_by_hand_after_a_guided_run_is_not_taken_for_guided(pipe):
    run(pipe, steps=1)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 32, pipe.unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad(), capture_attention(pipe) as maps:
        pipe.unet(latents, 500, text)
    assert all(values.shape[0] == 2 for values in maps.values.values())


def test_tokens_as_positions_groups_words_and_tensors(pipe, expected):
    spans = find_tokens(pipe, PROMPT, ["cat face", "rocket"])
    asked = {
        "positions": [3, 6],
        "groups": [[2, 3], [6]],
        "words": spans,
        "tensor": torch.tensor([[6, 2]]),
    }
    columns = {
        "positions": [[3], [6]],
        "groups": [[2, 3], [6]],
        "words": [[2, 3], [6]],
        "tensor": [[6], [2]],
    }
    names = {"positions": ("3", "6"), "groups": ("2 3", "6"), "words": ("cat face", "rocket")}
    for kind, tokens in asked.items():
        with capture_attention(pipe, tokens=tokens) as maps:
            run(pipe)
        assert maps.names == names.get(kind, ("0", "1"))
        for (name, _), values in maps.values.items():
            mean = expected[name].mean(0)
            wanted = torch.stack([mean[..., own].sum(-1) for own in columns[kind]], -1)
            assert torch.allclose(values.double(), wanted, atol=2e-5), kind


def test_tensor_of_tokens_has_columns_for_each_sample(pipe):
    prompts = [PROMPT, "a dog on a blue background"]
    with capture_attention(pipe) as every:
        run(pipe, prompts, steps=1)
    with capture_attention(pipe, tokens=torch.tensor([[6], [2]])) as maps:
        run(pipe, prompts, steps=1)
    for key, values in maps.values.items():
        assert torch.allclose(values[0, :, 0], every.values[key][0, :, 6], atol=2e-5)
        assert torch.allclose(values[1, :, 0], every.values[key][1, :, 2], atol=2e-5)


def test_self_attention_maps(pipe):
    expected = explicit(pipe, "self", steps=2)
    with capture_attention(pipe, layers="self") as maps:
        run(pipe, steps=2)
    assert set(maps.layers) == set(expected)
    for (name, _), values in maps.values.items():
        assert values.shape[1] == values.shape[2]
        assert torch.allclose(values.double(), expected[name].mean(0), atol=2e-5)


def test_resolution_layers_and_steps(pipe):
    with capture_attention(pipe, resolution=8, steps=[1], each_step=True) as maps:
        run(pipe)
    assert set(maps.grids.values()) == {(8, 8)}
    assert maps.steps == [1]
    with capture_attention(pipe, layers=lambda layer: layer.place == "mid_block") as maps:
        run(pipe, steps=1)
    assert maps.layers and all(name.startswith("mid_block") for name in maps.layers)


def test_wide_images_have_wide_maps(pipe):
    with capture_attention(pipe, tokens=[2]) as maps:
        run(pipe, steps=1, height=64, width=96)
    assert set(maps.grids.values()) == {(16, 24), (8, 12), (4, 6)}
    assert maps.aggregate().shape == (1, 1, 16, 24)


def test_a_byte_budget_stops_clearly_and_restores(pipe):
    before = [layer.module.processor for layer in select_layers(pipe)]
    capture = capture_attention(pipe, each_step=True, max_bytes=100_000)
    with pytest.raises(BudgetError, match="`max_bytes` = 100000"), capture:
        run(pipe)
    after = [layer.module.processor for layer in select_layers(pipe)]
    assert all(one is other for one, other in zip(before, after, strict=True))
    with capture_attention(pipe, tokens=[2], max_bytes=100_000) as maps:
        run(pipe)
    assert maps.nbytes <= 100_000


def test_maps_are_detached_unless_asked(unet):
    latents = torch.randn(1, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    text = torch.randn(1, 5, 12, dtype=torch.float64)
    for wanted in (False, True):
        with capture_attention(unet, differentiable=wanted) as maps:
            unet(latents, 500, text)
        assert all(values.requires_grad == wanted for values in maps.values.values())


def test_gradient_of_a_map_loss_is_that_of_finite_differences(unet):
    generator = torch.Generator().manual_seed(0)
    latents, text = (
        torch.randn(*size, generator=generator, dtype=torch.float64)
        for size in ((2, 4, 8, 8), (2, 5, 12))
    )
    reader = MapReader(unet, tokens=[[1, 2], [4]])

    def loss(x):
        maps = reader(lambda: unet(x, 500, text)).aggregate()
        return (maps[:, 0] * maps[:, 1].square()).sum()

    wanted = latents.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(wanted), wanted)
    for _ in range(4):
        direction = torch.randn(latents.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = loss(latents + 1e-5 * direction), loss(latents - 1e-5 * direction)
        numeric = (ahead - behind) / 2e-5
        assert torch.allclose((gradient * direction).sum(), numeric, rtol=1e-6, atol=1e-12)


def test_reader_ends_the_pass_after_the_last_wanted_layer(pipe):
    counts = {"mid": 0, "up": 0, "out": 0}
    modules = {
        "mid": pipe.unet.mid_block,
        "up": pipe.unet.up_blocks[-1],
        "out": pipe.unet.conv_out,
    }

    def counting(name):
        return lambda *_: counts.__setitem__(name, counts[name] + 1)

    handles = [module.register_forward_hook(counting(name)) for name, module in modules.items()]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    text = torch.randn(1, 32, pipe.unet.config.cross_attention_dim, generator=generator)
    try:
        reader = MapReader(pipe, tokens=[2, 3], resolution=4)
        with torch.no_grad():
            whole = reader(lambda: pipe.unet(latents, 500, text))
            assert counts == {"mid": 1, "up": 1, "out": 1}
            ended = reader(lambda: pipe.unet(latents, 500, text))
        assert counts["up"] == counts["out"] == 1
    finally:
        for handle in handles:
            handle.remove()
    assert whole.layers == ended.layers
    assert all(ended.values[key].equal(values) for key, values in whole.values.items())
    with torch.no_grad(), capture_attention(pipe, tokens=[2, 3], resolution=4) as captured:
        pipe.unet(latents, 500, text)
    assert all(
        torch.allclose(captured.values[key], values, atol=1e-6)
        for key, values in whole.values.items()
    )


def test_reader_leaves_processors_as_they_were(unet):
    before = unet.attn_processors
    reader = MapReader(unet)
    for _ in range(2):
        reader(lambda: unet(torch.zeros(1, 4, 8, 8).double(), 1, torch.zeros(1, 5, 12).double()))
    after = unet.attn_processors
    assert all(after[name] is processor for name, processor in before.items())


@pytest.mark.parametrize("capture_first", [True, False])
def test_passes_of_an_update_are_no_steps_of_a_capture(pipe, capture_first):
    reader, batches = MapReader(pipe, tokens=[2]), []

    def update(step):
        batches.append(reader(lambda: step.forward(step.latents)).aggregate().shape[0])
        return step.latents

    first, second = capture_attention(pipe, each_step=True), guide_latents(pipe, update)
    with capture_attention(pipe, each_step=True) as plain:
        run(pipe, [PROMPT, PROMPT])
    if capture_first:
        with first as maps, second:
            run(pipe, [PROMPT, PROMPT])
    else:
        with second, first as maps:
            run(pipe, [PROMPT, PROMPT])
    assert batches == [2, 2, 2]
    assert maps.steps == plain.steps == [0, 1, 2]
    for key, values in plain.values.items():
        assert torch.allclose(maps.values[key], values, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([], "at least one"),
        ([32], "from 0 to 31"),
        ([-1], "from 0 to 31"),
        ([[1], []], "must name a position"),
        ([[1], [40]], "from 0 to 31"),
        (torch.tensor([[50]]), "from 0 to 31"),
    ],
)
def test_tokens_outside_the_text_are_named(pipe, tokens, said):
    with pytest.raises(AttentionError, match=said), capture_attention(pipe, tokens=tokens):
        run(pipe, steps=1)


def test_numpy_positions_are_positions(pipe):
    import numpy as np

    with capture_attention(pipe, tokens=list(np.array([2, 6]))) as maps:
        run(pipe, steps=1)
    assert maps.names == ("2", "6")
