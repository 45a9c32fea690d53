import pytest
import torch
from torch import nn

from unweave.diffusion_core.denoiser import Denoiser
from unweave.diffusion_core.errors import SelectionError
from unweave.diffusion_core.parameters import fingerprint, select_parameters
from unweave.diffusion_core.prompts import encode_prompts
from unweave.diffusion_core.teacher import frozen_teacher
from unweave.diffusion_core.testing import tiny_pipeline
from unweave.erasure.esd import ESD, ESD_SUBSETS, ESDConfig, esd_loss, trainable_parameters
from unweave.erasure.protocol import ErasureRequest

QUICK = {"num_steps": 3, "num_inference_steps": 4, "lr": 1e-3}


def erase(pipe, seed=0, replacement=None, **settings):
    request = ErasureRequest("cat", replacement=replacement)
    return ESD(ESDConfig(**{**QUICK, **settings})).erase(pipe, request, seed=seed, progress=False)


def test_defaults_are_those_of_the_current_code():
    config = ESDConfig()
    assert (config.lr, config.num_steps, config.eta) == (5e-5, 200, 2.0)
    assert (config.guidance_scale, config.num_inference_steps) == (3.0, 50)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_erase_from_with_eta_2_has_the_gradients_of_the_paper_with_eta_1(prediction_type):
    pipe = tiny_pipeline(prediction_type)
    pipe.text_encoder.requires_grad_(False)
    parameters = trainable_parameters(pipe.unet, "esd-all")
    teacher = Denoiser(frozen_teacher(pipe.unet, parameters), pipe.scheduler)
    student = Denoiser.from_pipeline(pipe)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        concept, empty = encode_prompts(pipe, ["cat"]), encode_prompts(pipe, [""])
    noisy, t = torch.randn(1, 4, 16, 16, generator=generator), torch.tensor([400])
    gradients = []
    for start, eta in ((concept, 2.0), (empty, 1.0)):
        loss = esd_loss(student, teacher, noisy, t, concept, start, empty, eta)
        gradients.append(torch.autograd.grad(loss, list(parameters.values()), allow_unused=True))
    used = 0
    for first, second in zip(*gradients, strict=True):
        if first is not None:
            used += 1
            torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    assert used and any(g is not None and g.abs().max() > 1e-4 for g in gradients[0])


def test_whole_training_agrees_between_the_two_forms(pipe):
    modern = erase(pipe, form="erase-from", eta=2.0)
    paper = erase(pipe, form="paper", eta=1.0)
    assert modern.history == pytest.approx(paper.history, rel=1e-3)


def test_empty_selection_is_a_clear_error():
    with pytest.raises(SelectionError, match="cross-attention"):
        trainable_parameters(nn.Linear(2, 2), "esd-x")
    with pytest.raises(SelectionError, match="esd-x-strict"):
        ESDConfig(trainable="xattn")


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


def test_norms_are_never_trained(pipe):
    """The official code trains linear and convolution layers only, in every variant."""
    norms = [m for m in pipe.unet.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))]
    of_norms = {id(parameter) for norm in norms for parameter in norm.parameters()}
    everything = trainable_parameters(pipe.unet, "esd-all")
    assert norms and not of_norms & {id(parameter) for parameter in everything.values()}
    assert len(everything) + len(of_norms) == len(list(pipe.unet.parameters()))
    crossing = trainable_parameters(pipe.unet, "esd-x")
    rest = trainable_parameters(pipe.unet, "esd-u")
    assert crossing.keys() | rest.keys() == everything.keys() and not crossing.keys() & rest.keys()


def test_training_moves_the_prediction_to_the_target(pipe):
    parameters = trainable_parameters(pipe.unet, "esd-x")
    teacher = Denoiser(frozen_teacher(pipe.unet, parameters), pipe.scheduler)
    student = Denoiser.from_pipeline(pipe)
    with torch.no_grad():
        concept, empty = encode_prompts(pipe, ["cat"]), encode_prompts(pipe, [""])
    noisy = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0, 999, 8).long()

    def distance():
        with torch.no_grad():
            return esd_loss(student, teacher, noisy, t, concept, concept, empty, 2.0).item()

    before = distance()
    with erase(pipe, num_steps=25).apply(pipe):
        assert distance() < 0.5 * before


def test_replacement_starts_the_target(pipe):
    assert erase(pipe).history[0] != erase(pipe, replacement="dog").history[0]


def test_same_seed_gives_identical_weights(pipe):
    first, second, other = (erase(pipe, seed=seed) for seed in (1, 1, 2))
    for name, change in first.delta.deltas["unet"].items():
        assert torch.equal(change, second.delta.deltas["unet"][name])
    assert first.history == second.history != other.history


@pytest.mark.parametrize("settings", [{"eta": 0}, {"num_steps": 0}, {"form": "new"}])
def test_bad_settings_are_named(settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}`"):
        ESDConfig(**settings)
