"""Fixtures shared by the tests of diffusion-core."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from unweave.diffusion_core.testing import tiny_pipeline

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    """Return a new tiny pipeline with random weights."""
    return tiny_pipeline()
