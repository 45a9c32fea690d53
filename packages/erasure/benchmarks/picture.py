"""Draws concepts before and after the erasure of one of them: `picture.py OUT.png [METHOD]`."""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from unweave.diffusion_core import generate, load_pipeline
from unweave.erasure import ErasureRequest, make_eraser

TARGET = "cat face"
SHOWN = (TARGET, "dog face", "pizza", "rocket")
SEEDS = range(1000, 1005)


def main(path: str, method: str = "few-shot") -> None:
    """Writes the picture: one concept a row, the same seeds on the left and on the right."""
    pipe = load_pipeline("emoji-world")
    request = ErasureRequest(TARGET, preserve=SHOWN[1:])
    erasure = make_eraser(method, model="emoji-world").erase(pipe, request, progress=False)
    before = draw(pipe)
    with erasure.apply(pipe):
        after = draw(pipe)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.1), layout="constrained")
    for axis, images, title in zip(
        axes, (before, after), ("before", f"{TARGET!r} erased by {method}"), strict=True
    ):
        axis.imshow(tiled(images).permute(1, 2, 0).numpy(), interpolation="lanczos")
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([64 * row + 32 for row in range(len(SHOWN))], labels=SHOWN)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=100)


def draw(pipe) -> Tensor:  # type: ignore[no-untyped-def]
    """Images `(concepts * seeds, 3, 64, 64)` of "a <concept>"."""
    prompts = [f"a {concept}" for concept in SHOWN for _ in SEEDS]
    return generate(pipe, prompts, seeds=[*SEEDS] * len(SHOWN))


def tiled(images: Tensor) -> Tensor:
    """One image `(3, rows * 64, columns * 64)`."""
    rows = images.unflatten(0, (len(SHOWN), len(SEEDS)))
    return torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
