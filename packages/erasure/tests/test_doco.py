"""DoCo: losses, whose gradients go where, what may change, and what the erasure does to a toy.

The behaviour checks are those of the method's specification; their thresholds are design targets.
The space in which the discriminator compares, and the projection, follow the authors' code where
the paper's text could not be read.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from unweave.diffusion_core.denoiser import Denoiser
from unweave.diffusion_core.errors import PromptError, SelectionError
from unweave.diffusion_core.objective import denoising_loss
from unweave.diffusion_core.parameters import fingerprint, select_parameters, train_only
from unweave.diffusion_core.prompts import encode_prompts
from unweave.diffusion_core.teacher import frozen_teacher
from unweave.diffusion_core.testing import tiny_pipeline, tiny_xl_pipeline
from unweave.erasure import doco
from unweave.erasure.anchor_images import AnchorBatch, noise_and_timesteps
from unweave.erasure.doco import (
    DoCo,
    DoCoConfig,
    discriminator_loss,
    doco_loss,
    domain,
    patch_discriminator,
    start_token_detached,
    unet_gradients,
    unlearning_loss,
)
from unweave.erasure.gradient_surgery import clip_norm, remove_conflict
from unweave.erasure.protocol import Erasure, ErasureRequest

QUICK = {
    "num_images": 4,
    "views": 1,
    "num_inference_steps": 2,
    "num_steps": 4,
    "warm_up": 1,
    "batch_size": 2,
    "lr": 1e-3,
}
REQUEST = ErasureRequest("cat", replacement="dog")


def erase(pipe, seed=0, request=REQUEST, **settings):
    return DoCo(DoCoConfig(**{**QUICK, **settings})).erase(pipe, request, seed=seed, progress=False)


class Training:
    """A tiny student that has moved from its teacher, a batch and a discriminator."""

    def __init__(self, prediction_type="epsilon", **settings):
        self.pipe = tiny_pipeline(prediction_type)
        self.config = DoCoConfig(**{**QUICK, **settings})
        self.parameters = select_parameters(self.pipe.unet, "cross-attention-kv")
        unet = frozen_teacher(self.pipe.unet, self.parameters)
        self.student = Denoiser.from_pipeline(self.pipe)
        self.teacher = replace(self.student, unet=unet)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            states = encode_prompts(self.pipe, ["a cat", "a dog"])
        latents = torch.randn(4, 4, 16, 16, generator=generator)
        target, anchor = (doco.PromptStates(states[row : row + 1]).expand(4) for row in range(2))
        self.batch = AnchorBatch(latents, torch.ones(4, 1, 16, 16), latents, anchor, target)
        self.discriminator = patch_discriminator(4, 16, 16)

    def loss(self, seed=0, learns=True):
        parameters = list(self.parameters.values()) if learns else []
        return doco_loss(
            self.student, self.teacher, self.discriminator, parameters, self.batch, self.config,
            torch.Generator().manual_seed(seed),
        )  # fmt: skip

    def parts(self, seed=0):
        """Return anchor and target domain and L_prior, each from a call of its own."""
        generator = torch.Generator().manual_seed(seed)
        noise, t = noise_and_timesteps(self.student, self.batch.latents, generator)
        prior_noise, prior_t = noise_and_timesteps(self.student, self.batch.latents, generator)
        noisy = self.student.add_noise(self.batch.latents, noise, t)
        with torch.no_grad():
            anchor = domain(self.teacher.predict(noisy, t, self.batch.anchor), self.config)
        target = domain(self.student.predict(noisy, t, self.batch.target), self.config)
        prior = denoising_loss(
            self.student, self.batch.latents, self.batch.anchor, prior_t, prior_noise
        )
        return anchor, target, prior


def gradients_of(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_defaults_are_those_of_the_authors_code():
    config = DoCoConfig()
    assert (config.num_steps, config.warm_up, config.batch_size) == (2000, 1000, 8)
    assert (config.lr, config.weight_decay) == (8 * 6e-6, 1e-2)
    assert (config.num_images, config.guidance_scale, config.num_inference_steps) == (1000, 6, 25)
    assert (config.surgery, config.surgery_strength, config.legacy_scale) == (
        "per_tensor",
        1,
        False,
    )
    assert (config.d_space, config.detach_bos) == ("x0", True)


@pytest.mark.parametrize(("kind", "lr"), [("object", 1e-4), ("style", 5e-4)])
def test_discriminator_rate_follows_the_kind(pipe, kind, lr):
    erasure = erase(pipe, request=replace(REQUEST, kind=kind))
    assert erasure.delta.meta.settings["discriminator_lr"] == lr


def test_losses_are_those_of_the_min_max():
    logits = {"anchor": torch.tensor([0.3, -1.2]), "target": torch.tensor([2.0, -0.5])}
    judge = nn.Identity()
    sigmoid = {name: 1 / (1 + (-value).exp()) for name, value in logits.items()}
    expected = -(1 - sigmoid["anchor"]).log().mean() - sigmoid["target"].log().mean()
    assert discriminator_loss(judge, logits["anchor"], logits["target"]) == pytest.approx(
        expected.item()
    )
    unlearning = -(1 - sigmoid["target"]).log().mean()
    assert unlearning_loss(judge, logits["target"]) == pytest.approx(unlearning.item())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_domain_is_the_clean_latent_or_the_noise(prediction_type):
    denoiser = Denoiser.from_pipeline(tiny_pipeline(prediction_type))
    t = torch.tensor([100, 900])
    noisy = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prediction = denoiser.predict(noisy, t, torch.zeros(1, 77, 32))
    share = denoiser.alphas_cumprod.double()[t][:, None, None, None]
    raw, noisy = prediction.raw.double(), noisy.double()
    if prediction_type == "epsilon":
        clean, noise = (noisy - (1 - share).sqrt() * raw) / share.sqrt(), raw
    else:
        clean = share.sqrt() * noisy - (1 - share).sqrt() * raw
        noise = (1 - share).sqrt() * noisy + share.sqrt() * raw
    shown = {
        ("x0", False): clean,
        ("eps", False): noise,
        ("x0", True): share.sqrt() * clean,
        ("eps", True): share.sqrt() * noise,
    }
    for (space, weighted), expected in shown.items():
        config = DoCoConfig(d_space=space, snr_weighted=weighted)
        result = domain(prediction, config).double()
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_discriminator_has_the_authors_layers_on_large_latents():
    judge = patch_discriminator(4, 64, 64)
    widths = [(m.in_channels, m.out_channels) for m in judge if isinstance(m, nn.Conv2d)]
    assert widths == [(4, 64), (64, 128), (128, 256), (256, 512), (512, 1)]
    assert [type(m).__name__ for m in judge][:5] == [
        "Conv2d", "LeakyReLU", "Conv2d", "BatchNorm2d", "LeakyReLU",
    ]  # fmt: skip
    assert sum(p.numel() for p in judge.parameters()) == pytest.approx(2.8e6, rel=0.02)
    assert judge(torch.zeros(2, 4, 64, 64)).shape == (2, 1, 3, 3)


@pytest.mark.parametrize("size", [(3, 3), (8, 8), (16, 16), (32, 32), (48, 48), (20, 96), (6, 9)])
def test_discriminator_keeps_at_least_two_by_two_patches(size):
    logits = patch_discriminator(3, *size)(torch.randn(2, 3, *size))
    assert logits.shape[:2] == (2, 1) and min(logits.shape[2:]) >= 2


def test_discriminator_depends_on_its_seed_alone():
    first, second, other = (patch_discriminator(4, 16, 16, seed=seed) for seed in (0, 0, 1))
    assert fingerprint(first) == fingerprint(second) != fingerprint(other)
    with pytest.raises(SelectionError, match="3 x 3 or larger"):
        patch_discriminator(4, 2, 64)


@pytest.mark.parametrize("learns", [False, True])
def test_discriminator_learns_from_its_own_loss_alone(learns):
    training = Training()
    with train_only([training.pipe.unet], training.parameters):
        loss, unlearning = training.loss(learns=learns)
        loss.backward()
        found = gradients_of(training.discriminator)
        training.discriminator.zero_grad()
        anchor, target, _ = training.parts()
        fresh = discriminator_loss(training.discriminator, anchor, target.detach())
        fresh.backward()
        expected = gradients_of(training.discriminator)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
        own = unlearning_loss(training.discriminator, target)
        assert unlearning == pytest.approx(own.item(), rel=1e-5) and not unlearning.requires_grad
        value = fresh + own if learns else fresh
        assert loss.item() == pytest.approx(value.item(), rel=1e-5)


def test_gradients_left_from_the_unlearning_loss_would_mislead_the_discriminator():
    """The fault of the authors' code, which the test above must be able to see."""
    training = Training()
    anchor, target, _ = training.parts()
    expected = torch.autograd.grad(
        discriminator_loss(training.discriminator, anchor, target.detach()),
        list(training.discriminator.parameters()),
    )
    unlearning_loss(training.discriminator, target).backward()
    discriminator_loss(training.discriminator, anchor, target.detach()).backward()
    left = [p.grad for p in training.discriminator.parameters()]
    assert max((a - b).abs().max().item() for a, b in zip(left, expected, strict=True)) > 1e-3


