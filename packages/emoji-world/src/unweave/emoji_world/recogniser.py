"""The recogniser: names the concepts, the style and the background of a 64x64 image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from unweave.emoji_world.world import World


class Recognition(NamedTuple):
    """Logits: `(n, concepts)` multi-label, `(n, 4)` styles and `(n, 8)` backgrounds."""

    concepts: Tensor
    styles: Tensor
    backgrounds: Tensor


class Recogniser(nn.Module):
    """A small residual network over images `(n, 3, 64, 64)` in [0, 1].

    Concepts are scored at each of 8x8 places and pooled by a smooth maximum, so two objects in a
    scene do not dilute one another. `threshold` turns probabilities into detections.
    """

    def __init__(self, concepts: tuple[str, ...], width: int = 32, threshold: float = 0.5) -> None:
        super().__init__()
        self.concepts_known, self.threshold = concepts, threshold
        self.trunk = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1),
            _Residual(width),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            _Residual(2 * width),
            _Residual(2 * width),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1),
            _Residual(4 * width),
            _Residual(4 * width),
            nn.BatchNorm2d(4 * width),
            nn.ReLU(),
        )
        self.concept_head = nn.Conv2d(4 * width, len(concepts), 1)
        self.style_head = nn.Linear(8 * width, len(World.styles))
        self.background_head = nn.Linear(8 * width, len(World.backgrounds))
        nn.init.constant_(self.concept_head.bias, -6.0)  # type: ignore[arg-type]

    @property
    def concepts(self) -> tuple[str, ...]:
        """Names in the order of the concept scores."""
        return self.concepts_known

    def forward(self, images: Tensor) -> Recognition:
        """Logits for images `(n, 3, 64, 64)` in [0, 1].

        Raises:
            ValueError: for images of another shape.
        """
        if images.ndim != 4 or images.shape[1:] != (3, 64, 64):
            raise ValueError(f"`images` must be (n, 3, 64, 64), got {tuple(images.shape)}")
        places = self.trunk(images * 2 - 1)
        pooled = torch.cat([places.mean((2, 3)), places.amax((2, 3))], dim=1)
        return Recognition(
            self.concept_head(places).flatten(2).logsumexp(2),
            self.style_head(pooled),
            self.background_head(pooled),
        )

    @torch.no_grad()
    def probabilities(self, images: Tensor, batch_size: int = 128) -> Tensor:
        """Probability of each concept, `(n, concepts)`."""
        return torch.cat([self(part).concepts for part in images.split(batch_size)]).sigmoid()

    def detect(self, images: Tensor) -> Tensor:
        """Which concepts are there: bool `(n, concepts)`."""
        return self.probabilities(images) > self.threshold

    @torch.no_grad()
    def styles(self, images: Tensor) -> Tensor:
        """Index into `World.styles` of the likeliest style, `(n,)`."""
        output: Recognition = self(images)
        return output.styles.argmax(1)

    @torch.no_grad()
    def backgrounds(self, images: Tensor) -> Tensor:
        """Index into `World.backgrounds` of the likeliest background, `(n,)`."""
        output: Recognition = self(images)
        return output.backgrounds.argmax(1)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.body(x)
        return result
