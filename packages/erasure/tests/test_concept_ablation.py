"""Concept Ablation: its loss, what may change, and what the erasure does to a toy."""

import pytest
import torch

from unweave.diffusion_core.denoiser import Denoiser
from unweave.diffusion_core.errors import PromptError
from unweave.diffusion_core.parameters import fingerprint, select_parameters
from unweave.diffusion_core.prompts import encode_prompts
from unweave.diffusion_core.testing import tiny_pipeline, tiny_xl_pipeline
from unweave.erasure.concept_ablation import (
    CONCEPT_ABLATION_SUBSETS,
    ConceptAblation,
    ConceptAblationConfig,
    ablation_loss,
)
from unweave.erasure.protocol import Erasure, ErasureRequest

QUICK = {
    "num_images": 4,
    "views": 1,
    "num_inference_steps": 2,
    "num_steps": 3,
    "batch_size": 2,
    "lr": 1e-3,
}
REQUEST = ErasureRequest("cat", replacement="dog")


def erase(pipe, seed=0, request=REQUEST, **settings):
    config = ConceptAblationConfig(**{**QUICK, **settings})
    return ConceptAblation(config).erase(pipe, request, seed=seed, progress=False)


def inputs(pipe, count=3):
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(count, 4, 16, 16, generator=generator)
    t = torch.linspace(5, 990, count).long()
    with torch.no_grad():
        target, anchor = (encode_prompts(pipe, [prompt]) for prompt in ("a cat", "a dog"))
    return noisy, t, target, anchor


def test_defaults_are_those_of_the_authors_code():
    config = ConceptAblationConfig()
    assert (config.num_steps, config.batch_size, config.lr) == (100, 8, 8 * 2e-6)
    assert (config.num_images, config.trainable) == (1000, "cross-attention-kv")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_is_the_mean_inside_the_mask_of_each_sample(prediction_type):
    pipe = tiny_pipeline(prediction_type)
    denoiser = Denoiser.from_pipeline(pipe)
    noisy, t, target, anchor = inputs(pipe)
    mask = torch.ones(3, 1, 16, 16)
    mask[1, :, 4:] = 0
    mask[2, :, :, 1:] = 0
    with torch.no_grad():
        loss = ablation_loss(denoiser, noisy, t, target, anchor, mask)
        raw = [denoiser.predict(noisy, t, states).raw.double() for states in (target, anchor)]
    errors = (raw[0] - raw[1]).square()
    expected = (errors[0].mean() + errors[1, :, :4].mean() + errors[2, :, :, 0].mean()) / 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_anchors_prediction_is_a_constant(pipe):
    """No gradient flows through it, although it comes from the network that is trained."""
    denoiser = Denoiser.from_pipeline(pipe)
    weights = list(select_parameters(pipe.unet, "cross-attention-kv").values())
    noisy, t, target, anchor = inputs(pipe)
    loss = ablation_loss(denoiser, noisy, t, target, anchor, torch.ones(3, 1, 16, 16))
    found = torch.autograd.grad(loss, weights)
    wanted = denoiser.predict(noisy, t, anchor).raw.detach()
    errors = torch.nn.functional.mse_loss(denoiser.predict(noisy, t, target).raw, wanted)
    for gradient, expected in zip(found, torch.autograd.grad(errors, weights), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        assert ablation_loss(denoiser, noisy, t, anchor, anchor, torch.ones(3, 1, 16, 16)) == 0


def test_training_moves_the_target_to_the_anchor(pipe):
    denoiser = Denoiser.from_pipeline(pipe)
    noisy, t, target, anchor = inputs(pipe, 8)

    def distance():
        with torch.no_grad():
            mask = torch.ones(8, 1, 16, 16)
            return ablation_loss(denoiser, noisy, t, target, anchor, mask).item()

    before = distance()
    erasure = erase(pipe, num_steps=60, batch_size=4, augment=False, anchor_prompts=("a {}",))
    with erasure.apply(pipe):
        assert distance() < 0.5 * before


@pytest.mark.parametrize("trainable", CONCEPT_ABLATION_SUBSETS)
def test_only_the_chosen_parameters_change(pipe, trainable):
    before = fingerprint(pipe.unet), fingerprint(pipe.text_encoder), fingerprint(pipe.vae)
    erasure = erase(pipe, trainable=trainable)
    assert fingerprint(pipe.unet) == before[0]
    allowed = {
        name
        for role in CONCEPT_ABLATION_SUBSETS[trainable]
        for name in select_parameters(pipe.unet, role)
    }
    with erasure.apply(pipe):
        after = fingerprint(pipe.unet)
        changed = {name for name in after if after[name] != before[0][name]}
        assert changed and changed <= allowed
        assert (fingerprint(pipe.text_encoder), fingerprint(pipe.vae)) == before[1:]


@pytest.mark.parametrize(
    ("target", "given", "used"),
    [("grumpy cat", None, 1.0), ("cattle", None, 0.0), ("grumpy cat", 0.0, 0.0), ("dog", 2.0, 2.0)],
)
def test_prior_counts_when_the_target_has_the_anchors_words(pipe, target, given, used):
    erasure = erase(pipe, request=ErasureRequest(target, replacement="cat"), prior_weight=given)
    assert erasure.delta.meta.settings["prior_weight"] == used


def test_prior_is_the_denoising_loss_of_the_anchors_images(pipe):
    plain, weighted = (erase(pipe, num_steps=1, prior_weight=weight) for weight in (0.0, 1.0))
    double = erase(pipe, num_steps=1, prior_weight=2.0)
    prior = weighted.history[0] - plain.history[0]
    assert prior > 0.5, "an untrained model leaves the variance of the noise, about 1"
    assert double.history[0] - plain.history[0] == pytest.approx(2 * prior, rel=1e-4)


def test_saved_erasure_gives_the_same_outputs(pipe, tmp_path):
    erasure = erase(pipe)
    erasure.save(tmp_path / "ablation")
    noisy, t, target, _ = inputs(pipe)
    outputs = []
    for other, made in ((pipe, erasure), (tiny_pipeline(), Erasure.load(tmp_path / "ablation"))):
        with made.apply(other), torch.no_grad():
            outputs.append(Denoiser.from_pipeline(other).predict(noisy, t, target).raw)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)


def test_same_seed_gives_identical_weights(pipe):
    first, second, other = (erase(pipe, seed=seed) for seed in (1, 1, 2))
    for name, change in first.delta.deltas["unet"].items():
        assert torch.equal(change, second.delta.deltas["unet"][name])
    assert first.history == second.history != other.history


@pytest.mark.parametrize("make", [lambda: tiny_pipeline("v_prediction"), tiny_xl_pipeline])
def test_works_on_velocity_models_and_xl(make):
    pipe = make()
    assert set(erase(pipe, prior_weight=1.0).delta.deltas["unet"]) == set(
        select_parameters(pipe.unet, "cross-attention-kv")
    )


def test_missing_anchor_is_named_before_any_work(pipe):
    with pytest.raises(PromptError, match='"painting" for the style'):
        erase(pipe, request=ErasureRequest("monet", kind="style"))


@pytest.mark.parametrize(
    "settings", [{"num_steps": 0}, {"trainable": "kv"}, {"prior_weight": -1.0}, {"views": 0}]
)
def test_bad_settings_are_named(settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}`"):
        ConceptAblationConfig(**settings)
