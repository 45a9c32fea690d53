"""What all parts bring in a world that can be computed: patterns, whose denoiser is exact."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import Attention
from torch import nn

from unweave.attention_tools import AVERAGING, AnagramConfig, AnagramMTL


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
