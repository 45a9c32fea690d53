"""Endless training batches, each a pure function of its step."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unweave.emoji_world.scenes import Scene, SceneDataset

ENDLESS = 1 << 40
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Batch:
    """Scenes with their images as float32 `(n, 3, 64, 64)` in [-1, 1]."""

    images: Tensor
    scenes: list[Scene]

    @property
    def captions(self) -> list[str]:
        """The caption of each scene."""
        return [scene.caption for scene in self.scenes]


class SceneBatches:
    """`batches[step]` composes a batch; the next one is prepared in a thread meanwhile."""

    def __init__(self, batch_size: int, **settings: object) -> None:
        self.dataset = SceneDataset(ENDLESS, **settings)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self._pool = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[Batch]] | None = None

    def __getitem__(self, step: int) -> Batch:
        ready = self._next
        batch = ready[1].result() if ready and ready[0] == step else self._compose(step)
        self._next = (step + 1, self._pool.submit(self._compose, step + 1))
        return batch

    def _compose(self, step: int) -> Batch:
        first = step * self.batch_size
        scenes = [self.dataset.scene(first + i) for i in range(self.batch_size)]
        pixels = np.stack([scene.image for scene in scenes])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        return Batch(images.contiguous().to(DEVICE), scenes)
