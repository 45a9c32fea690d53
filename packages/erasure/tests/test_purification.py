import pytest
import torch
from torch import nn

from unweave.diffusion_core.denoiser import Denoiser
from unweave.diffusion_core.errors import PromptError
from unweave.diffusion_core.parameters import fingerprint
from unweave.diffusion_core.testing import tiny_pipeline, tiny_xl_pipeline
from unweave.erasure.protocol import ErasureRequest
from unweave.erasure.purification import ddim_inversion, purify
from unweave.erasure.uce import UCE, UCEConfig


def pictures(count=2):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class GaussianUNet(nn.Module):
    """The exact denoiser of data that is normal with mean 0 and a known standard deviation."""

    def __init__(self, scheduler, std):
        super().__init__()
        self.scheduler, self.std = scheduler, std

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        share = self.scheduler.alphas_cumprod[timestep].reshape(-1, 1, 1, 1)
        alpha, sigma = share.sqrt(), (1 - share).sqrt()
        variance = share * self.std**2 + 1 - share
        noise, clean = sigma * sample / variance, alpha * self.std**2 * sample / variance
        v_prediction = self.scheduler.config.prediction_type == "v_prediction"
        return (alpha * noise - sigma * clean if v_prediction else noise,)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_inversion_of_normal_data_gives_the_noise_that_the_flow_leads_to(prediction_type):
    """Of N(0, s^2) the flow keeps x / sqrt(alpha^2 s^2 + sigma^2), so x_T is x_0 / s."""
    scheduler = tiny_pipeline(prediction_type).scheduler
    denoiser = Denoiser(GaussianUNet(scheduler, 0.5), scheduler)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def error(num_steps):
        latents = ddim_inversion(denoiser, scheduler, 0.5 * noise, torch.zeros(1, 1, 1), num_steps)
        return ((latents - noise).square().mean()).sqrt().item()

    coarse, fine = error(25), error(200)
    assert fine < 0.03 and fine < 0.3 * coarse


@pytest.mark.parametrize("build", [tiny_pipeline, tiny_xl_pipeline])
def test_an_erasure_is_applied_for_the_time_of_the_call(build):
    pipe = build()
    before, scheduler = fingerprint(pipe.unet), pipe.scheduler
    erasure = UCE(UCEConfig(regularisation=1e-4)).erase(pipe, ErasureRequest("cat"))
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0}
    plain = purify(pipe, pictures(), "a cat", **settings)
    inside = purify(pipe, pictures(), "a cat", erasure=erasure, **settings)
    assert fingerprint(pipe.unet) == before and pipe.scheduler is scheduler
    with erasure.apply(pipe):
        by_hand = purify(pipe, pictures(), "a cat", **settings)
    assert torch.equal(inside.images, by_hand.images)
    assert torch.equal(inside.latents, by_hand.latents)
    assert plain.images.shape == (2, 3, 32, 32) and plain.latents.shape == (2, 4, 16, 16)
    assert not torch.equal(plain.images, inside.images)


def test_each_image_has_its_own_caption(pipe):
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0}
    both = purify(pipe, pictures(), ["a cat", "a dog"], **settings).images
    second = purify(pipe, pictures()[1], "a dog", **settings).images
    torch.testing.assert_close(both[1:], second, rtol=0, atol=1e-4)
    first = purify(pipe, pictures()[1], "a cat", **settings).images
    assert (first - second).abs().max() > 1e-3


def test_schedulers_that_are_no_ddim_are_replaced_for_the_call(pipe):
    from diffusers import DPMSolverMultistepScheduler

    wanted = purify(pipe, pictures(), "a cat", num_inference_steps=4).images
    other = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = other
    torch.testing.assert_close(
        purify(pipe, pictures(), "a cat", num_inference_steps=4).images, wanted
    )
    assert pipe.scheduler is other


def test_bad_input_is_named(pipe):
    with pytest.raises(PromptError, match="each of the 2 images, got 3"):
        purify(pipe, pictures(), ["a", "b", "c"])
    for name in ("num_inference_steps", "guidance_scale"):
        with pytest.raises(ValueError, match=f"`{name}`"):
            purify(pipe, pictures(), "a cat", **{name: -1})
