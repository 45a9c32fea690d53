"""Anagram-MTL: the parts against hand-made cases, the baseline, and what all parts bring."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, IFPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from unweave.attention_tools import AttentionError, MapError, MapReader, TokenError
from unweave.attention_tools.anagram import (
    AVERAGING,
    AnagramConfig,
    AnagramMTL,
    anti_segregation_loss,
    balancing_weights,
    concept_maps,
    concept_spans,
    last_word,
    rectifying_scale,
)
from unweave.attention_tools.errors import ViewError
from unweave.attention_tools.predictions import predicted_image, predicted_noise, scaled_noise
from unweave.attention_tools.scores import CLIPScorer, alignment, concealment
from unweave.attention_tools.views import View, get_view
from unweave.emoji_world import load_clip

PROMPTS = ("a painting of a red fox", "a painting of an old tree")
SIDE = 32
NOISE = 12288


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def steady_scorer(*scores: float):
    def score(views, t, prompts):
        return torch.diag(torch.tensor(scores))

    return score


# Rectification


def correlated(rho: float, tasks: int, generator: torch.Generator, pixels: int = NOISE):
    """Noises (T, pixels) of mean 0 and variance 1 whose correlations are about `rho`."""
    matrix = torch.full((tasks, tasks), float(rho)).fill_diagonal_(1.0)
    noises = torch.linalg.cholesky(matrix) @ torch.randn(tasks, pixels, generator=generator)
    return (noises - noises.mean(1, keepdim=True)) / noises.std(1, keepdim=True)


@pytest.mark.parametrize("rho", (-0.2, 0, 0.3, 0.7, 0.95))
@pytest.mark.parametrize("tasks", (2, 3, 4))
def test_rectified_noise_has_variance_one(rho, tasks):
    generator = seeded(tasks)
    for _ in range(10):
        noises = correlated(rho, tasks, generator)
        spacings = torch.rand(tasks, generator=generator).log()
        weights = spacings / spacings.sum()  # Dirichlet(1, ..., 1)
        mixed = weights @ noises
        scale = rectifying_scale(noises[:, None, None], weights)
        assert abs(float((scale * mixed).var()) - 1) < 0.03


@pytest.mark.parametrize("rho", (-0.2, 0, 0.3, 0.7, 0.95))
@pytest.mark.parametrize("tasks", (2, 3, 4))
def test_averaged_noise_shrinks(rho, tasks):
    mixed = correlated(rho, tasks, seeded(tasks)).mean(0)
    expected = (1 + (tasks - 1) * rho) / tasks
    assert abs(float(mixed.var()) - expected) < 0.03
    assert 0.09 < expected < 0.98
    if tasks == 2 and rho == 0:
        assert abs(float(mixed.var()) - 0.5) < 0.03


def test_pearson_keeps_a_variance_of_four_and_raw_does_not():
    noises = 2 * correlated(0.4, 2, seeded(0), 400_000)
    weights = torch.tensor([0.4, 0.6])
    scales = {
        kind: rectifying_scale(noises[:, None, None], weights, kind) for kind in ("pearson", "raw")
    }
    found = {kind: float((scale * (weights @ noises)).var()) for kind, scale in scales.items()}
    assert abs(found["pearson"] - 4) < 0.1
    assert abs(found["raw"] - 2.2) < 0.1


def test_noises_that_cancel_give_a_finite_scale():
    noise = torch.randn(1, 3, 8, 8, generator=seeded(0))
    scale = rectifying_scale(torch.cat([noise, -noise])[None], torch.tensor([[0.5, 0.5]]))
    assert scale.tolist() == pytest.approx([10.0])


@pytest.mark.parametrize("kind", ("epsilon", "v_prediction", "sample"))
def test_scaling_an_output_scales_its_noise(kind):
    x, output = torch.randn(2, 2, 3, 8, 8, generator=seeded(0), dtype=torch.float64)
    signal, noise = 0.6, 0.8
    scale = torch.tensor([1.3, 0.7])
    new = scaled_noise(x, output, scale, signal, noise, kind)
    before = predicted_noise(x, output, signal, noise, kind)
    after = predicted_noise(x, new, signal, noise, kind)
    torch.testing.assert_close(after, scale.double().reshape(2, 1, 1, 1) * before)
    image = predicted_image(x, new, signal, noise, kind)
    torch.testing.assert_close(signal * image + noise * after, x)


@pytest.mark.parametrize("kind", ("v_prediction", "sample"))
def test_without_signal_there_is_nothing_to_scale(kind):
    x, output = torch.randn(2, 1, 3, 8, 8, generator=seeded(0))
    assert torch.equal(scaled_noise(x, output, torch.tensor([1.3]), 0.0, 1.0, kind), output)


# Balancing


def test_weights_are_those_of_the_paper():
    scores = torch.tensor([0.30, 0.15])
    torch.testing.assert_close(balancing_weights(scores, 0, 30), torch.tensor([1 / 3, 2 / 3]))
    late = balancing_weights(scores, 29, 30)
    torch.testing.assert_close(late, torch.tensor([0.204, 0.796]), atol=5e-4, rtol=0)


def test_permuting_tasks_permutes_weights():
    scores = torch.tensor([0.3, 0.15, 0.2, 0.4])
    order = torch.tensor([2, 0, 3, 1])
    weights = balancing_weights(scores, 7, 30)
    torch.testing.assert_close(balancing_weights(scores[order], 7, 30), weights[order])


def test_scores_of_zero_and_less_give_finite_weights():
    weights = balancing_weights(torch.tensor([[0.3, 0.0], [-0.2, -0.1]]), 29, 30)
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2))
    torch.testing.assert_close(weights[1], torch.tensor([0.5, 0.5]))


# Anti-segregation


def test_loss_of_equal_disjoint_and_wanted_maps():
    equal = torch.rand(1, 4, 4, generator=seeded(0)).expand(2, 4, 4)
    assert float(anti_segregation_loss(equal)) == pytest.approx(0.05)
    apart = torch.tensor([[[1.0, 0.0]], [[0.0, 3.0]]])
    assert float(anti_segregation_loss(apart)) == pytest.approx(0.45)
    wanted = torch.tensor([[[0.9, 0.1]], [[1.0, 0.0]]])
    assert float(anti_segregation_loss(wanted)) == pytest.approx(0, abs=1e-6)
    three = torch.eye(3).reshape(3, 1, 3)
    assert float(anti_segregation_loss(three)) == pytest.approx(0.40)


def test_gradient_changes_sign_across_the_target():
    def slope(share: float) -> float:
        at = torch.tensor(share, dtype=torch.float64, requires_grad=True)
        maps = torch.stack([torch.stack([at, 1 - at]), torch.tensor([1.0, 0.0]).double()])
        anti_segregation_loss(maps[:, None]).backward()
        return float(at.grad)

    assert slope(0.85) < 0 < slope(0.95)


def test_loss_agrees_with_finite_differences():
    maps = torch.rand(2, 3, 4, 4, generator=seeded(0), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(anti_segregation_loss, maps)


def test_one_map_is_refused():
    with pytest.raises(MapError, match="two views or more"):
        anti_segregation_loss(torch.ones(1, 4, 4))


@pytest.fixture(scope="module")
def tokenizer():
    """A unigram tokenizer of the T5 form that knows few words whole."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁an", "▁of", "▁painting", "▁red", "▁fox"]
    pieces += [*"abcdefghijklmnopqrstuvwxyz", "▁old", "▁tree", "flower", "▁sun", ",", ".", "!"]
    scored = [(piece, -10.0 if len(piece) == 1 else -2.0) for piece in pieces]
    inner = Tokenizer(models.Unigram(scored, unk_id=2))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=77,
    )


