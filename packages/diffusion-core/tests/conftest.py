"""Fixtures shared by the tests of diffusion-core."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from unweave.diffusion_core.files import load_tensors, save_tensors
from unweave.diffusion_core.testing import tiny_pipeline

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    """Return a new tiny pipeline with random weights."""
    return tiny_pipeline()


@pytest.fixture
def rewrite() -> Callable[[Path, Callable[[str], str | None]], None]:
    """Return a function that renames the tensors of a file; those renamed to None are left out."""

    def rewritten(path: Path, rename: Callable[[str], str | None]) -> None:
        renamed = {rename(name): tensor for name, tensor in load_tensors(path).items()}
        kept = {name: tensor for name, tensor in renamed.items() if name}
        save_tensors(path, kept, {"format": "pt"})

    return rewritten
