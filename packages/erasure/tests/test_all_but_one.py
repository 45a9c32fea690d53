"""All but One is a reconstruction: these tests hold it to its formalisation, not to the paper."""

import pytest
import torch
from torch import nn

from unweave.diffusion_core.denoiser import Denoiser
from unweave.diffusion_core.errors import PromptError, SelectionError
from unweave.diffusion_core.parameters import fingerprint, select_parameters
from unweave.diffusion_core.prompts import encode_conditions
from unweave.diffusion_core.teacher import frozen_teacher
from unweave.diffusion_core.testing import tiny_pipeline, tiny_xl_pipeline
from unweave.erasure.all_but_one import (
    TRAJECTORIES,
    AllButOne,
    AllButOneConfig,
    branches,
    concept_similarity,
    guidance_loss,
    null_loss,
)
from unweave.erasure.esd import ESD_SUBSETS, esd_loss, trainable_parameters
from unweave.erasure.protocol import ErasureRequest

QUICK = {
    "num_steps": 3,
    "num_inference_steps": 4,
    "num_trajectories": 2,
    "refresh_every": 2,
    "lr": 1e-3,
}


def erase(pipe, seed=0, replacement=None, **settings):
    request = ErasureRequest("cat", replacement=replacement)
    eraser = AllButOne(AllButOneConfig(**{**QUICK, **settings}))
    return eraser.erase(pipe, request, seed=seed, progress=False)