@pytest.fixture(scope="module")
def pixel_pipe(tokenizer):
    """A tiny pipeline of the DeepFloyd IF form: T5, added-KV attention, learned variances."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0
        )
        unet = UNet2DConditionModel(
            sample_size=SIDE,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            in_channels=3,
            out_channels=6,
            cross_attention_dim=32,
            encoder_hid_dim=32,
            attention_head_dim=8,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            cross_attention_norm="group_norm",
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
            norm_num_groups=8,
        )
        # Random attention is nearly even: sharper scores give concepts places of their own.
        for name, parameter in unet.named_parameters():
            if name.endswith(("to_q.weight", "add_k_proj.weight")):
                parameter.data.mul_(4)
        encoder = T5EncoderModel(text)
    pipe = IFPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder.double().eval(),
        unet=unet.double().eval(),  # so that 1e-6 tells a formula from rounding
        scheduler=DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            thresholding=True,
            dynamic_thresholding_ratio=0.95,
            sample_max_value=1.0,
            variance_type="learned_range",
        ),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def overlaps(pixel_pipe):
    """The loss of x under the tiny pipeline, as a function that counts for gradients."""
    views = [get_view("identity"), get_view("rotate_cw")]
    spans = concept_spans(pixel_pipe, PROMPTS, ("fox", "tree"))
    plain = SimpleNamespace(unet=pixel_pipe.unet, do_classifier_free_guidance=False)
    reader = MapReader(plain, tokens=spans, resolution=SIDE // 2)
    text, _ = pixel_pipe.encode_prompt(list(PROMPTS), False, device="cpu")

    def maps(x):
        return concept_maps(pixel_pipe.unet, x, torch.tensor(500), text, views, reader)

    return maps


def moved(x, loss_of, lr, steps):
    """x after gradient descent, and the losses (steps + 1, n) before each step and at the end."""
    losses = []
    for _ in range(steps):
        x = x.detach().requires_grad_()
        losses.append(loss_of(x))
        (gradient,) = torch.autograd.grad(losses[-1].sum(), x)
        x = x - lr * gradient
    with torch.no_grad():
        losses.append(loss_of(x))
    return x.detach(), torch.stack(losses).detach()


def test_one_step_lowers_the_loss(overlaps):
    x = torch.randn(20, 3, SIDE, SIDE, generator=seeded(0), dtype=torch.float64)
    _, losses = moved(x, lambda x: anti_segregation_loss(overlaps(x)), 5.0, 1)
    assert (losses[1] < losses[0]).sum() >= 18


def test_ten_steps_close_a_fifth_of_the_gap_of_segregated_maps(overlaps):
    def overlap(x):
        return 0.45 - anti_segregation_loss(overlaps(x))

    x = torch.randn(4, 3, SIDE, SIDE, generator=seeded(0), dtype=torch.float64)
    segregated, before = moved(x, overlap, 20.0, 12)
    _, losses = moved(segregated, lambda x: anti_segregation_loss(overlaps(x)), 5.0, 10)
    assert (before[-1] < before[0]).all()
    assert (losses[-1] < losses[0]).all()
    assert losses[-1].mean() <= 0.8 * losses[0].mean()


# The sampler


def run(pipe, config, views=("identity", "flip"), prompts=PROMPTS, scorer=None, seed=0, **more):
    arguments = {"num_inference_steps": 4, "guidance_scale": 3.0, **more}
    maker = AnagramMTL(pipe, config, scorer=scorer or steady_scorer(0.3, 0.2))
    return maker(list(prompts), list(views), generator=seeded(seed), **arguments)


def averaged(pipe, views, prompts, seed, steps, guidance):
    """Visual anagrams by their definition: the mean of guided noises, view after view."""
    pipe.scheduler.set_timesteps(steps)
    generator = seeded(seed)
    x = torch.randn(1, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    text, empty = pipe.encode_prompt(list(prompts), True, device="cpu")
    for t in pipe.scheduler.timesteps:
        noises, variances = [], []
        for k, view in enumerate(views):
            with torch.no_grad():
                seen = view.view(x)
                plain = pipe.unet(seen, t, encoder_hidden_states=empty[k : k + 1]).sample
                prompted = pipe.unet(seen, t, encoder_hidden_states=text[k : k + 1]).sample
            guided = plain[:, :3] + guidance * (prompted[:, :3] - plain[:, :3])
            noises.append(view.inverse_view(guided))
            variances.append(view.inverse_map(prompted[:, 3:]))
        mixed = torch.cat([torch.stack(noises).mean(0), torch.stack(variances).mean(0)], 1)
        x = pipe.scheduler.step(mixed, t, x, generator=generator).prev_sample
    return (x / 2 + 0.5).clamp(0, 1).float()


@pytest.mark.parametrize("second", ("flip", "rotate_cw", "negate", "jigsaw"))
def test_with_everything_off_it_is_the_average_of_views(pixel_pipe, second):
    views = [get_view("identity"), get_view(second)]
    ours = run(pixel_pipe, AVERAGING, views)
    theirs = averaged(pixel_pipe, views, PROMPTS, 0, 4, 3.0)
    torch.testing.assert_close(ours.pixels, theirs, atol=1e-6, rtol=0)


def test_one_identity_view_is_the_plain_pixel_pipeline(pixel_pipe):
    theirs = pixel_pipe(
        PROMPTS[0], num_inference_steps=4, guidance_scale=3.0, generator=seeded(1), output_type="pt"
    ).images
    for config in (AVERAGING, AnagramConfig()):
        ours = run(pixel_pipe, config, ["identity"], PROMPTS[:1], seed=1)
        torch.testing.assert_close(
            ours.pixels, (theirs / 2 + 0.5).clamp(0, 1).float(), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("guidance", (1.0, 4.0))
def test_one_identity_view_is_the_plain_latent_pipeline(pipe, guidance):
    prompt, settings = "a cat face", {"num_inference_steps": 3, "guidance_scale": guidance}
    theirs = pipe(prompt, generator=seeded(2), output_type="pt", **settings).images
    ours = run(pipe, AnagramConfig(), ["identity"], [prompt], seed=2, **settings)
    torch.testing.assert_close(ours.pixels, theirs, atol=1e-5, rtol=0)


def test_learning_rate_zero_is_no_anti_segregation(pixel_pipe):
    off = run(pixel_pipe, AnagramConfig(anti_segregation=False))
    zero = run(pixel_pipe, AnagramConfig(lr=0.0))
    on = run(pixel_pipe, AnagramConfig())
    assert torch.equal(zero.pixels, off.pixels)
    assert not torch.equal(on.pixels, off.pixels)


def test_record_tells_every_step_and_is_json(pixel_pipe):
    made = run(pixel_pipe, AnagramConfig(), num_images=2)
    record = json.loads(json.dumps(made.record))
    assert record["prompts"] == list(PROMPTS)
    assert record["views"] == ["identity", "flip"]
    assert record["concepts"] == ["fox", "tree"]
    assert record["seeds"] == [0]
    steps = record["steps"]
    assert [step["L"] is None for step in steps] == [False, False, False, True]
    for index, step in enumerate(steps):
        weights = balancing_weights(torch.tensor([0.3, 0.2]), index, 4)
        torch.testing.assert_close(torch.tensor(step["alpha"]), weights.expand(2, 2))
        torch.testing.assert_close(torch.tensor(step["s"]), torch.tensor([[0.3, 0.2]] * 2))
        assert len(step["c"]) == 2 and all(1 <= c <= 10 for c in step["c"])


def test_images_and_strip(pixel_pipe):
    made = run(pixel_pipe, AVERAGING, num_images=2)
    assert [image.size for image in made.images] == [(SIDE, SIDE)] * 2
    assert made.strip(1).size == (2 * SIDE, SIDE)
    torch.testing.assert_close(made.seen()[1], made.pixels.flip(-2))


def test_images_of_a_batch_are_those_made_alone(pixel_pipe):
    maker = AnagramMTL(pixel_pipe, scorer=steady_scorer(0.3, 0.2))
    settings = {"views": ["identity", "flip"], "num_inference_steps": 3}
    both = maker(PROMPTS, generator=[seeded(0), seeded(1)], num_images=2, **settings)
    alone = maker(PROMPTS, generator=seeded(1), **settings)
    torch.testing.assert_close(both.pixels[1], alone.pixels[0], atol=1e-4, rtol=1e-4)


def test_equal_views_are_not_taken_for_guidance(pixel_pipe):
    made = run(pixel_pipe, AnagramConfig(), ["identity", "identity"])
    assert made.record["steps"][0]["L"] is not None


def test_the_pipeline_is_left_as_it_was(pixel_pipe):
    processors = pixel_pipe.unet.attn_processors
    run(pixel_pipe, AnagramConfig())
    after = pixel_pipe.unet.attn_processors
    assert all(after[name] is processor for name, processor in processors.items())
    assert all(parameter.requires_grad for parameter in pixel_pipe.unet.parameters())


def test_three_views_of_latents_with_an_ordinary_clip(pipe):
    clip, middle, given = load_clip(), (0.5, 0.5, 0.5), []
    inner = CLIPScorer(clip.model, clip.tokenizer, mean=middle, std=middle)

    def scorer(views, t, prompts):
        given.append(views)
        return inner(views, t, prompts)

    prompts = ["a cat face", "a rocket", "a pizza"]
    made = run(pipe, AnagramConfig(), ["identity", "flip", "rotate_cw"], prompts, scorer)
    assert made.pixels.shape == (1, 3, 64, 64)
    assert given[0].shape == (3, 3, 64, 64)
    assert min(float(views.min()) for views in given) >= -1
    assert [step["L"] is None for step in made.record["steps"]] == [False, False, False, True]
    text = clip.text_features(prompts)
    wanted = clip.image_features(given[0] / 2 + 0.5) @ text.T
    torch.testing.assert_close(inner(given[0], 0.0, prompts), wanted, atol=1e-5, rtol=1e-5)


def test_noisy_views_are_given_when_asked_for(pixel_pipe):
    given = []

    def scorer(views, t, prompts):
        given.append((views, t))
        return torch.full((2, 2), 0.2)

    run(pixel_pipe, AnagramConfig(score_on="noisy"), scorer=scorer)
    noise = torch.randn(1, 3, SIDE, SIDE, generator=seeded(0), dtype=torch.float64)
    assert torch.equal(given[0][0][0], noise[0])
    assert torch.equal(given[0][0][1], noise[0].flip(-2))
    assert given[0][1] == float(pixel_pipe.scheduler.timesteps[0])


# Concept spans


def test_spans_of_capitals_punctuation_and_pieces(pixel_pipe, tokenizer):
    prompts = ["A painting of a SUNFLOWER!", "a Red fox, painting", "a old tree."]
    spans = concept_spans(pixel_pipe, prompts, ["Sunflower", "red FOX", last_word(prompts[2])])
    texts = []
    for prompt, span in zip(prompts, spans, strict=True):
        ids = tokenizer(prompt.lower()).input_ids
        texts.append(tokenizer.decode([ids[at] for at in span]).strip(" ,.!"))
    assert texts == ["sunflower", "red fox", "tree"]
    assert len(spans[0]) > 1


def test_absent_concept_is_named(pixel_pipe):
    with pytest.raises(TokenError, match="'bear' is not among the words"):
        run(pixel_pipe, AnagramConfig(), concepts=["fox", "bear"])
    with pytest.raises(TokenError, match="2 prompts need as many"):
        run(pixel_pipe, AnagramConfig(), concepts=["fox"])


# Bad input


def test_balancing_without_a_scorer_says_so(pixel_pipe):
    with pytest.raises(AttentionError, match=r"needs a `scorer`.*balancing=False"):
        AnagramMTL(pixel_pipe)


def test_other_pipelines_are_refused():
    with pytest.raises(AttentionError, match="SimpleNamespace has no `unet`"):
        AnagramMTL(SimpleNamespace(), AVERAGING)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rectification": "rank"}, "rectification"),
        ({"score_on": "x0"}, "score_on"),
        ({"smallest_score": 0.0}, "smallest_score"),
        ({"inner_steps": 0}, "inner_steps"),
    ],
)
def test_settings_are_checked(settings, named):
    with pytest.raises(AttentionError, match=f"`{named}`"):
        AnagramConfig(**settings)


def test_prompts_and_views_must_pair(pixel_pipe):
    with pytest.raises(AttentionError, match="of one length"):
        run(pixel_pipe, AVERAGING, ["identity"])
    with pytest.raises(AttentionError, match="of one length"):
        AnagramMTL(pixel_pipe, AVERAGING)("fox", ["flip"])


def test_maps_that_no_layer_has_are_named(pixel_pipe):
    with pytest.raises(MapError, match=r"maps of \(5, 5\).*`map_resolution`"):
        run(pixel_pipe, AnagramConfig(map_resolution=5))


def test_wrong_scores_are_named(pixel_pipe):
    with pytest.raises(AttentionError, match=r"cosines \(2, 2\)"):
        run(pixel_pipe, AnagramConfig(), scorer=lambda *_: torch.ones(2))


def test_view_that_fits_no_image_of_the_pipeline_is_named(pixel_pipe):
    def turned(x):
        return x.flip(-1) if x.shape[-1] == 64 else x[..., :1] * x

    with pytest.raises(ViewError, match=r"'mine' cannot be used on 32x32"):
        run(pixel_pipe, AVERAGING, ["identity", View("mine", turned, turned)])


# Measures of anagrams


def test_alignment_and_concealment():
    scores = torch.tensor([[0.30, 0.10], [0.20, 0.25]])
    assert float(alignment(scores)) == pytest.approx(0.25)
    rows, columns = (scores / 0.1).softmax(1).diagonal(), (scores / 0.1).softmax(0).diagonal()
    wanted = float((rows + columns).mean() / 2)
    assert float(concealment(scores, 0.1)) == pytest.approx(wanted)


# End to end in a world that can be computed: mixtures of patterns, whose denoiser is exact


class PatternDenoiser(nn.Module):
    """The exact denoiser of two classes of 16x16 patterns: a mixture of Gaussians around them.

    Its attention does not change the output. A place asks for a concept as far as the class's
    posterior mean agrees there with x, so maps say where the concept is.
    """

    def __init__(self, schedule: DDIMScheduler, patterns: int = 6, spread: float = 0.5) -> None:
        super().__init__()
        fields = torch.randn(2, patterns, 1, 16, 16, generator=seeded(7))
        smooth = nn.functional.avg_pool2d(fields.flatten(0, 1), 3, 1, 1)
        smooth = smooth / smooth.std((1, 2, 3), keepdim=True)
        contrast = torch.tensor([0.075, 0.045]).reshape(2, 1, 1, 1, 1)  # one class dominates
        self.register_buffer("patterns", contrast * smooth.unflatten(0, (2, patterns)))
        self.signal = schedule.alphas_cumprod
        self.spread = spread
        self.config = SimpleNamespace(in_channels=1, sample_size=16)
        attention = Attention(2, cross_attention_dim=2, heads=1, dim_head=2, bias=False)
        for projection in (attention.to_q, attention.to_k, attention.to_v):
            projection.weight.data.copy_(torch.eye(2))
        self.up_blocks = nn.ModuleList([attention])
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        signal = self.signal[int(timestep)] ** 0.5
        variance = 1 - signal**2 + (signal * self.spread) ** 2
        wanted = encoder_hidden_states.sum(1) > 0
        wanted = wanted | ~wanted.any(1, keepdim=True)
        away = sample[:, None, None] - signal * self.patterns
        logs = -away.square().sum((3, 4, 5)) / (2 * variance)
        means = self.patterns + signal * self.spread**2 / variance * away
        within = torch.einsum("bkm,bkmchw->bkchw", logs.softmax(2), means)
        between = logs.logsumexp(2).masked_fill(~wanted, -torch.inf).softmax(1)
        clean = torch.einsum("bk,bkchw->bchw", between, within)
        evidence = nn.functional.avg_pool2d((within * sample[:, None]).mean(2), 2)
        asked = self.up_blocks[0](evidence.flatten(2).transpose(1, 2), encoder_hidden_states)
        noise = (sample - signal * clean) / (1 - signal**2) ** 0.5
        return (noise + 0 * asked.sum(),)

    def class_probabilities(self, images):
        """Which class an image (..., 1, 16, 16) is of, (..., 2), by Bayes' rule."""
        away = (images[..., None, None, :, :, :] - self.patterns).square().sum((-3, -2, -1))
        return (-away / (2 * self.spread**2)).logsumexp(-1).softmax(-1)

    def scores(self, views, t, prompts):
        """How far each view is of each class, (T, 2)."""
        return self.class_probabilities(views)


