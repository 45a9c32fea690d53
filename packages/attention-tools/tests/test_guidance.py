"""Latents updated during sampling: what an update gets, where its change goes."""

from __future__ import annotations

import diffusers
import pytest
import torch

from unweave.attention_tools import MapReader, guide_latents
from unweave.attention_tools.errors import GuidanceError

PROMPT = "a cat face and a rocket on a red background"


def run(pipe, steps=4, guidance=4.0, prompt=PROMPT, **settings):
    return pipe(
        prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
        **({"generator": torch.Generator().manual_seed(0)} | settings),
    ).images


@pytest.fixture(params=["DDIM", "EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep", "DDPM"])
def scheduled(pipe, request):
    """The pipeline with another scheduler."""
    before = pipe.scheduler
    kind = getattr(diffusers, f"{request.param}Scheduler")
    pipe.scheduler = kind.from_config(before.config)
    yield pipe
    pipe.scheduler = before


@pytest.fixture(params=["DDIM", "EulerDiscrete"])
def stepping(pipe, request):
    """The pipeline with a scheduler that does, or does not, scale what the denoiser gets."""
    before = pipe.scheduler
    pipe.scheduler = getattr(diffusers, f"{request.param}Scheduler").from_config(before.config)
    yield pipe
    pipe.scheduler = before


class Watch:
    """Keeps what the denoiser and the scheduler get while it is open."""

    def __init__(self, pipe):
        self.pipe, self.inputs, self.samples = pipe, [], []

    def __enter__(self):
        def into_denoiser(_, args, kwargs):
            self.inputs.append((args[0] if args else kwargs["sample"]).clone())

        self.plain_step = self.pipe.scheduler.step

        def step(output, timestep, sample, *args, **kwargs):
            self.samples.append(sample.clone())
            return self.plain_step(output, timestep, sample, *args, **kwargs)

        self.handle = self.pipe.unet.register_forward_pre_hook(into_denoiser, with_kwargs=True)
        self.pipe.scheduler.step = step
        return self

    def __exit__(self, *error):
        self.handle.remove()
        del self.pipe.scheduler.step


def test_update_of_nothing_changes_no_bit(scheduled):
    plain, steps = run(scheduled), []

    def nothing(step):
        steps.append(step)
        return step.latents

    with guide_latents(scheduled, nothing):
        guided = run(scheduled)
    assert guided.equal(plain)
    assert [step.index for step in steps] == list(range(len(steps)))
    assert len(steps) == len(scheduled.scheduler.timesteps) == steps[0].count


def test_change_reaches_both_halves_and_the_scheduler(stepping):
    change = 0.3 * torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with Watch(stepping) as plain:
        run(stepping)
    guide = guide_latents(stepping, lambda step: step.latents + change, steps=[1])
    with Watch(stepping) as seen, guide:
        run(stepping)
    assert seen.inputs[0].equal(plain.inputs[0]) and seen.samples[0].equal(plain.samples[0])
    assert torch.allclose(seen.inputs[1], plain.inputs[1] + change, atol=1e-6)
    scale = plain.inputs[1][:1].norm() / plain.samples[1].norm()
    assert torch.allclose(seen.samples[1] * scale, plain.samples[1] * scale + change, atol=1e-5)
    assert not torch.allclose(seen.samples[2], plain.samples[2], atol=1e-3)