@pytest.mark.parametrize("surgery", ["per_tensor", "global"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_unet_gets_the_operated_gradient(prediction_type, surgery):
    training = Training(prediction_type, surgery=surgery)
    weights = list(training.parameters.values())
    with train_only([training.pipe.unet], weights):
        training.loss()[0].backward()
        found = [weight.grad.clone() for weight in weights]
        _, target, prior = training.parts()
        unlearn = torch.autograd.grad(unlearning_loss(training.discriminator, target), weights)
        keep = torch.autograd.grad(prior, weights)
    operated = remove_conflict(clip_norm(unlearn, 1.0), clip_norm(keep, 1.0), scope=surgery)
    for gradient, expected in zip(found, clip_norm(operated, 1.0), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_preserving_gradient_is_never_added():
    """Where the two agree, the step is that of the unlearning loss alone, bit by bit."""
    weight = nn.Parameter(torch.tensor([0.3, 0.4]))
    unlearning, prior = weight @ torch.tensor([0.5, 0.1]), weight @ torch.tensor([0.2, 0.3])
    (operated,) = unet_gradients(unlearning, prior, [weight], DoCoConfig())
    assert torch.equal(operated, torch.tensor([0.5, 0.1]))


def test_without_surgery_the_losses_are_added():
    weight = nn.Parameter(torch.tensor([0.3, 0.4]))
    unlearning, prior = weight @ torch.tensor([0.5, 0.1]), weight @ torch.tensor([-2.0, 3.0])
    config = DoCoConfig(surgery="none", prior_weight=0.5)
    (added,) = unet_gradients(unlearning, prior, [weight], config)
    torch.testing.assert_close(added, torch.tensor([0.5 - 0.1, 0.1 + 0.15]))


def test_start_token_moves_no_keys_and_values(pipe):
    """Its output is unchanged, and only gradients of other tokens reach the weights."""
    weights = list(select_parameters(pipe.unet, "cross-attention-kv").values())
    noisy, t = torch.randn(1, 4, 16, 16), torch.tensor([10])
    with torch.no_grad():
        states = encode_prompts(pipe, ["a cat"])
    denoiser = Denoiser.from_pipeline(pipe)

    def gradients(states):
        raw = denoiser.predict(noisy, t, states).raw
        return raw.detach(), torch.autograd.grad(raw.square().sum(), weights)

    whole, plain = gradients(states)
    with start_token_detached(pipe.unet):
        detached, without = gradients(states)
        only_start = gradients(states[:, :1].expand(-1, 1, -1))[1]
    assert torch.equal(whole, detached)
    assert all(not gradient.any() for gradient in only_start)
    assert any(not torch.allclose(a, b) for a, b in zip(plain, without, strict=True))
    for before, after in zip(plain, gradients(states)[1], strict=True):
        assert torch.equal(before, after)


def test_only_keys_and_values_change_and_not_before_the_warm_up_ends(pipe, monkeypatch):
    seen = []

    def spy(*arguments):
        seen.append(fingerprint(pipe.unet))
        return doco_loss(*arguments)

    monkeypatch.setattr(doco, "doco_loss", spy)
    before = fingerprint(pipe.unet), fingerprint(pipe.text_encoder), fingerprint(pipe.vae)
    erasure = erase(pipe, num_steps=5, warm_up=3)
    assert len(seen) == 5 and seen[0] == seen[1] == seen[2] == seen[3] == before[0] != seen[4]
    assert fingerprint(pipe.unet) == before[0]
    with erasure.apply(pipe):
        after = fingerprint(pipe.unet)
        changed = {name for name in after if after[name] != before[0][name]}
        assert changed == set(select_parameters(pipe.unet, "cross-attention-kv"))
        assert (fingerprint(pipe.text_encoder), fingerprint(pipe.vae)) == before[1:]


def test_saved_erasure_gives_the_same_outputs(pipe, tmp_path):
    erasure = erase(pipe)
    erasure.save(tmp_path / "doco")
    noisy, t = torch.randn(2, 4, 16, 16), torch.tensor([10, 700])
    outputs = []
    for other, made in ((pipe, erasure), (tiny_pipeline(), Erasure.load(tmp_path / "doco"))):
        with made.apply(other), torch.no_grad():
            states = encode_prompts(other, ["a cat"])
            outputs.append(Denoiser.from_pipeline(other).predict(noisy, t, states).raw)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)


def test_same_seed_gives_identical_weights(pipe):
    first, second, other = (erase(pipe, seed=seed) for seed in (1, 1, 2))
    for name, change in first.delta.deltas["unet"].items():
        assert torch.equal(change, second.delta.deltas["unet"][name])
    assert first.history == second.history != other.history
    assert len(first.history) == QUICK["num_steps"]


@pytest.mark.parametrize("make", [lambda: tiny_pipeline("v_prediction"), tiny_xl_pipeline])
@pytest.mark.parametrize("settings", [{"surgery": "none"}, {"legacy_scale": True}])
def test_works_on_velocity_models_and_xl(make, settings):
    pipe = make()
    assert set(erase(pipe, **settings).delta.deltas["unet"]) == set(
        select_parameters(pipe.unet, "cross-attention-kv")
    )


def test_missing_anchor_is_named_before_any_work(pipe):
    with pytest.raises(PromptError, match='"painting" for the style'):
        erase(pipe, request=ErasureRequest("monet", kind="style"))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_steps": 0},
        {"warm_up": 2000},
        {"surgery": "tensor"},
        {"d_space": "v"},
        {"discriminator_lr": 0.0},
        {"num_images": 0},
    ],
)
def test_bad_settings_are_named(settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}`"):
        DoCoConfig(**settings)