@pytest.fixture(scope="module")
def toy(tokenizer):
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")

    def encode_prompt(prompt, do_classifier_free_guidance, **_):
        ids = tokenizer(prompt, padding="max_length", max_length=6, return_tensors="pt").input_ids
        names = torch.tensor(tokenizer.convert_tokens_to_ids(["▁fox", "▁tree"]))
        text = 3.0 * (ids[..., None] == names).float()
        return text, torch.zeros_like(text) if do_classifier_free_guidance else None

    return SimpleNamespace(
        unet=PatternDenoiser(scheduler),
        scheduler=scheduler,
        encode_prompt=encode_prompt,
        tokenizer=tokenizer,
    )


@pytest.fixture(scope="module")
def toy_results(toy):
    """Probabilities of the right class in each view, (n, T), by method, for 64 seeds."""
    parts = {"rectification": None, "anti_segregation": False}
    configs = {"all": AnagramConfig(), "averaging": AVERAGING, "balancing": AnagramConfig(**parts)}
    results = {}
    for name, config in configs.items():
        made = AnagramMTL(toy, config, scorer=toy.unet.scores)(
            ["a fox", "a tree"],
            ["identity", "flip"],
            generator=[seeded(seed) for seed in range(64)],
            num_images=64,
            guidance_scale=4.0,
        )
        found = toy.unet.class_probabilities(2 * made.seen() - 1)
        results[name] = torch.stack([found[0, :, 0], found[1, :, 1]], dim=1)
    return results


def test_all_parts_align_better_than_averaging(toy_results):
    gain = toy_results["all"].amin(1) - toy_results["averaging"].amin(1)
    error = gain.std() / len(gain) ** 0.5
    assert gain.mean() >= 2 * error


def test_balancing_alone_evens_the_views(toy_results):
    apart = {name: (found[:, 0] - found[:, 1]).abs() for name, found in toy_results.items()}
    assert apart["balancing"].mean() < apart["averaging"].mean()