def test_change_at_the_first_step_is_another_start(stepping):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    change = 0.2 * torch.randn(1, 4, 16, 16, generator=generator)
    with Watch(stepping) as plain:
        run(stepping, latents=latents)
    scale = plain.inputs[0][:1].norm() / latents.norm()
    moved = run(stepping, latents=latents + change / scale)
    with guide_latents(stepping, lambda step: step.latents + change, steps=[0]):
        guided = run(stepping, latents=latents)
    assert torch.allclose(guided, moved, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_forward_is_the_denoiser_with_the_prompt_alone(pipe, guidance):
    prompts = [PROMPT, "a dog on a blue background"]
    text, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
    seen = []

    def update(step):
        assert step.latents.shape == (2, 4, 16, 16)
        with torch.no_grad():
            (out,) = step.forward(step.latents)
            timestep = pipe.scheduler.timesteps[step.index]
            seen.append(
                torch.allclose(out, pipe.unet(step.latents, timestep, text).sample, atol=1e-5)
            )
        return step.latents

    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    with guide_latents(pipe, update):
        run(pipe, 2, guidance, prompts, generator=generators)
    assert seen == [True, True]


def test_gradient_steps_lower_a_loss_on_maps_with_frozen_weights(pipe):
    reader, losses = MapReader(pipe, tokens=[[2, 3]], resolution=16), []
    flags = [parameter.requires_grad for parameter in pipe.unet.parameters()]
    assert any(flags)

    def loss_of(step, latents):
        return -reader(lambda: step.forward(latents)).aggregate().mean()

    def update(step):
        assert torch.is_grad_enabled()
        assert not any(parameter.requires_grad for parameter in pipe.unet.parameters())
        latents = step.latents.clone().requires_grad_()
        loss = loss_of(step, latents)
        (gradient,) = torch.autograd.grad(loss, latents)
        moved = step.latents - 0.02 * gradient / gradient.norm() * latents.detach().norm()
        losses.append((loss.item(), loss_of(step, moved).item()))
        return moved

    with guide_latents(pipe, update, steps=range(3)):
        run(pipe)
    assert len(losses) == 3
    assert all(after < before for before, after in losses)
    assert [parameter.requires_grad for parameter in pipe.unet.parameters()] == flags
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())


def test_flags_of_weights_come_back_one_by_one(pipe):
    parameters = list(pipe.unet.parameters())
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters[::2]:
            parameter.requires_grad_(False)
        mixed = [parameter.requires_grad for parameter in parameters]
        with pytest.raises(RuntimeError, match="stop"), guide_latents(pipe, lambda s: s.latents):
            raise RuntimeError("stop")
        assert [parameter.requires_grad for parameter in parameters] == mixed
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)


def test_steps_count_from_zero_in_each_call(pipe):
    asked = []

    def update(step):
        asked.append((step.index, step.count))
        return step.latents

    with guide_latents(pipe, update, steps=[0, 2]):
        run(pipe, 3)
        run(pipe, 4)
    assert asked == [(0, 3), (2, 3), (0, 4), (2, 4)]


def test_two_guides_add_up(pipe):
    change = torch.full((1, 4, 16, 16), 0.05)
    with (
        guide_latents(pipe, lambda step: step.latents + change, steps=[1]),
        guide_latents(pipe, lambda step: step.latents + 2 * change, steps=[1]),
    ):
        both = run(pipe)
    with guide_latents(pipe, lambda step: step.latents + 3 * change, steps=[1]):
        once = run(pipe)
    assert torch.allclose(both, once, atol=1e-4)


def test_everything_is_restored(pipe):
    scheduler, hooks = pipe.scheduler, len(pipe.unet._forward_pre_hooks)
    methods = dict(scheduler.__dict__)
    plain = run(pipe)

    def fail(step):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), guide_latents(pipe, fail):
        run(pipe)
    assert {"step", "set_timesteps"}.isdisjoint(scheduler.__dict__)
    assert scheduler.__dict__.keys() == methods.keys()
    assert len(pipe.unet._forward_pre_hooks) == hooks
    assert run(pipe).equal(plain)


def test_methods_that_others_put_on_the_scheduler_stay(pipe):
    own = pipe.scheduler.step
    pipe.scheduler.step = own
    try:
        with guide_latents(pipe, lambda step: step.latents):
            assert pipe.scheduler.step is not own
        assert pipe.scheduler.__dict__["step"] is own
    finally:
        del pipe.scheduler.step


def test_latents_of_another_shape_are_named(pipe):
    guide = guide_latents(pipe, lambda step: step.latents[..., ::2, ::2])
    said = r"\(1, 4, 16, 16\), got \(1, 4, 8, 8\)"
    with pytest.raises(GuidanceError, match=said), guide:
        run(pipe)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_named(pipe, wrong):
    guide = guide_latents(pipe, lambda step: step.latents + wrong, steps=[1])
    with pytest.raises(GuidanceError, match="not finite at step 1"), guide:
        run(pipe)
    assert run(pipe).isfinite().all()