def test_losses_by_hand():
    conditional, unconditional = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 0.0])
    assert guidance_loss(conditional, unconditional, torch.tensor([1.0, 0.0])).item() == 1.0
    assert null_loss(unconditional, torch.tensor([0.0, 2.0])).item() == 2.5
    half = guidance_loss(*(t.half() for t in (conditional, unconditional, unconditional)))
    assert half.dtype == torch.float32


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_the_stop_gradient_spares_the_unconditional_branch(stop_gradient):
    conditional, unconditional = (torch.ones(3, requires_grad=True) for _ in range(2))
    guidance_loss(conditional, unconditional, torch.ones(3), stop_gradient).backward()
    assert conditional.grad.abs().sum() > 0
    assert (unconditional.grad is None) == stop_gradient


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_guidance_terms_of_noise_and_velocity_are_multiples(prediction_type):
    pipe = tiny_pipeline(prediction_type)
    denoiser = Denoiser.from_pipeline(pipe)
    noisy, t = (
        torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
        torch.tensor([100, 900]),
    )
    with torch.no_grad():
        concept, empty = (encode_conditions(pipe, [text]) for text in ("a cat", ""))
        raw, null = branches(denoiser, noisy, t, concept, empty)
        first, second = (denoiser.predict(noisy, t, states) for states in (concept, empty))
    torch.testing.assert_close(raw, first.raw, rtol=0, atol=1e-5)
    torch.testing.assert_close(null, second.raw, rtol=0, atol=1e-5)
    alpha, _ = denoiser.rates(t, noisy)
    factor = alpha if prediction_type == "v_prediction" else 1
    torch.testing.assert_close(
        first.epsilon - second.epsilon, factor * (raw - null), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_with_a_frozen_null_branch_gradients_are_those_of_esd(prediction_type):
    """The null branch is the frozen model, as of an edit that is off for the empty prompt."""
    pipe = tiny_pipeline(prediction_type)
    pipe.text_encoder.requires_grad_(False)
    parameters = trainable_parameters(pipe.unet, "esd-all")
    teacher = Denoiser(frozen_teacher(pipe.unet, parameters), pipe.scheduler)
    student = Denoiser.from_pipeline(pipe)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    noisy = torch.randn(2, 4, 16, 16, generator=generator)
    t = torch.tensor([300, 800])
    concept, empty = (encode_conditions(pipe, [text]) for text in ("cat", ""))
    guided, null = branches(teacher, noisy, t, concept, empty)
    ours = guidance_loss(student.predict(noisy, t, concept).raw, null, -0.7 * (guided - null))
    esd = esd_loss(student, teacher, noisy, t, concept, empty, empty, 0.7)
    torch.testing.assert_close(ours, esd, rtol=1e-5, atol=0)
    gradients = [
        torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for loss in (ours, esd)
    ]
    norm = sum(g.square().sum() for g in gradients[1] if g is not None).sqrt()
    pairs = [(a, b) for a, b in zip(*gradients, strict=True) if b is not None]
    assert len(pairs) > 20
    assert sum((a - b).square().sum() for a, b in pairs).sqrt() < 1e-5 * norm


def test_a_null_branch_that_moved_makes_the_difference_to_esd(pipe):
    """Where the null prediction drifted, the same conditional prediction has another loss."""
    original = torch.zeros(4)
    drifted = original + 0.5
    conditional, guided = torch.ones(4), torch.full((4,), 2.0)
    target = -(guided - original)
    assert guidance_loss(conditional, original, target) == nn.functional.mse_loss(
        conditional, original - (guided - original)
    )
    assert guidance_loss(conditional, drifted, target) != guidance_loss(
        conditional, original, target
    )


@pytest.mark.parametrize("trainable", ESD_SUBSETS)
def test_only_the_chosen_parameters_change(pipe, trainable):
    before = fingerprint(pipe.unet), fingerprint(pipe.text_encoder), fingerprint(pipe.vae)
    erasure = erase(pipe, trainable=trainable)
    assert fingerprint(pipe.unet) == before[0]
    with erasure.apply(pipe):
        after = fingerprint(pipe.unet)
        changed = {name for name in after if after[name] != before[0][name]}
        assert changed and changed <= set(select_parameters(pipe.unet, ESD_SUBSETS[trainable]))
        assert (fingerprint(pipe.text_encoder), fingerprint(pipe.vae)) == before[1:]


@pytest.mark.parametrize(
    ("build", "trajectories"),
    [*((tiny_pipeline, source) for source in TRAJECTORIES), (tiny_xl_pipeline, "teacher")],
)
def test_training_lowers_the_guidance_loss_wherever_latents_come_from(build, trajectories):
    pipe = build()
    parameters = trainable_parameters(pipe.unet, "esd-x")
    teacher = Denoiser(frozen_teacher(pipe.unet, parameters), pipe.scheduler, pipe.vae_scale_factor)
    student = Denoiser.from_pipeline(pipe)
    generator = torch.Generator().manual_seed(0)
    noisy, t = torch.randn(8, 4, 16, 16, generator=generator), torch.linspace(50, 950, 8).long()
    with torch.no_grad():
        concept, other, empty = (encode_conditions(pipe, [x]) for x in ("cat", "dog", ""))

    def distance():
        with torch.no_grad():
            guided, null = branches(teacher, noisy, t, other, empty)
            raw, raw_null = branches(student, noisy, t, concept, empty)
        return guidance_loss(raw, raw_null, guided - null).item()

    before = distance()
    erasure = erase(
        pipe, replacement="dog", trajectories=trajectories, num_steps=50, batch_size=4, lr=3e-3
    )
    with erasure.apply(pipe):
        assert distance() < 0.6 * before


def test_from_t_max_up_there_is_nothing_to_learn(pipe):
    """With the bound below every timestep the target is what the model says already."""
    with pytest.raises(SelectionError, match="must change at least one"):
        erase(pipe, t_max=1e-4)
    half, whole = (erase(pipe, t_max=t_max, batch_size=32).history[0] for t_max in (0.5, 1.0))
    assert 0 < half < whole


def test_the_alternative_the_direction_and_more_pairs_change_the_result(pipe):
    plain = erase(pipe)
    variants = [
        erase(pipe, replacement="dog"),
        erase(pipe, target="negative"),
        erase(pipe, pairs=(("car", "bus"),)),
        erase(pipe, templates=("a {}", "{} on red")),
        erase(pipe, stop_gradient=False, null_weight=0.1),
    ]
    assert len({tuple(e.history) for e in [plain, *variants]}) == 6


def test_the_artifact_says_how_similar_concept_and_alternative_are(pipe):
    erasure = erase(pipe, replacement="dog", pairs=(("car", ""), ("car", "care")))
    near = concept_similarity(pipe, "car", "care")
    assert erasure.delta.meta.settings["similarity"] == [
        concept_similarity(pipe, "cat", "dog"),
        None,
        near,
    ]
    assert concept_similarity(pipe, "cat", "cat") == pytest.approx(1)
    assert near < 1


def test_same_seed_gives_identical_weights(pipe):
    first, second, other = (erase(pipe, seed=seed) for seed in (1, 1, 2))
    for name, change in first.delta.deltas["unet"].items():
        assert torch.equal(change, second.delta.deltas["unet"][name])
    assert first.history == second.history != other.history


def test_without_weight_on_the_null_score_it_refuses():
    with pytest.raises(ValueError, match="`null_weight` must be positive, as without it"):
        AllButOneConfig(null_weight=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"eta": 0},
        {"target": "zero"},
        {"trajectories": "random"},
        {"trainable": "xattn"},
        {"t_max": 1.5},
        {"batch_size": 0},
        {"templates": ("cat",)},
    ],
)
def test_bad_settings_are_named(settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}`"):
        AllButOneConfig(**settings)


@pytest.mark.parametrize("pairs", [(("", "dog"),), (("cat",),)])
def test_bad_pairs_are_named(pairs):
    with pytest.raises(PromptError, match="`pairs`"):
        AllButOneConfig(pairs=pairs)
