"""Fixtures: the tiny random pipeline, and a toy of eight concepts trained to convergence."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from unweave.diffusion_core.denoiser import Denoiser
from unweave.diffusion_core.objective import denoising_loss
from unweave.diffusion_core.testing import tiny_pipeline
from unweave.diffusion_core.toy_world import ToyWorld
from unweave.erasure.few_shot import FewShotConfig, unlearn

NUM_CONCEPTS = 8
LATENT_SHAPE = (2, 4, 4)
CONCEPT_DIMENSIONS = 2
IMAGE_NOISE = 0.3


@pytest.fixture
def pipe():
    return tiny_pipeline()


@pytest.fixture
def images():
    """Four images of 40x40 pixels."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (4, 40, 40, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(image.numpy()) for image in pixels]


@pytest.fixture(scope="session")
def toy_world(pytestconfig):
    """A trained text-to-image pipeline; kept by pytest's cache, else trained in two minutes."""
    return ToyWorld.load(pytestconfig.cache.mkdir("unweave-toys"))


@pytest.fixture(scope="session")
def toy():
    return Toy.trained()


class ToyTextEncoder(nn.Module):
    """An embedding of concept numbers and two residual MLPs."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_CONCEPTS, width)
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width)
            )
            for _ in range(2)
        )

    def forward(self, concepts: Tensor) -> Tensor:
        states = self.embedding(concepts)
        for mlp in self.mlps:
            states = states + mlp(states)
        return states[:, None]

    def trainable(self) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for name, parameter in self.mlps.named_parameters()
            if name.split(".")[1] in ("1", "3")
        }


class ToyUNet(nn.Module):
    """A conditional denoiser of small latents: two residual MLPs that see time and concept."""

    def __init__(self, width: int = 64, text_width: int = 32) -> None:
        super().__init__()
        size = torch.Size(LATENT_SHAPE).numel()
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, -6, 8)))
        self.inlet = nn.Linear(size, width)
        self.time = nn.Linear(16, width)
        self.text = nn.Linear(text_width, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
            )
            for _ in range(2)
        )
        self.outlet = nn.Linear(width, size)

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True, **_):
        angles = timestep.reshape(-1, 1).float() * self.frequencies
        condition = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        condition = condition + self.text(encoder_hidden_states[:, 0])
        hidden = self.inlet(sample.flatten(1)) + condition
        for block in self.blocks:
            hidden = hidden + block(hidden + condition)
        return (self.outlet(hidden).reshape(sample.shape),)


def orthogonal_planes() -> Tensor:
    """Return (concepts, latent size, 2) spanning directions, scaled to unit variance of latents."""
    size = torch.Size(LATENT_SHAPE).numel()
    generator = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    columns = basis[:, : NUM_CONCEPTS * CONCEPT_DIMENSIONS]
    planes = columns.reshape(size, NUM_CONCEPTS, CONCEPT_DIMENSIONS).transpose(0, 1)
    return planes * (size / CONCEPT_DIMENSIONS) ** 0.5


@dataclass
class Toy:
    """Eight concepts, each a plane in latent space with noise around it, and their model.

    `planes` is (concepts, latent size, 2), the planes being orthogonal to one another.
    """

    planes: Tensor
    text_encoder: ToyTextEncoder
    denoiser: Denoiser

    @classmethod
    def trained(cls, num_steps: int = 1200, batch_size: int = 128) -> Toy:
        from diffusers import DDPMScheduler

        with torch.random.fork_rng():
            torch.manual_seed(0)
            text_encoder, unet = ToyTextEncoder(), ToyUNet()
            toy = cls(orthogonal_planes(), text_encoder, Denoiser(unet, DDPMScheduler()))
            parameters = [*text_encoder.parameters(), *unet.parameters()]
            optimizer = torch.optim.Adam(parameters, lr=2e-3, fused=True)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
            generator = torch.Generator().manual_seed(0)
            for _ in range(num_steps):
                concepts = torch.randint(NUM_CONCEPTS, (batch_size,), generator=generator)
                loss = toy.losses(text_encoder, concepts, generator).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            unet.requires_grad_(False)
        return toy

    def images(self, concepts: Tensor, generator: torch.Generator) -> Tensor:
        """Draw one latent image for each concept number."""
        within = torch.randn(len(concepts), CONCEPT_DIMENSIONS, 1, generator=generator)
        noise = torch.randn(len(concepts), *LATENT_SHAPE, generator=generator)
        return (self.planes[concepts] @ within).reshape(noise.shape) + IMAGE_NOISE * noise

    def losses(self, text_encoder, concepts: Tensor, generator: torch.Generator) -> Tensor:
        """Return the denoising loss of one new image for each concept number."""
        clean = self.images(concepts, generator)
        t = torch.randint(1000, (len(concepts),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        states = text_encoder(concepts)
        return denoising_loss(self.denoiser, clean, states, t, noise, reduction="none")

    def loss_seen_in_training(self, text_encoder, target: int, seed: int) -> float:
        """Return the mean loss at the images, timesteps and noise that `erase` learns from."""
        still = copy.deepcopy(text_encoder)
        losses = self._unlearn(still, self.training_images(target, seed), target, 1e-12, seed)
        return sum(losses) / len(losses)

    def training_images(self, concept: int, seed: int) -> Tensor:
        return self.images(torch.full((4,), concept), torch.Generator().manual_seed(1000 + seed))

    @torch.no_grad()
    def loss_of_concepts(self, text_encoder) -> Tensor:
        """Return the mean denoising loss of held-out images of each concept, (8,)."""
        generator = torch.Generator().manual_seed(999)
        count = 512
        concepts = torch.arange(NUM_CONCEPTS).repeat_interleave(count)
        losses = self.losses(text_encoder, concepts, generator)
        return losses.reshape(NUM_CONCEPTS, -1).mean(1)

    def erase(
        self, target: int, *, lr: float, seed: int, image_concept: int | None = None, **retention
    ):
        """Unlearn `target` from four images in ten steps; return the new text encoder."""
        text_encoder = copy.deepcopy(self.text_encoder)
        images = self.training_images(target if image_concept is None else image_concept, seed)
        self._unlearn(text_encoder, images, target, lr, seed, **retention)
        return text_encoder

    def _unlearn(
        self,
        text_encoder,
        images: Tensor,
        target: int,
        lr: float,
        seed: int,
        kept_prompts: Sequence[str] = (),
        preserve_weight: float = 0.0,
    ):
        return unlearn(
            lambda prompts: text_encoder(torch.tensor([int(prompt) for prompt in prompts])),
            text_encoder.trainable(),
            self.denoiser,
            images,
            [str(target)],
            FewShotConfig(lr=lr, preserve_weight=preserve_weight),
            kept_prompts=kept_prompts,
            seed=seed,
        )

    def rise_of(self, text_encoder) -> Tensor:
        """Return by which factor the loss of each concept is above that of the trained model."""
        return self.loss_of_concepts(text_encoder) / self.loss_of_concepts(self.text_encoder)

    def rises(self, target: int, **settings) -> tuple[float, float]:
        """Return by which factor the loss of the target and the mean of the others rise."""
        rise = self.rise_of(self.erase(target, **settings))
        others = torch.arange(NUM_CONCEPTS) != target
        return rise[target].item(), rise[others].mean().item()
