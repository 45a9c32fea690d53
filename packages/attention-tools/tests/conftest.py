"""Fixtures: the embedded pipeline and its recogniser, and tiny U-Nets with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from unweave.emoji_world import load_pipeline, load_recogniser


@pytest.fixture(scope="session")
def pipe():
    """The embedded pipeline; tests leave it as it was."""
    loaded = load_pipeline()
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="session")
def recogniser():
    return load_recogniser()


@pytest.fixture(scope="session")
def make_unet() -> Callable[..., Any]:
    """Builds a U-Net of 8 and 16 channels that looks at text at two resolutions of a side of 16.

    Weights are the same in each call; settings are those of `UNet2DConditionModel`.
    """
    from diffusers import UNet2DConditionModel

    def made(**config: Any) -> Any:
        usual = {
            "sample_size": 16,
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 12,
            "attention_head_dim": 2,
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return UNet2DConditionModel(**{**usual, **config}).eval()

    return made


@pytest.fixture(scope="session")
def tiny(pipe, make_unet):
    """A pipeline with a random U-Net, whose cross-attention is at 16x16 and 8x8."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    made = StableDiffusionPipeline(
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        unet=make_unet(cross_attention_dim=pipe.text_encoder.config.hidden_size),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made
